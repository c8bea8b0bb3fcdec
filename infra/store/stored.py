"""Small JSON files of the store: models with a schema version, all read, written and refused in one way."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from deal_core.errors import DataValidationError, StoreError
from deal_core.safe_text import without_secrets
from deal_core.schema_version import first_problem, require_schema_version
from infra.store.base import ObjectNotFoundError, ObjectStore

BREAK_READERS = (ValueError, KeyError, TypeError, AttributeError, RecursionError)
"""The errors that damaged JSON can raise in its reader."""


class Stored(BaseModel):
    """Base of the models that lie in the store as a file of their own."""

    model_config = ConfigDict(frozen=True, extra="forbid")

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


def write_stored(store: ObjectStore, key: str, stored: Stored) -> None:
    """Write a file, in place of a present one."""
    store.put_bytes(key, (stored.model_dump_json(indent=2) + "\n").encode())


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
