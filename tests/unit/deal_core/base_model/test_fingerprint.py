"""The identity of a base model follows its content, and nothing else."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from deal_core.base_model.fingerprint import sha256_of_file, sha256_of_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"hidden_size": 8, "transformers_version": "5.0.0"}')
    (model / "model.safetensors").write_bytes(b"weights")
    (model / "tokenizer.json").write_text("{}")
    return model


def test_the_digest_of_a_file_is_the_digest_of_its_bytes(tmp_path: Path) -> None:
    content = os.urandom(3 * (1 << 20) + 17)
    (tmp_path / "file").write_bytes(content)
    assert sha256_of_file(tmp_path / "file") == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize(
    ("file", "content"),
    [("model.safetensors", "WEIGHTS"), ("tokenizer.json", "[]"), ("config.json", '{"hidden_size": 9}'),
     ("model-2.safetensors", "more"), ("chat_template.jinja", "{{ x }}")],
)
def test_weights_config_and_tokenizer_all_count(folder: Path, tmp_path: Path, file: str, content: str) -> None:
    before = sha256_of_model(folder, tmp_path / "memo")
    (folder / file).write_text(content)
    assert sha256_of_model(folder, tmp_path / "memo") != before


def test_place_time_and_writing_library_do_not_count(folder: Path, tmp_path: Path) -> None:
    before = sha256_of_model(folder, tmp_path / "memo")
    (folder / "README.md").write_text("words")
    config = json.loads((folder / "config.json").read_text())
    config = {"_name_or_path": "/elsewhere", **config, "transformers_version": "5.9.9"}
    (folder / "config.json").write_text(json.dumps(config, indent=4))
    os.utime(folder / "model.safetensors", (1, 1))
    moved = folder.rename(tmp_path / "moved")
    assert sha256_of_model(moved, tmp_path / "memo") == before


def test_a_digest_is_remembered_while_the_files_stay_as_they_are(folder: Path, tmp_path: Path) -> None:
    digest = sha256_of_model(folder, tmp_path / "memo")
    (memo,) = (tmp_path / "memo").iterdir()
    assert memo.read_text().strip() == digest
    memo.write_text("remembered\n")
    assert sha256_of_model(folder, tmp_path / "memo") == "remembered"
    os.utime(folder / "model.safetensors", (1, 1))
    assert sha256_of_model(folder, tmp_path / "memo") == digest
