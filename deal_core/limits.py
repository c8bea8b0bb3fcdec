"""Limits that settings declare on their fields, and the messages for values that break a limit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, TypeVar, dataclass_transform

from pydantic import ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass

from deal_core.errors import ConfigError
from deal_core.safe_text import brief

MAX_COUNT = 2**31 - 1
MAX_SEED = 2**32 - 1
"""Largest seed: NumPy takes no larger one, and none below 0."""

Flag = Annotated[bool, Field(strict=True)]
Count = Annotated[int, Field(strict=True, ge=1, le=MAX_COUNT)]
CountOrZero = Annotated[int, Field(strict=True, ge=0, le=MAX_COUNT)]
Seed = Annotated[int, Field(strict=True, ge=0, le=MAX_SEED)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Positive = Annotated[Number, Field(gt=0)]
AtLeastZero = Annotated[Number, Field(ge=0)]
AtLeastOne = Annotated[Number, Field(ge=1)]
Share = Annotated[Number, Field(ge=0, le=1)]
ShareAboveZero = Annotated[Number, Field(gt=0, le=1)]
ShareBelowOne = Annotated[Number, Field(ge=0, lt=1)]

Settings = TypeVar("Settings", bound=type)

_WANTED = {
    "greater_than": "more than {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "less_than": "less than {lt:g}",
    "less_than_equal": "at most {le}",
    "finite_number": "a finite number",
    "int_type": "a whole number",
    "int_parsing_size": "a whole number that is not as large",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "a text",
    "tuple_type": "a list",
    "dict_type": "a mapping of keys",
    "dataclass_type": "a mapping of keys",
    "model_type": "a mapping of keys",
    "literal_error": "{expected}",
    "unexpected_keyword_argument": "a field that there is",
}
"""Pydantic's error type → what to give instead."""


def require(condition: bool, message: str) -> None:
    """Refuse settings that do not fit together.

    Raises:
        ConfigError: The condition does not hold.
    """
    if not condition:
        raise ConfigError(message)


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(Field,))
def settings(section: str) -> Callable[[Settings], Settings]:
    """Make a class a frozen dataclass that checks its fields when an instance is made.

    Args:
        section: name of these settings' section in a spec; the prefix of field names in errors.

    Raises:
        ConfigError: raised by the class if fields do not fit; the message names each of them.
    """

    def decorate(cls: Settings) -> Settings:
        made: Any = dataclass(cls, frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
        check = made.__init__

        def __init__(self: Any, **values: Any) -> None:  # noqa: N807
            try:
                check(self, **values)
            except ValidationError as error:
                problems = [describe(item, ".".join(map(str, (section, *item["loc"])))) for item in error.errors()]
                raise ConfigError(" ".join(dict.fromkeys(problems))) from None

        made.__init__ = __init__
        return made  # type: ignore[no-any-return]

    return decorate


def describe(problem: Mapping[str, Any], where: str) -> str:
    """One of pydantic's problems as a sentence: the field, the value found, and what to give instead.

    Args:
        problem: an item of `ValidationError.errors()`.
        where: the field's full name.
    """
    limits, value = problem.get("ctx", {}), brief(problem["input"])
    if isinstance(limits.get("error"), ConfigError):
        return str(limits["error"])
    wanted = _WANTED.get(problem["type"])
    if wanted is None:
        message = problem["msg"].removeprefix("Value error, ").rstrip(".")
        return f"{message}." if message.startswith(where) else f"'{where}': {message} (got {value})."
    return f"{where} is {value}; give {wanted.format(**limits)}."
