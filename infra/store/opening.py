"""Open the store of the present place, or the one at an address."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote, urlsplit

from deal_core.errors import ConfigError
from deal_core.safe_text import without_secrets
from infra.settings import StoreSettings
from infra.store.base import ObjectStore
from infra.store.format import require_format
from infra.store.local import FileStore

_readable: set[tuple[str | None, str]] = set()
"""Pairs of an S3 server and a store's address whose format this process can read."""


def open_store() -> ObjectStore:
    """Open the store of the present place (`infra.settings.at_place`). Its format is read once per process.

    Entry points call it: a flow, a stage, a command, `Home.opened`, a process of a server, a benchmark. They hand the
    store on, so the signature of every other function says whether the function reads or writes a store.

    Raises:
        ConfigError: The address is not valid, or another release made the store (`FormatError`).
        StoreError: The store does not answer.
    """
    settings = StoreSettings()
    store = store_at(settings.store_uri, settings)
    key = (settings.s3_endpoint_url, store.uri)
    if key not in _readable:
        require_format(store)
        _readable.add(key)
    return store


def store_at(uri: str, settings: StoreSettings | None = None) -> ObjectStore:
    """Return the store at `uri`: file:///folder, s3://bucket, s3://bucket/prefix, or the path of a folder.

    Nothing is read or written yet. `settings` have the S3 server's address and keys; None: those of the environment.

    Raises:
        ConfigError: The uri has another form, or it contains a user or a password.
    """
    if "://" not in uri:
        return FileStore(Path(uri))
    parts = urlsplit(uri)
    if parts.scheme == "file" and parts.netloc in ("", "localhost") and parts.path and not parts.query:
        return FileStore(Path(unquote(parts.path)))
    if parts.scheme == "s3" and parts.netloc and not {"@", ":"} & set(parts.netloc) and not parts.query:
        from infra.store.s3 import S3Store  # here, because the import of boto3 takes a quarter of a second

        return S3Store(parts.netloc, parts.path.strip("/"), settings or StoreSettings())
    shown = without_secrets(uri).partition("?")[0]  # a query may contain a token
    raise ConfigError(
        f"The store {shown!r} is neither file:///folder nor s3://bucket/prefix; set DEAL_STORE_URI to one, without '?' "
        "and without keys: those of S3 go into DEAL_S3_ACCESS_KEY_ID and DEAL_S3_SECRET_ACCESS_KEY."
    )
