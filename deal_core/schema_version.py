"""What is written to a file carries a schema version; what another release wrote is refused, never guessed at."""

from __future__ import annotations

from collections.abc import Collection
from functools import cache
from typing import Any, ClassVar, NamedTuple, Self

from pydantic import ConfigDict, TypeAdapter, ValidationError


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


class Kept(NamedTuple):
    """How a class is kept: what its JSON is called in messages, and which versions of it there are."""

    what: str
    """The file or thing, as a message names it."""
    error: type[Exception]
    """Raised where another release wrote it."""
    version: int
    """Written."""
    reads: tuple[int, ...] = ()
    """Read; empty: the one that is written."""
    remedy: str = "use the release that wrote it"


class VersionedJson:
    """Base of the frozen dataclasses that are kept as JSON, with a schema version before their fields."""

    kept: ClassVar[Kept]
    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    def to_json(self) -> dict[str, Any]:
        """Plain values for `json.dumps`, which `from_json` reads back."""
        fields: dict[str, Any] = self._adapter().dump_python(self, mode="json")
        return fields if "schema_version" in fields else {"schema_version": self.kept.version, **fields}

    @classmethod
    def from_json(cls, values: Any) -> Self:
        """Read what `to_json` gave.

        Raises:
            Exception: `kept.error` where another release wrote it.
            ValueError: it is damaged.
        """
        kept = cls.kept
        fields = require_schema_version(values, kept.reads or kept.version, kept.what, kept.error, kept.remedy)
        try:
            read: Self = cls._adapter().validate_python(fields)
        except ValidationError as error:
            raise _in_its_own_words(kept.what, error) from None
        return read

    @classmethod
    @cache
    def _adapter(cls) -> TypeAdapter[Any]:
        return TypeAdapter(cls)


def _in_its_own_words(what: str, error: ValidationError) -> ValueError:
    """The first problem: as the class itself said it, or its place and kind. Values are left out: they may be texts."""
    first = error.errors(include_url=False, include_input=False)[0]
    said = first.get("ctx", {}).get("error")
    place = ".".join(map(str, first["loc"]))
    return said if isinstance(said, ValueError) else ValueError(f"{what} is damaged: {place}: {first['msg']}")
