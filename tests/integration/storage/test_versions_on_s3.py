"""Versions on an S3 server: a long lineage takes few requests, and of writers at once each gets a number of its own."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest

from deal_core.errors import StoreError
from infra.settings import StoreSettings
from infra.store.opening import store_at
from infra.store.s3 import S3Store
from infra.store.stored import MAX_REQUESTS
from infra.versions import Versions
from tests.stored_versions import move, put_version, run_key, unregistered, version

NUM_MOVES = 20
AGAIN, MOST = 6, 20
"""Requests of a reading when nothing has changed, and of one while versions are added."""


@pytest.fixture
def store(s3_server: str) -> S3Store:
    """An empty store in a new bucket."""
    settings = {"s3_endpoint_url": s3_server, "s3_access_key_id": "somebody", "s3_secret_access_key": "secret"}
    address = f"s3://bucket-{uuid.uuid4().hex}/store"  # all servers of a process share their buckets
    found = store_at(address, StoreSettings.model_validate({**settings, "s3_region": "us-east-1"}))
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


@pytest.mark.parametrize("num_versions", [40, pytest.param(1000, marks=pytest.mark.nightly)])
def test_a_long_lineage_is_read_with_few_requests(store: S3Store, requests: list[str], num_versions: int) -> None:
    with ThreadPoolExecutor(8) as pool:
        made = [version(number, accepted=True) for number in range(1, num_versions + 1)]
        stored = list(pool.map(partial(put_version, store), made))
    for number in range(1, NUM_MOVES + 1):
        move(store, str(number))
    versions = Versions(store)
    first = versions.all("l")  # reads each object once, and writes the index
    assert len(first) == len(stored) and first[NUM_MOVES - 1].aliases == ("champion",)
    requests.clear()
    assert versions.all("l") == first
    assert len(requests) <= AGAIN, requests

    for number in range(num_versions + 1, num_versions + MAX_REQUESTS + 3):  # one at a time, as adaptations do
        put_version(store, version(number, accepted=True))
        move(store, str(number))
        requests.clear()
        champion = versions.champion("l")
        assert champion is not None and champion.version == str(number)
        assert len(requests) <= MOST, requests


def test_writers_at_once_get_different_numbers_and_a_run_one_version(store: S3Store) -> None:
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda number: Versions(store).register(unregistered(number % 4)), range(8)))
    registered = {each.run_key: each.version for each in Versions(store).all("l")}
    assert registered == {each.run_key: each.version for each in made} and len(registered) == 4
    assert sorted(map(int, registered.values())) == list(range(1, 5)) and run_key(3) in registered


def test_a_store_that_does_not_answer_is_no_lineage_without_versions(store: S3Store) -> None:
    put_version(store, version(1))
    store.bucket = "nobody"
    with pytest.raises(StoreError, match="NoSuchBucket"):
        Versions(store).all("l")
