"""The files beside a version's adapter: what is damaged or missing is named, with its version and what still works."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open

from deal_core.adapter.files import CONFIG_FILE, METHOD_FILE, METHOD_TENSORS_FILE, PEFT_FILES, WEIGHTS_FILE
from deal_core.errors import DataValidationError, DealError, StoreError
from deal_core.masking import without_secrets
from infra.promotions import PromotionLog
from infra.store.base import ObjectNotFoundError, ObjectStore, temporary_folder
from infra.store.keys import lineage_of
from infra.tracking.registry import open_registry
from infra.version_log import VersionLog

NEEDED_IN_CONFIG = {"peft_type", "r", "lora_alpha", "target_modules"}
MAX_HEADER_BYTES = 100_000_000
"""safetensors reads no longer ones."""
BREAK_READERS = (ValueError, KeyError, TypeError, AttributeError, RecursionError)
"""What a reader of JSON raises where that is damaged."""


@contextmanager
def reading_stored(store: ObjectStore, key: str, what: str, remedy: str) -> Iterator[None]:
    """Turn what a damaged file of the store does to its reader into one error.

    Args:
        store: holds the file.
        key: where the file lies.
        what: what it is.
        remedy: what to do, and what still works.

    Raises:
        ObjectNotFoundError: it is missing.
        StoreError: it is damaged, or another release wrote it.
    """
    address = without_secrets(store.uri_of(key))
    try:
        yield
    except ObjectNotFoundError:
        raise ObjectNotFoundError(f"{address}, {what}, is missing. {remedy}") from None
    except (StoreError, DataValidationError) as error:  # written by another release, or the store does not answer
        raise StoreError(f"{address}, {what}, cannot be used: {error} {remedy}") from error
    except BREAK_READERS as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
        raise StoreError(f"{address}, {what}, is damaged ({reason}). {remedy}") from error


@contextmanager
def reading_beside(store: ObjectStore, adapter_uri: str, name: str) -> Iterator[None]:
    """As `reading_stored`, for a file beside an adapter; the error names the version.

    Args:
        store: holds the adapter.
        adapter_uri: the adapter's folder.
        name: the file's name.
    """
    try:
        yield
    except (StoreError, *BREAK_READERS) as error:
        what, remedy = _described(store, adapter_uri)
        with reading_stored(store, f"{adapter_uri}/{name}", what, remedy):
            raise error


def require_readable(store: ObjectStore, adapter_uri: str, folder: Path) -> None:
    """Refuse the local copy of an adapter's folder where its configuration or weights are missing or damaged.

    Args:
        store: where the copy is from.
        adapter_uri: likewise.
        folder: the copy.

    Raises:
        ObjectNotFoundError: a file is missing.
        StoreError: a file is damaged.
    """
    for name in PEFT_FILES:
        with reading_beside(store, adapter_uri, name):
            if not (folder / name).is_file():
                raise ObjectNotFoundError(name)
    with reading_beside(store, adapter_uri, CONFIG_FILE):
        _check_config(json.loads((folder / CONFIG_FILE).read_bytes()))
    with reading_beside(store, adapter_uri, WEIGHTS_FILE):
        _open_weights(folder / WEIGHTS_FILE)


def require_readable_method(store: ObjectStore, adapter_uri: str, folder: Path) -> None:
    """Refuse the local copy of an adapter's folder where its method's state is damaged, which training goes on from.

    Raises:
        StoreError: it is damaged.
    """
    if (folder / METHOD_FILE).is_file():
        with reading_beside(store, adapter_uri, METHOD_FILE):
            _require_object(json.loads((folder / METHOD_FILE).read_bytes()))
    if (folder / METHOD_TENSORS_FILE).is_file():
        with reading_beside(store, adapter_uri, METHOD_TENSORS_FILE):
            _open_weights(folder / METHOD_TENSORS_FILE)


def require_stored(store: ObjectStore, adapter_uri: str) -> None:
    """Refuse an adapter of the store whose configuration or weights are missing or damaged; no weights are fetched.

    Of the weights the header is read: it says how long the file has to be.

    Raises:
        ObjectNotFoundError: a file is missing.
        StoreError: a file is damaged.
    """
    with reading_beside(store, adapter_uri, CONFIG_FILE):
        _check_config(json.loads(store.get_bytes(f"{adapter_uri}/{CONFIG_FILE}")))
    with reading_beside(store, adapter_uri, WEIGHTS_FILE):
        _check_header(store, f"{adapter_uri}/{WEIGHTS_FILE}")


def _require_object(values: object) -> dict[str, object]:
    if not isinstance(values, dict):
        raise ValueError("it is no JSON object")
    return values


def _check_config(values: object) -> None:
    missing = NEEDED_IN_CONFIG - _require_object(values).keys()
    if missing:
        raise ValueError(f"it lacks {', '.join(sorted(missing))}")


def _check_header(store: ObjectStore, key: str) -> None:
    """Check a safetensors file of the store by its header and its size, in a file that is empty but for the header."""
    info = store.find(key)
    if info is None:
        raise ObjectNotFoundError(key)
    num_bytes = 8 + int.from_bytes(store.get_bytes(key, at_most=8), "little")
    if not 8 < num_bytes <= min(info.size, MAX_HEADER_BYTES):
        raise ValueError(f"its {info.size} bytes have no safetensors header")
    with temporary_folder() as folder:
        path = folder / WEIGHTS_FILE
        with path.open("wb") as file:
            file.write(store.get_bytes(key, at_most=num_bytes))
            file.truncate(info.size)
        _open_weights(path)


def _open_weights(path: Path) -> None:
    try:
        with safe_open(path, framework="numpy"):
            pass
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{error}; it has {path.stat().st_size} bytes") from None


def _described(store: ObjectStore, adapter_uri: str) -> tuple[str, str]:
    """Which version a file beside this adapter is of, and what to do where it is damaged."""
    lineage = lineage_of(adapter_uri)
    restore, history = "Restore it from a backup of the store.", f"deal history --lineage {lineage}"
    number, is_champion = _number_of(store, lineage, adapter_uri)
    if number is None:
        return (
            f"a file of an adapter of '{lineage}'", f"{restore} Other versions work without it; {history} lists them."
        )  # fmt: skip
    if is_champion:
        return (
            f"a file of version {number}, champion of '{lineage}'",
            f"{restore} Other versions still work: go back to one with deal rollback --to N --lineage {lineage}, or "
            f"ask one with deal predict --version N; {history} lists them.",
        )
    return (
        f"a file of version {number} of '{lineage}'",
        f"{restore} The champion, the other versions and {history} work without it.",
    )


def _number_of(store: ObjectStore, lineage: str, adapter_uri: str) -> tuple[str | None, bool]:
    """The number of the version that an adapter is of, by the store or the registry, and whether it is champion."""
    log = VersionLog(store)
    try:
        stored = [log.read(lineage, number) for number in log.numbers(lineage)]
        found = next((each.version for each in stored if each.facts.adapter_uri == adapter_uri), None)
        if found is None:
            versions = open_registry().versions(lineage)
            found = next((each.version for each in versions if each.adapter_uri == adapter_uri), None)
        last = PromotionLog(store).last(lineage)
    except DealError:
        return None, False
    return found, found is not None and last is not None and last.champion == found
