"""Bytes that are not the recorded ones are refused, and the message says which file and which digests."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from pathlib import Path

import pytest

from deal_core.adapter.files import (
    ADAPTER_FILES,
    PEFT_FILES,
    Recorded,
    as_recorded,
    digests_of,
    require_undamaged,
    sha256_together,
)
from deal_core.errors import IntegrityError

FILES = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"weights", "method.json": b"[]"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "record.json").write_text("is no file of the adapter")
    return tmp_path


def test_the_digest_of_all_files_together_is_the_one_that_versions_have_always_had(folder: Path) -> None:
    lines = "".join(f"{name}\0{hashlib.sha256(content).hexdigest()}\n" for name, content in sorted(FILES.items()))
    assert sha256_together(digests_of(folder)) == hashlib.sha256(lines.encode()).hexdigest()


def refusal(folder: Path, recorded: Recorded, names: Collection[str] = ADAPTER_FILES) -> str:
    with pytest.raises(IntegrityError) as caught:
        require_undamaged(
            digests_of(folder, names), recorded, names, what="Version 2 of 'l'", where="file:///x", remedy="Do this."
        )
    return str(caught.value)


def test_whole_files_pass(folder: Path) -> None:
    digests = digests_of(folder)
    both = {**as_recorded(digests), "method.json": ("of before", digests["method.json"])}
    for recorded in (as_recorded(digests), both):  # either of two digests is good while a file is replaced
        require_undamaged(digests, recorded, what="It", where="there", remedy="")


@pytest.mark.parametrize("name", FILES)
def test_a_changed_byte_is_refused_with_both_digests(folder: Path, name: str) -> None:
    before = digests_of(folder)
    (folder / name).write_bytes(b"x" + FILES[name][1:])
    assert refusal(folder, as_recorded(before)) == (
        f"Version 2 of 'l' is damaged and was not used: in file:///x {name} has sha256 {digests_of(folder)[name]}, "
        f"recorded is {before[name]}. Do this."
    )


def test_a_missing_file_and_one_that_was_not_recorded_are_damage(folder: Path) -> None:
    before = digests_of(folder)
    assert refusal(folder, {}, PEFT_FILES).count("no such file is recorded") == 2
    (folder / "adapter_model.safetensors").unlink()
    (folder / "method.safetensors").write_bytes(b"planted")
    missing, planted = refusal(folder, as_recorded(before)).split("; ")
    assert f"adapter_model.safetensors is missing, recorded is sha256 {before['adapter_model.safetensors']}" in missing
    assert planted.startswith("method.safetensors has sha256") and "no such file is recorded" in planted


def test_files_that_the_caller_does_not_read_do_not_count(folder: Path) -> None:
    recorded = as_recorded(digests_of(folder))
    (folder / "method.json").write_bytes(b"damaged")
    require_undamaged(digests_of(folder, PEFT_FILES), recorded, PEFT_FILES, what="It", where="there", remedy="")
    assert "method.json has sha256" in refusal(folder, recorded)
