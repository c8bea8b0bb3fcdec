"""Versions on an S3 server: a long lineage takes few requests, and of writers at once each gets a number of its own."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from deal_core.errors import StoreError
from infra.settings import StoreSettings
from infra.store import keys
from infra.store.folders import MAX_REQUESTS
from infra.store.local import open_store
from infra.store.s3 import S3Store
from infra.versions import Versions
from tests.stored_versions import move, put_version, run_key, unregistered, version

NUM_VERSIONS, NUM_MOVES = 1000, 20
MOST = 20


@pytest.fixture
def store(s3_server: str) -> S3Store:
    """An empty store in a new bucket."""
    settings = {"s3_endpoint_url": s3_server, "s3_access_key_id": "somebody", "s3_secret_access_key": "secret"}
    found = open_store("s3://team/store", StoreSettings.model_validate({**settings, "s3_region": "us-east-1"}))
    assert isinstance(found, S3Store)
    found.client.create_bucket(Bucket=found.bucket)
    return found


@pytest.fixture
def requests(store: S3Store) -> Iterator[list[str]]:
    """The names of the operations that were sent to the server."""
    sent: list[str] = []

    def count(model: Any, **_: Any) -> None:
        sent.append(model.name)

    store.client.meta.events.register("before-call.s3", count)
    yield sent
    store.client.meta.events.unregister("before-call.s3", count)


def test_a_lineage_of_a_thousand_versions_is_read_with_few_requests(store: S3Store, requests: list[str]) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: put_version(store, version(number, accepted=True)), range(1, NUM_VERSIONS + 1)))
    for number in range(1, NUM_MOVES + 1):
        move(store, str(number))
    versions = Versions(store)
    first = versions.all("l")  # reads each object once, and writes the index
    assert len(first) == NUM_VERSIONS and first[NUM_MOVES - 1].aliases == ("champion",)
    requests.clear()
    assert versions.all("l") == first
    assert len(requests) <= 6, requests

    for number in range(NUM_VERSIONS + 1, NUM_VERSIONS + 2 * MAX_REQUESTS + 2):  # one at a time, as adaptations do
        put_version(store, version(number, accepted=True))
        move(store, str(number))
        requests.clear()
        champion = versions.champion("l")
        assert champion is not None and champion.version == str(number)
        assert len(requests) <= MOST, requests
    whole = versions.all("l")

    for damage in (
        None,
        b"",
        store.get_bytes(keys.index_key("versions/l")).replace(b"gate", b"Gate").replace(b"7", b"8"),
    ):
        for folder in ("versions/l", "promotions/l"):
            store.delete(keys.index_key(folder))
            if damage is not None:
                store.put_bytes(keys.index_key(folder), damage)
        assert versions.all("l") == whole
        requests.clear()
        assert versions.all("l") == whole and len(requests) <= 6, "it was written again"


def test_writers_at_once_get_different_numbers_and_a_run_one_version(store: S3Store) -> None:
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda number: Versions(store).register(unregistered(number % 8)), range(16)))
    registered = {each.run_key: each.version for each in Versions(store).all("l")}
    assert registered == {each.run_key: each.version for each in made} and len(registered) == 8
    assert sorted(map(int, registered.values())) == list(range(1, 9)) and run_key(3) in registered


def test_a_store_that_does_not_answer_is_no_lineage_without_versions(store: S3Store) -> None:
    put_version(store, version(1))
    store.bucket = "nobody"
    with pytest.raises(StoreError, match="NoSuchBucket"):
        Versions(store).all("l")
