"""The format of a store, which says what release can open it.

`format.json` names the format. A store gets the file before the first version is written into it. Release 0.2 wrote no
such file, so a store that has versions and lacks the file is of that release. Release 0.3 wrote format 3.
"""

from __future__ import annotations

import json
import operator

from deal_core.errors import ConfigError
from deal_core.safe_text import without_secrets
from infra.store import keys
from infra.store.base import ObjectNotFoundError, ObjectStore
from infra.store.stored import reading_stored

FORMAT = 4
"""The one format that this release reads and writes."""


class FormatError(ConfigError):
    """The store has the format of another release."""

    code = "store-format"


def require_format(store: ObjectStore) -> None:
    """Refuse a store that another release made. A store without versions is new. Nothing is written.

    Raises:
        FormatError: The store has another format.
        StoreError: The store does not answer, or `format.json` is damaged.
    """
    try:
        content = store.get_bytes(keys.FORMAT_FILE)
    except ObjectNotFoundError:
        if any(True for folder in (keys.VERSIONS, keys.PROMOTIONS, keys.ADAPTERS) for _ in store.list(folder)):
            raise _other_release(store, "release 0.2", "deal-pipeline 0.2") from None
        return
    with reading_stored(store, keys.FORMAT_FILE, "the format of the store", "Restore it from a backup of the store."):
        number = operator.index(json.loads(content)["format"])  # later releases may say more there
    if number == 3:
        raise _other_release(store, "release 0.3", "deal-pipeline 0.3")
    if number != FORMAT:
        raise _other_release(store, f"a release with format {number}", "the release that made it")


def _other_release(store: ObjectStore, maker: str, way_on: str) -> FormatError:
    return FormatError(
        f"{without_secrets(store.uri)} was made by {maker}, and this release opens format {FORMAT} alone: go on with "
        f"{way_on}, or start a new home (--home DIR, or another DEAL_STORE_URI) and adapt your files again."
    )


def write_format(store: ObjectStore) -> None:
    """Write `format.json` if there is none. Call this before anything of a version is written.

    Raises:
        FormatError: The store has another format.
    """
    content = json.dumps({"format": FORMAT}).encode() + b"\n"
    if not store.put_bytes(keys.FORMAT_FILE, content, if_absent=True):
        require_format(store)
