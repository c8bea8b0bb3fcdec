"""Schema versions of stored JSON. JSON of a version that this release does not know is refused."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any, ClassVar, Self, cast

from pydantic import ConfigDict, GetJsonSchemaHandler, TypeAdapter, ValidationError
from pydantic.json_schema import JsonSchemaValue

REMEDY = "use the release that wrote it"


def require_schema_version(
    values: Any,
    version: int,
    what: str,
    error: type[Exception],
    remedy: str = REMEDY,
) -> dict[str, Any]:
    """Check the schema version of a JSON object, and return its other values.

    Args:
        values: The JSON value that was read.
        version: The version that this release reads.
        what: Name of the file or object in the message.
        error: Class of the error.
        remedy: What to do, for the message.

    Raises:
        error: `values` is not a dict, or its `schema_version` is missing or another.
    """
    written = values.get("schema_version") if isinstance(values, dict) else None
    if written != version:
        raise error(f"{what} has schema version {written}, this release reads {version}; {remedy}.")
    return {name: value for name, value in values.items() if name != "schema_version"}


def first_problem(error: ValidationError) -> str:
    """Say where the first wrong value lies, and what is wrong with it, without the value: it may be a row's text."""
    first = error.errors(include_url=False, include_input=False)[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"


class VersionedJson:
    """Base of frozen dataclasses that are stored as JSON with a schema version.

    A class is made with the keywords `what`, `error`, `version` and `remedy` of `require_schema_version`.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")
    _what: ClassVar[str]
    _version: ClassVar[int]
    _fields_of: ClassVar[Callable[[Any], dict[str, Any]]]

    def __init_subclass__(cls, *, what: str, error: type[Exception], version: int, remedy: str = REMEDY) -> None:
        cls._what, cls._version = what, version
        cls._fields_of = partial(require_schema_version, version=version, what=what, error=error, remedy=remedy)

    def to_json(self) -> dict[str, Any]:
        """Values for `json.dumps`; `from_json` reads them back."""
        fields: dict[str, Any] = self._adapter().dump_python(self, mode="json")
        return fields if "schema_version" in fields else {"schema_version": self._version, **fields}

    @classmethod
    def from_json(cls, values: Any) -> Self:
        """Read the result of `to_json`.

        Raises:
            Exception: `error` of the class: the schema version is not known.
            ValueError: A field is damaged. The message has no values, because they may be texts of rows.
        """
        fields = cls._fields_of(values)
        try:
            return cast(Self, cls._adapter().validate_python(fields))
        except ValidationError as error:
            own = error.errors(include_url=False)[0].get("ctx", {}).get("error")  # raised by the class itself
            if isinstance(own, ValueError):
                raise own from None
            raise ValueError(f"{cls._what} is damaged: {first_problem(error)}") from None

    @classmethod
    @cache
    def _adapter(cls) -> TypeAdapter[Any]:
        return TypeAdapter(cls)


class JsonOf:
    """Annotates a dict that `to_json` has made: its JSON schema is that of the class."""

    def __init__(self, kind: type[VersionedJson]) -> None:
        self.kind = kind

    def __get_pydantic_json_schema__(self, _: Any, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """Return the schema of the class, with the version that `to_json` writes first."""
        schema = handler(self.kind._adapter().core_schema)
        version = {"const": self.kind._version, "type": "integer"}
        schema["properties"] = {"schema_version": version, **schema["properties"]}
        schema["required"] = ["schema_version", *schema.get("required", ())]
        return schema
