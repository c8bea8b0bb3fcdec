"""The digest of an adapter, and missing or planted files; for changed bytes see test_version_files_digests.py."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from deal_core.adapter.files import (
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


def test_a_missing_file_and_one_that_was_not_recorded_are_damage(folder: Path) -> None:
    before = digests_of(folder)
    (folder / "adapter_model.safetensors").unlink()
    (folder / "method.safetensors").write_bytes(b"planted")
    for recorded, num_damaged in ((as_recorded(before), 2), ({}, 3)):
        with pytest.raises(IntegrityError) as refused:
            require_undamaged(digests_of(folder), recorded, what="It", where="there", remedy="")
        assert str(refused.value).count(";") == num_damaged - 1, "each damaged file is named"
