"""What says which release made a store, and what another release's store is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deal_core.errors import StoreError
from infra.store.format import FORMAT, FormatError, require_format, write_format
from infra.store.local import FileStore
from infra.store.opening import open_store


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FileStore:
    """A folder that is no store yet, and that the environment names."""
    monkeypatch.setenv("DEAL_STORE_URI", (tmp_path / "store").as_uri())
    return FileStore(tmp_path / "store")


def test_a_new_store_is_opened_and_not_written(store: FileStore, tmp_path: Path) -> None:
    require_format(store)
    assert list(tmp_path.iterdir()) == []
    for key in ("inbox/bank/may.csv", "lineages/support.yaml"):  # a person put them there before the first run
        store.put_bytes(key, b"x")
    require_format(store)
    assert [info.key for info in store.list()] == ["inbox/bank/may.csv", "lineages/support.yaml"]


@pytest.mark.parametrize(
    "key", ["versions/l/00000001.json", "promotions/l/00000001.json", "adapters/l/0123456789abcdef/record.json"]
)
def test_a_store_with_versions_and_without_a_format_is_of_an_older_release(store: FileStore, key: str) -> None:
    store.put_bytes(key, b"{}")
    for _ in range(2):  # a refusal is not remembered as a permission
        with pytest.raises(FormatError) as caught:
            open_store()
    message = str(caught.value)
    assert caught.value.code == "store-format" and message.count(". ") == 0
    assert message.startswith(f"{store.uri} was made by release 0.2") and "--home" in message


def test_a_marked_store_is_opened_whatever_it_holds(store: FileStore) -> None:
    write_format(store)
    write_format(store)
    store.put_bytes("versions/l/00000001.json", b"{}")
    require_format(store)
    assert json.loads(store.get_bytes("format.json")) == {"format": FORMAT}


@pytest.mark.parametrize("number", [FORMAT + 1, FORMAT - 1, 1])
def test_another_format_is_refused_also_where_it_was_written_meanwhile(store: FileStore, number: int) -> None:
    content = json.dumps({"format": number, "of a later release": True}).encode()
    store.put_bytes("format.json", content)
    for use in (require_format, write_format):
        with pytest.raises(FormatError) as caught:
            use(store)
        assert caught.value.code == "store-format"
    assert store.get_bytes("format.json") == content


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"format": "three"}'])
def test_a_damaged_format_is_named(store: FileStore, content: bytes) -> None:
    store.put_bytes("format.json", content)
    with pytest.raises(StoreError, match=r"format\.json, the format of the store, is damaged .*from a backup"):
        require_format(store)
