"""How the fields of a result are drawn in the tables of the command line. `deal_pipeline.cli.render` draws them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, eq=False)
class Shown:
    """How a field is drawn: `accuracy: Annotated[float, Shown("accuracy", unit="%")]`. Fields without one are not.

    Example:
        >>> Shown("accuracy", unit="%").heading("average_accuracy")
        'accuracy, %'
        >>> Shown().heading("parent_version")
        'parent version'
    """

    title: str = ""
    """Heading of its column or line; empty: the name of the field."""
    unit: str = ""
    """Stands behind the title. %: the value is a share of 0 to 1. bytes: the value is drawn with its own unit."""
    format: str | Callable[[Any], str] = ""
    """The format of a number or a time as Python has it; the number of characters of a digest; or a function."""
    of: str = ""
    """The attribute that is drawn in the place of the field."""
    words: Mapping[Any, str] = field(default_factory=dict)
    """The words for values."""
    is_state: bool = False
    """Whether good and bad values have their colours."""
    only: Literal["", "table", "facts"] = ""
    """table: it is left out where one result is drawn, a line for each field. facts: it is drawn only there."""
    spare: int = 0
    """From 1: on a narrow screen its column is left out, 1 first."""

    def heading(self, name: str) -> str:
        """Return the heading of a field with this name."""
        title = self.title or (self.of or name).replace("_", " ")
        return f"{title}, {self.unit}" if self.unit not in ("", "bytes") else title


ACCEPTED = Shown("gate", words={True: "accepted", False: "rejected"}, is_state=True)
"""Of the decision of a gate."""
