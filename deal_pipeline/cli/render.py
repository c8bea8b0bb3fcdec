"""Draw the tables of the command line. What a table shows of a result stands at the fields of its type, as `Shown`."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from datetime import datetime
from operator import attrgetter
from typing import Any, NamedTuple, get_type_hints

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.markup import escape
from rich.table import Column, Table
from rich.text import Text

from deal_core.evaluation.interval import SURE_ROWS, CellScore, score_text
from deal_core.shown import Shown

NOTHING = "–"
"""Stands for a value that is not there."""
GOOD = ("accepted", "learned", "promoted", "up", "fits")
"""States that are green."""
BAD = ("rejected", "refused", "failed", "gone", "alarm", "worse", "too much")
"""The words with which states begin that are red. Other states are yellow."""
LONG_WORD = 20
"""A longer word, such as a path, may be broken on a narrow screen."""
_MISSING = frozenset({NOTHING, ""})
_NUMBER = re.compile(r"[+−-]?\d")


def heading(text: str) -> str:
    """A line above a table."""
    return f"\n[bold]{escape(text)}[/]"


def render(rows: Iterable[Any], title: str = "") -> list[RenderableType]:
    """Draw results as a table: a line for each, a column for each field that has a `Shown`. Of no result draw nothing.

    A column in which no line has a value is left out.

    Args:
        rows: Results of one type. A mapping is a result too, whose fields are its items. A tuple is several results
            side by side, each None or of one type; one that stands in the line above as well is not repeated.
        title: Stands above the table.
    """
    lines = [row if type(row) is tuple else (row,) for row in rows]
    columns = []
    for parts in zip(*lines, strict=True):
        before = (None, *parts) if len(lines[0]) > 1 else ()
        is_repeated = [part is above for part, above in zip(parts, before, strict=False)] or [False] * len(parts)
        for name, shown in _fields(next((part for part in parts if part is not None), None)):
            values = [None if part is None else _value(part, name, shown) for part in parts]
            texts = [_text(value, shown) for value in values]
            if shown.only != "facts" and not _MISSING.issuperset(texts):
                cells = ["" if same else _cell(text, shown) for text, same in zip(texts, is_repeated, strict=True)]
                are_numbers = all(_NUMBER.match(text) for text in texts if text not in _MISSING)
                columns.append(_Drawn(shown.heading(name), cells, are_numbers, shown.spare))
    return _table(columns, title) if lines else []


def render_facts(*results: Any, title: str = "") -> list[RenderableType]:
    """Draw one result, or several of one type side by side: a line for each field that has a `Shown`."""
    lines = []
    for name, shown in _fields(results[0]):
        texts = [_text(_value(result, name, shown), shown) for result in results]
        if shown.only != "table" and not _MISSING.issuperset(texts):
            lines.append([escape(shown.heading(name)), *(_cell(text, shown) for text in texts)])
    names, *sides = zip(*lines, strict=True)
    return _table([_Drawn("", names), *(_Drawn("", side, is_right=len(results) > 1) for side in sides)], title)


def render_matrix(matrix: Mapping[str, Any], title: str) -> list[RenderableType]:
    """Draw the accuracy matrix (its JSON): a line for each version, a column for each task, the base model first.

    A number of test rows that all cells of a task share stands in the task's title.
    """
    from deal_core.evaluation.accuracy_matrix import AccuracyMatrix  # pydantic loads slowly

    scores = AccuracyMatrix.from_json(matrix)
    columns = {"after learning": ["(base model)", *scores.learned]}
    for task, column in zip(scores.tasks, zip(*scores.cells, strict=True), strict=True):
        sizes = {cell.num_rows for cell in column if cell.share is not None}
        shared = sizes.pop() if len(sizes) == 1 else None
        is_shared = shared is not None and shared < SURE_ROWS
        columns[f"{task}, n {shared}" if is_shared else task] = [
            score_text(*cell, names_n=not is_shared) for cell in column
        ]
    return render([dict(zip(columns, line, strict=True)) for line in zip(*columns.values(), strict=True)], title)


def size_text(num_bytes: float) -> str:
    """A size in the largest unit of which it has one."""
    for unit in ("B", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:,.2f} GiB"


def _fields(result: Any) -> Sequence[tuple[str, Shown]]:
    """The name and the `Shown` of each field that is drawn. A field may be drawn in two ways."""
    if isinstance(result, Mapping):
        return [(name, Shown(name)) for name in result]
    hints = {} if result is None else get_type_hints(type(result), include_extras=True)
    return [
        (name, shown)
        for name, hint in hints.items()
        for shown in getattr(hint, "__metadata__", ())
        if isinstance(shown, Shown)
    ]


def _value(result: Any, name: str, shown: Shown) -> Any:
    return result[name] if isinstance(result, Mapping) else attrgetter(shown.of or name)(result)


def _text(value: Any, shown: Shown) -> str:
    """A value as its field is drawn."""
    if shown.words and value in shown.words:
        return shown.words[value]
    if value is None or (isinstance(value, Collection) and not value):
        return NOTHING
    if callable(shown.format):
        return shown.format(value)
    match value:
        case CellScore():
            return score_text(*value)
        case bool():
            return "yes" if value else "no"
        case datetime():
            return f"{value.astimezone():{shown.format or '%Y-%m-%d %H:%M'}}"
        case Mapping():
            return ", ".join(f"{name} {_text(part, shown)}" for name, part in value.items())
        case tuple() | list():
            return ", ".join(_text(part, shown) for part in value)
        case int() if shown.unit == "bytes":
            return size_text(value)
        case float():
            return format(100 * value if shown.unit == "%" else value, shown.format or ".1f")
    return format(value, shown.format)


def _cell(text: str, shown: Shown) -> str:
    """A text as markup."""
    if not shown.is_state or text in _MISSING:
        return escape(text)
    colour = "green" if text in GOOD else "red" if text.startswith(BAD) else "yellow"
    return f"[{colour}]{escape(text)}[/]"


class _Drawn(NamedTuple):
    """A column of a table."""

    heading: str
    cells: Sequence[str]
    """Markup."""
    is_right: bool = False
    spare: int = 0
    """See `Shown.spare`."""


def _table(columns: Sequence[_Drawn], title: str) -> list[RenderableType]:
    table = _FittingTable(box=box.SIMPLE_HEAD, pad_edge=False, show_header=any(column.heading for column in columns))
    for column in columns:
        table.add_column(escape(column.heading), justify="right" if column.is_right else "left", overflow="fold")
    for cells in zip(*(column.cells for column in columns), strict=True):
        table.add_row(*cells)
    spare = [place for place, column in enumerate(columns) if column.spare]
    table.spare = sorted(spare, key=lambda place: columns[place].spare)
    return [heading(title), table] if title else [table]


class _FittingTable(Table):
    """A table that breaks no word on a narrow screen, and leaves columns out if there is no other way."""

    spare: Sequence[int] = ()
    """Places of the columns that may be left out, the first one first."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Draw the columns that fit. If the words of the others do not fit either, they are broken."""
        columns = dict(enumerate(self.columns))
        for place in self.spare:
            if _room(columns.values(), options.max_width) < 0:
                del columns[place]
        room = _room(columns.values(), options.max_width)
        needs = [_width_of(column, str.splitlines) - _width_of(column, str.split) for column in columns.values()]
        drawn = copy.copy(self)
        drawn.columns = [dataclasses.replace(column, _index=place) for place, column in enumerate(columns.values())]
        if 0 <= room < sum(needs):  # each column has its words; of the room that is left the widest ones lack a part
            by_need = sorted(range(len(needs)), key=needs.__getitem__)
            for num_served, place in enumerate(by_need):
                part = min(needs[place], room // (len(needs) - num_served))
                drawn.columns[place].width = _width_of(drawn.columns[place], str.split) + part
                room -= part
        yield from Table.__rich_console__(drawn, console, options)


def _width_of(column: Column, split: Callable[[str], list[str]]) -> int:
    """The width of the longest part of a column; a word of more than LONG_WORD characters may be broken."""
    texts = [Text.from_markup(str(text)).plain for text in (column.header, *column.cells)]
    longest = max((cell_len(part) for text in texts for part in split(text)), default=0)
    return min(longest, LONG_WORD) if split is str.split else longest


def _room(columns: Iterable[Column], width: int) -> int:
    """What is left of a width if each column is as wide as its longest word; three characters are between two."""
    return width + 1 - sum(_width_of(column, str.split) + 3 for column in columns)
