"""A folder of small objects, read with an index: the objects are the truth, whatever the index says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from deal_core.errors import StoreError
from infra.store.local import FileStore
from infra.store.stored import MAX_REQUESTS, read_folder

INDEX = "index/versions/l.json"


class CountingStore(FileStore):
    """A folder store that knows which objects were read."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.read: list[str] = []

    def get_bytes(self, key: str, *, at_most: int | None = None) -> bytes:
        self.read.append(key)
        return super().get_bytes(key, at_most=at_most)


@pytest.fixture
def store(tmp_path: Path) -> CountingStore:
    """A store with a folder of thirty objects, which was read once. The content of one is no text."""
    found = CountingStore(tmp_path / "store")
    for number in range(30):
        found.put_bytes(f"versions/l/{number:08d}.json", b"\xff\x00" if number == 7 else f"content {number}".encode())
    read_folder(found, "versions/l")
    found.read.clear()
    return found


def contents(store: FileStore) -> dict[str, bytes]:
    return {info.key: (store.root / info.key).read_bytes() for info in store.list("versions/l")}


def test_the_second_reading_takes_the_index_alone(store: CountingStore) -> None:
    assert read_folder(store, "versions/l") == contents(store) and store.read == [INDEX]


def test_a_few_new_objects_are_read_and_more_of_them_renew_the_index(store: CountingStore) -> None:
    index = store.get_bytes(INDEX)
    for number in range(30, 30 + MAX_REQUESTS):
        store.put_bytes(f"versions/l/{number:08d}.json", b"new")
    store.read.clear()
    assert read_folder(store, "versions/l") == contents(store) and len(store.read) == 1 + MAX_REQUESTS
    assert store.get_bytes(INDEX) == index
    store.put_bytes("versions/l/00000099.json", b"new")
    assert read_folder(store, "versions/l") == contents(store)
    store.read.clear()
    assert read_folder(store, "versions/l") == contents(store) and store.read == [INDEX]


def test_a_replaced_object_is_read_and_a_deleted_one_is_gone(store: CountingStore) -> None:
    store.put_bytes("versions/l/00000003.json", b"replaced")
    store.delete("versions/l/00000004.json")
    assert read_folder(store, "versions/l") == contents(store)
    assert store.read == [INDEX, "versions/l/00000003.json"]


def with_another_digit(index: bytes) -> bytes:
    assert index.count(b"content 12") == 1
    return index.replace(b"content 12", b"content 21")


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda index: b"",
    "cut": lambda index: index[:-20],
    "a digit": with_another_digit,
    "another kind": lambda index: json.dumps(["no index"]).encode(),
    "without a digest": lambda index: index.partition(b"\n")[2],
    "no text": lambda index: b"\xff" + index,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_index_changes_no_result_and_is_written_again(store: CountingStore, damage: str) -> None:
    whole = store.get_bytes(INDEX)
    store.put_bytes(INDEX, DAMAGES[damage](whole))
    assert read_folder(store, "versions/l") == contents(store)
    assert store.get_bytes(INDEX) == whole


def test_who_may_not_write_reads_without_an_index(store: CountingStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **options: object) -> bool:
        raise StoreError("AccessDenied")

    store.delete(INDEX)
    monkeypatch.setattr(store, "put_bytes", refuse)
    assert read_folder(store, "versions/l") == contents(store)


def test_a_small_folder_has_no_index(tmp_path: Path) -> None:
    store = CountingStore(tmp_path / "store")
    for number in range(MAX_REQUESTS):
        store.put_bytes(f"versions/l/{number}", b"x")
    assert len(read_folder(store, "versions/l")) == MAX_REQUESTS and not store.exists(INDEX)
    assert read_folder(store, "versions/other") == {}
