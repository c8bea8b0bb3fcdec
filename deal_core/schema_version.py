"""What is written to a file carries a schema version; what another release wrote is refused, never guessed at."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any


def require_schema_version(
    values: Any,
    reads: int | Collection[int],
    what: str,
    error: type[Exception],
    remedy: str = "use the release that wrote it",
) -> dict[str, Any]:
    """Refuse what another release wrote; return the other values.

    Args:
        values: the JSON value that was read.
        reads: the version that this release reads, or several.
        what: the file or thing, as the message names it.
        error: raised.
        remedy: what to do about it.

    Raises:
        error: `values` is no dict, or its `schema_version` is missing or another one.
    """
    known = (reads,) if isinstance(reads, int) else tuple(reads)
    found = values.get("schema_version") if isinstance(values, dict) else None
    if found not in known:
        readable = " or ".join(map(str, known))
        raise error(f"{what} has schema version {found}, this release reads {readable}; {remedy}.")
    return {name: value for name, value in values.items() if name != "schema_version"}
