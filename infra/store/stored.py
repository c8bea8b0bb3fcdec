"""Small JSON files of the store: models with a schema version, all read, written and refused in one way.

A file that several processes change is changed by `update_stored`, which loses no change.

A folder of files that are written once is read with an index, which saves most requests. The index has the content of
the files by key and ETag, and its own digest before that. The files are the truth: one that the index lacks, or has
with another ETag, is read. So the index can be deleted at any time.
"""

from __future__ import annotations

import hashlib
import json
import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from deal_core.errors import DataValidationError, StoreError
from deal_core.safe_text import without_secrets
from deal_core.schema_version import first_problem, require_schema_version
from infra.store import keys
from infra.store.base import ObjectInfo, ObjectNotFoundError, ObjectStore, UnusableObjectError

BREAK_READERS = (ValueError, KeyError, TypeError, AttributeError, RecursionError)
"""The errors that damaged JSON can raise in its reader."""
MAX_REQUESTS = 5
"""Files of a folder that are read one by one. A reader that needs more of them uses the index, or writes it anew.

So two folders of 1,000 files, versions and promotions, take at most 20 requests while both grow.
"""
_READERS = 8
MAX_CONFLICTS = 1000
"""How often a change is made again because another writer was faster."""


class Stored(BaseModel):
    """Base of the models that lie in the store as a file of their own."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    NOT_STORED: ClassVar[frozenset[str]] = frozenset()
    """Fields that its reader sets, from other files."""

    schema_version: Literal[1] = 1


Model = TypeVar("Model", bound=Stored)


def read_stored(store: ObjectStore, key: str, model: type[Model], *, what: str, remedy: str) -> Model | None:
    """Read the file under `key`; None: there is none. `what`, `remedy` and errors are those of `reading_stored`."""
    try:
        content = store.get_bytes(key)
    except ObjectNotFoundError:
        return None
    with reading_stored(store, key, what, remedy):
        return parse_stored(content, model)


def parse_stored(content: bytes, model: type[Model]) -> Model:
    """Return the model with this content.

    Raises:
        StoreError: Another release wrote it.
        ValueError: It is damaged; `reading_stored` says so in a message, and turns the other errors into one too.
    """
    values = json.loads(content)
    require_schema_version(values, 1, "the file", StoreError)
    return model.model_validate(values)


def write_stored(store: ObjectStore, key: str, stored: Stored, *, if_absent: bool = False) -> bool:
    """Write a file, in place of a present one. With `if_absent` a present one stays, and the answer is False."""
    return store.put_bytes(key, _as_json(stored), if_absent=if_absent)


def _as_json(stored: Stored) -> bytes:
    return (stored.model_dump_json(indent=2, exclude=set(stored.NOT_STORED)) + "\n").encode()


def update_stored(
    store: ObjectStore, key: str, model: type[Model], change: Callable[[Model], Model], *, what: str, remedy: str
) -> Model:
    """Change the file under `key`, and lose no change of another process. Return its new content.

    `change` is a function of the present content alone (without a file: of the model's defaults). If another process
    writes meanwhile, `change` is called again with what that has written. What does not change is not written.

    Raises:
        StoreError: The store does not answer, the file is damaged, or others write without end.
    """
    for number in range(MAX_CONFLICTS):
        try:
            content, tag = store.get_tagged(key)
        except ObjectNotFoundError:
            before, tag = model(), None
        else:
            with reading_stored(store, key, what, remedy):
                before = parse_stored(content, model)
        after = change(before)
        data = _as_json(after)
        if after == before or (
            store.put_bytes(key, data, if_absent=True) if tag is None else store.replace_bytes(key, data, tag)
        ):
            return after
        time.sleep(random.uniform(0, min(0.001 * 2**number, 0.1)))  # so that two writers do not meet again and again
    raise StoreError(f"Other processes write {key!r} in {store.uri} all the time; try again.", code="store-conflict")


@contextmanager
def reading_stored(store: ObjectStore, key: str, what: str, remedy: str) -> Iterator[None]:
    """Turn the errors of a block that reads a stored file into one error.

    The message contains `what`, a name for the file, and `remedy`, which also tells what still works.

    Raises:
        ObjectNotFoundError: The file is missing.
        StoreError: The file is damaged, or another release wrote it.
    """
    address = without_secrets(store.uri_of(key))
    try:
        yield
    except ObjectNotFoundError:
        raise ObjectNotFoundError(f"{address}, {what}, is missing. {remedy}") from None
    except (StoreError, DataValidationError) as error:  # another release wrote the file, or the store does not answer
        raise StoreError(f"{address}, {what}, cannot be used: {error} {remedy}") from error
    except ValidationError as error:
        raise StoreError(f"{address}, {what}, is damaged ({first_problem(error)}). {remedy}") from None
    except BREAK_READERS as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
        raise StoreError(f"{address}, {what}, is damaged ({reason}). {remedy}") from error


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
