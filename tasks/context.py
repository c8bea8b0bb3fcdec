"""What the stages reach the outside world through, made from the environment where it is needed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote, urlsplit

from deal_core.errors import StoreError
from infra.settings import HomeSettings, StoreSettings
from infra.store.base import ObjectStore
from infra.store.local import FileStore
from infra.store.open import open_store
from infra.temporary import temporary_folder
from tasks.lineage.version_files import CONFIG, reading_beside, require_readable


def current_store() -> ObjectStore:
    """The object store that the environment names."""
    settings = StoreSettings()
    return open_store(settings.store_uri, settings)


def work_folder(lineage: str, short_key: str) -> Path:
    """Where a run keeps its checkpoints and results until it is registered; found again by its key after a crash."""
    return HomeSettings().home / "work" / lineage / short_key


@contextmanager
def borrowed_folder(store: ObjectStore, uri: str) -> Iterator[Path]:
    """A local copy of an adapter's folder in the store, gone afterwards; `tasks.lineage.adapters` compares it with its digests.

    Raises:
        ObjectNotFoundError: its configuration or weights are missing.
        StoreError: they are damaged.
    """
    with temporary_folder() as temporary:
        folder = temporary / "folder"
        with reading_beside(store, uri, CONFIG):
            store.download_folder(uri, folder)
        require_readable(store, uri, folder)
        yield folder


@contextmanager
def local_file(store: ObjectStore, address: str) -> Iterator[Path]:
    """A local path of a file that is given by path, by a file:// uri, or by its full uri in the store.

    Raises:
        StoreError: the uri is of another store, nothing is there, or a link leads out of its top folder.
    """
    root = store.uri.rstrip("/") + "/"
    if not address.startswith(root):
        yield _outside_store(address, store)
        return
    key = address.removeprefix(root)
    if isinstance(store, FileStore):  # a file of gigabytes need not be copied
        yield store.path_of(key)
        return
    with temporary_folder() as temporary:
        path = temporary / key.rsplit("/", 1)[-1]
        store.download_file(key, path)
        yield path


def _outside_store(address: str, store: ObjectStore) -> Path:
    if "://" not in address:
        return Path(address)
    parts = urlsplit(address)
    if parts.scheme != "file":
        raise StoreError(f"{address} is not in the store {store.uri}; give a local path, or set DEAL_STORE_URI.")
    return Path(unquote(parts.path))
