"""Reads a whole folder of small objects that are written once, with an index that saves most requests.

The index of a folder has the content of its objects by key and ETag, and its own digest before that. The objects are
the truth: an object that the index lacks, or has with another ETag, is read. So the index can be deleted at any time.
"""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from deal_core.errors import StoreError
from infra.store import keys
from infra.store.base import ObjectInfo, ObjectNotFoundError, ObjectStore, UnusableObjectError

MAX_REQUESTS = 5
"""Objects that are read one by one. A reader that needs more of them uses the index, or writes it anew.

So two folders of 1,000 objects, versions and promotions, take at most 20 requests while both grow.
"""
_READERS = 8


def read_folder(store: ObjectStore, folder: str) -> dict[str, bytes]:
    """Return the content of every object below a folder, by key, in the order of the keys.

    Reading 1,000 objects takes the listing, the index and at most MAX_REQUESTS objects.

    Raises:
        StoreError: The store does not answer.
    """

    def read(info: ObjectInfo) -> None:
        with suppress(ObjectNotFoundError):  # deleted since it was listed
            contents[info.key, info.etag] = store.get_bytes(info.key)

    infos = list(store.list(folder))
    contents = _read_index(store, folder) if len(infos) > MAX_REQUESTS else {}
    missing = [info for info in infos if (info.key, info.etag) not in contents]
    with ThreadPoolExecutor(_READERS) as readers:
        list(readers.map(read, missing))
    present = [info for info in infos if (info.key, info.etag) in contents]
    if len(missing) > MAX_REQUESTS:
        entries = {
            info.key: (info.etag, contents[info.key, info.etag].decode("utf-8", "surrogateescape")) for info in present
        }
        body = json.dumps(entries).encode()
        with suppress(StoreError):  # a reader may have no right to write
            store.put_bytes(keys.index_key(folder), _digest(body) + b"\n" + body)
    return {info.key: contents[info.key, info.etag] for info in present}


def _read_index(store: ObjectStore, folder: str) -> dict[tuple[str, str], bytes]:
    """Return content by key and ETag; empty if there is no index, or a damaged one: it is written again."""
    try:
        digest, _, body = store.get_bytes(keys.index_key(folder)).partition(b"\n")
    except (ObjectNotFoundError, UnusableObjectError):
        return {}
    if digest != _digest(body):
        return {}
    return {(key, etag): text.encode("utf-8", "surrogateescape") for key, (etag, text) in json.loads(body).items()}


def _digest(body: bytes) -> bytes:
    return hashlib.sha256(body).hexdigest().encode()
