"""Choose the store that an address names.

Example:
    >>> store = open_store("file:///srv/deal/store")
    >>> store.put_bytes("ledger/base/ab12.json", b"{}", if_absent=True)  # doctest: +SKIP
    True
"""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote, urlsplit

from deal_core.errors import ConfigError
from infra.settings import StoreSettings, without_password
from infra.store.base import ObjectStore
from infra.store.local import FileStore


def open_store(uri: str, settings: StoreSettings | None = None) -> ObjectStore:
    """Open the store at `uri`; nothing is written or asked for yet.

    Args:
        uri: file:///folder, s3://bucket or s3://bucket/prefix, or the plain path of a folder.
        settings: address and keys of the S3 server; read from the environment when None.

    Raises:
        ConfigError: the uri has another form, or a user or password in it.
    """
    if "://" not in uri:
        return FileStore(Path(uri))
    parts = urlsplit(uri)
    if parts.scheme == "file" and parts.netloc in ("", "localhost") and parts.path and not parts.query:
        return FileStore(Path(unquote(parts.path)))
    if parts.scheme == "s3" and parts.netloc and not {"@", ":"} & set(parts.netloc) and not parts.query:
        from infra.store.s3 import S3Store  # imported here: boto3 takes a quarter of a second

        return S3Store(parts.netloc, parts.path.strip("/"), settings or StoreSettings())
    shown = without_password(uri).partition("?")[0]  # a query may hold a token
    raise ConfigError(
        f"The store {shown!r} is neither file:///folder nor s3://bucket/prefix; set DEAL_STORE_URI to one, without '?' "
        "and without keys: those of S3 go into DEAL_S3_ACCESS_KEY_ID and DEAL_S3_SECRET_ACCESS_KEY."
    )
