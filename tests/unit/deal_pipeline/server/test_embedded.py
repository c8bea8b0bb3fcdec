"""What a command uses: a damaged database of Prefect is named before anything waits for it."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from deal_pipeline.server.embedded import DatabaseError, require_database, start_api

PAGE = 4096
DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda data: data[: len(data) // 2],
    "truncated within its first page": lambda data: data[:1000],
    "zeroed": lambda data: bytes(len(data)),
    "zeroed at its end": lambda data: data[: len(data) // 2] + bytes(len(data) - len(data) // 2),
    "zeroed at its begin": lambda data: bytes(PAGE) + data[PAGE:],
    "garbage": lambda data: b"no database " * (len(data) // 12),
    "garbage after its header": lambda data: data[:100] + b"\xa5" * (len(data) - 100),
}


@pytest.fixture
def database(tmp_path: Path, prefect_database: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Prefect's database in a folder whose name has blanks and signs."""
    file = tmp_path / "my home 100% #1" / "prefect.db"
    file.parent.mkdir()
    shutil.copy(prefect_database, file)
    monkeypatch.setenv("PREFECT_API_DATABASE_CONNECTION_URL", f"sqlite+aiosqlite:///{file}")
    return file


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_database_is_named(database: Path, damage: str) -> None:
    database.write_bytes(DAMAGES[damage](database.read_bytes()))
    with pytest.raises(DatabaseError) as refused:
        require_database()
    assert refused.value.code == "prefect-database" and f"{database} is damaged" in str(refused.value)


def test_no_command_starts_an_api_on_a_damaged_database(database: Path) -> None:
    """Prefect would try it again for minutes."""
    database.write_bytes(DAMAGES["truncated"](database.read_bytes()))
    with temporary_settings(restore_defaults={PREFECT_API_URL}), pytest.raises(DatabaseError):
        start_api()


def test_a_whole_database_an_empty_one_and_one_in_use_pass(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require_database()
    with closing(sqlite3.connect(database)) as other:
        other.execute("BEGIN EXCLUSIVE")
        require_database()
    database.write_bytes(b"")
    require_database()
    database.unlink()
    require_database()
    monkeypatch.setenv("PREFECT_API_DATABASE_CONNECTION_URL", "postgresql+asyncpg://db/prefect")
    require_database()
