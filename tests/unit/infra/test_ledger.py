"""The ledger: one entry a dataset and lineage, written once."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from deal_core.errors import StoreError
from infra.ledger import Ledger, LedgerEntry
from infra.store.local import FileStore


@pytest.fixture
def store(tmp_path: Path) -> FileStore:
    return FileStore(tmp_path / "store")


def entry(run_key: str = "r1", lineage: str = "base") -> LedgerEntry:
    return LedgerEntry(lineage=lineage, sha256="ab" * 32, task="billing", run_key=run_key, version="3")


def test_an_entry_is_found_again_in_its_own_lineage_only(store: FileStore) -> None:
    ledger = Ledger(store)
    assert ledger.find("base", "ab" * 32) is None
    assert ledger.record(entry())
    assert Ledger(store).find("base", "ab" * 32) == entry()
    assert ledger.find("other", "ab" * 32) is None
    assert ledger.find("base", "cd" * 32) is None


def test_the_first_entry_stays(store: FileStore) -> None:
    ledger = Ledger(store)
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda number: ledger.record(entry(f"run-{number}")), range(8)))
    assert sum(won) == 1
    found = ledger.find("base", "ab" * 32)
    assert found is not None and found.run_key == f"run-{won.index(True)}"
    assert not ledger.record(entry("late"))


def test_entries_carry_a_schema_version_and_another_one_is_refused(store: FileStore) -> None:
    ledger = Ledger(store)
    ledger.record(entry())
    key = f"ledger/base/{'ab' * 32}.json"
    written = json.loads(store.get_bytes(key))
    assert written["schema_version"] == 1
    store.put_bytes(key, json.dumps({**written, "schema_version": 2}).encode())
    with pytest.raises(StoreError, match="schema version 2, this release reads 1"):
        ledger.find("base", "ab" * 32)


@pytest.mark.parametrize("content", [b"", b"{", b'{"schema_version": 1}', b"[]", b"\xff"])
def test_a_damaged_entry_is_named(store: FileStore, content: bytes) -> None:
    store.put_bytes(f"ledger/base/{'ab' * 32}.json", content)
    with pytest.raises(StoreError, match="ledger"):
        Ledger(store).find("base", "ab" * 32)
