"""Full disks are recognised, and the error names the place and its free space."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from deal_core.errors import DiskFullError, RegistryError, StoreError
from infra.disk import disk_full, disk_full_unexpected, require_room

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/srv/store/x")


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize(
    "error",
    [
        FULL,
        OSError(errno.EDQUOT, "quota"),
        OSError(errno.EFBIG, "too large"),
        RuntimeError("Error while serializing: IoError(Os { code: 28, kind: StorageFull, message: '...' })"),
        RuntimeError("(sqlite3.OperationalError) database or disk is full"),
        OSError("[Errno 28] Error writing bytes to file. Detail: [errno 28] No space left on device"),
    ],
)
def test_a_full_disk_is_known_in_every_form(error: Exception) -> None:
    outer = StoreError("Cannot write")
    outer.__cause__ = error
    for each in (error, outer):
        found = disk_full(each)
        assert found is not None
        assert "is full" in str(found) and "MB are free" in str(found) and "same command again" in str(found)


@pytest.mark.usefixtures("home")
def test_the_place_is_the_file_that_could_not_be_written_and_other_failures_stay_what_they_are() -> None:
    assert "/srv/store/x" in str(disk_full(FULL))
    for error in (OSError(errno.EACCES, "Permission denied"), RegistryError("MLflow is away"), ValueError("28")):
        assert disk_full(error) is None and disk_full_unexpected(error) is None


@pytest.mark.usefixtures("home")
def test_settings_that_do_not_fit_are_no_full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEAL_S3_MAX_ATTEMPTS", "many")
    assert disk_full_unexpected(ValueError("of the settings")) is None
    assert disk_full(FULL) is not None


def test_a_folder_without_room_is_said_before_anything_begins(tmp_path: Path) -> None:
    require_room(tmp_path / "not yet there", 1)
    with pytest.raises(DiskFullError, match=r"The disk of .* is full: [\d.]+ MB are free; at least \d+ MB"):
        require_room(tmp_path, 1 << 60)


@pytest.mark.usefixtures("home")
def test_errors_that_cause_each_other_are_looked_at_once() -> None:
    first, second = ValueError("first"), ValueError("second")
    first.__cause__, second.__cause__ = second, first
    assert disk_full(first) is None
    second.__context__, second.__cause__ = FULL, None
    assert disk_full(first) is not None
