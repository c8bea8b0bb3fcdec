"""What killed processes have left here is found once it is old, and what is in use is not."""

from __future__ import annotations

import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from infra.store.base import temporary_folder
from infra.store.local import FileStore
from tasks.housekeeping.inventory import find_leftovers, remove_local


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FileStore:
    monkeypatch.setenv("DEAL_HOME", str(tmp_path / "home"))
    return FileStore(tmp_path / "store")


def later(hours: int = 25) -> datetime:
    return datetime.now(UTC) + timedelta(hours=hours)


def test_a_temporary_folder_is_the_users_own_and_goes_with_its_use(store: FileStore, tmp_path: Path) -> None:
    with temporary_folder() as folder:
        assert folder.parent == tmp_path / "home" / "tmp"
        assert folder.stat().st_mode & 0o077 == 0
        (folder / "rows").write_text("x")
    assert list((tmp_path / "home" / "tmp").iterdir()) == []


def test_what_was_left_for_a_day_is_found_and_removed_and_the_store_is_whole(store: FileStore, tmp_path: Path) -> None:
    assert find_leftovers(store, later()) == []
    store.put_bytes("inbox/a", b"rows")
    part = store.root / ".incoming" / "0123"
    part.write_bytes(b"ro")
    temporary = tmp_path / "home" / "tmp" / "x"
    (temporary / "folder").mkdir(parents=True)
    (temporary / "folder" / "rows").write_bytes(b"rows")
    assert find_leftovers(store, later(23)) == []
    found = find_leftovers(store, later())
    assert [(each.address, each.num_bytes) for each in found] == [(str(temporary), 4), (str(part), 2)]
    for each in found * 2:
        remove_local(each.address)
    assert find_leftovers(store, later()) == [] and store.get_bytes("inbox/a") == b"rows"


def test_what_is_still_written_to_is_not_left(store: FileStore, tmp_path: Path) -> None:
    folder = tmp_path / "home" / "tmp" / "x"
    folder.mkdir(parents=True)
    (folder / "rows").write_text("new")
    os.utime(folder, (0, 0))
    assert find_leftovers(store, later(23)) == []
    os.utime(folder / "rows", (0, 0))
    assert len(find_leftovers(store, later(0))) == 1
