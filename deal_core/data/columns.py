"""Which column of a file holds what: by the task's `columns`, else by the names people give them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from deal_core.data.reading.readers import file_kind
from deal_core.data.schema import COLUMNS_OF_FORMAT, Format, TaskSchema
from deal_core.errors import DataValidationError

CONVENTIONS: dict[str, tuple[str, ...]] = {
    "text": ("text", "sentence", "body", "content", "document", "review", "comment", "utterance", "note", "message",
             "description"),
    "label": ("label", "category", "class", "intent", "topic", "sentiment"),
    "prompt": ("prompt", "instruction", "question", "input"),
    "completion": ("completion", "response", "answer", "output", "target"),
    "messages": ("messages", "conversation", "conversations"),
    "split": ("split",),
}  # fmt: skip
"""Names a column may have; case and outer blanks do not count. The first wins; of the others a file may have one."""


@dataclass(frozen=True, kw_only=True)
class Columns:
    """A file's columns, found."""

    format: Format
    names: Mapping[str, str]
    """Our name → the file's. Every required column, and "split" where the file has one."""


def resolve_columns(
    file_columns: Sequence[str], task: TaskSchema, source: str, *, include_texts: bool = False
) -> Columns:
    """Find the task's columns among a file's; format "auto" is whichever format the file has the columns of.

    Args:
        file_columns: The file's column names, a doubled one twice.
        task: What is wanted.
        source: Name of the file, for the message.
        include_texts: The message may quote names that are neither the task's nor convention's. Those of a CSV without
            a header are texts of its first row, and keys of JSON lines can be texts, too.

    Raises:
        DataValidationError: A column is missing or ambiguous, or so is the format.

    Example:
        >>> resolve_columns(["id", "Body", "category"], TaskSchema(name="t"), "t.csv").names
        {'text': 'Body', 'label': 'category'}
    """
    formats = _possible_formats(task)
    told = _told(file_columns, task, source, include_texts)
    found = {name: _matches(name, file_columns, task, source, told) for name in CONVENTIONS}
    fitting = [one for one in formats if all(found[name] for name in COLUMNS_OF_FORMAT[one])]
    if not fitting:
        raise DataValidationError(_missing_message(told, formats, found, source))
    if len(fitting) > 1:
        raise DataValidationError(
            f"{source} has the columns of more than one format ({', '.join(fitting)}); set task.format to one of them."
        )
    wanted = (*COLUMNS_OF_FORMAT[fitting[0]], "split")
    names = {name: _only(found[name], name, source) for name in wanted if found[name]}
    if len(set(names.values())) < len(names):
        raise DataValidationError(f"task.columns gives one column of {source} two meanings: {names}; correct it.")
    return Columns(format=fitting[0], names=names)


def find_input(file_columns: Sequence[str], task: TaskSchema, source: str, column: str | None = None) -> Columns:
    """Find the one column that a task's model is asked with; answers are not looked for.

    Messages quote the file's columns, whatever they are: they are for who asks.

    Args:
        file_columns: As for `resolve_columns`.
        task: The task; its format must not be "auto".
        source: Name of the file, for the message.
        column: The column's name, where neither the task's own names nor convention find it.

    Raises:
        DataValidationError: The column is missing or ambiguous.

    Example:
        >>> find_input(["id", "Body"], TaskSchema(name="t"), "t.csv").names
        {'text': 'Body'}
    """
    kind = task.format
    assert kind != "auto", "a task that was learned has a format"
    name = COLUMNS_OF_FORMAT[kind][0]
    if column is not None:
        task = replace(task, columns={name: column})
    elif task.columns.get(name) not in file_columns:
        task = replace(task, columns={})  # the task's first file named it so; this one may do otherwise
    told = _told(file_columns, task, source, include_texts=True)
    found = _matches(name, file_columns, task, source, told)
    if not found:
        raise DataValidationError(f"{source} has {told}; none is named like {name}. Name it with --column.")
    return Columns(format=kind, names={name: _only(found, name, source)})


def _possible_formats(task: TaskSchema) -> list[Format]:
    if task.format != "auto":
        return [task.format]
    named = set(task.columns) - {"split"}
    formats = [one for one, columns in COLUMNS_OF_FORMAT.items() if named <= set(columns)]
    return ["labelled"] if task.labels else formats


def _matches(name: str, file_columns: Sequence[str], task: TaskSchema, source: str, told: str) -> list[str]:
    """The file's columns that could be the one of ours; `told` is said of them where the task's own is missing."""
    if name in task.columns:
        named = [column for column in file_columns if column.strip() == task.columns[name].strip()]
        if not named:
            raise DataValidationError(
                f"{source} has no column {task.columns[name]!r}, which task.columns gives for {name}; it has {told}. "
                "Correct one of the two."
            )
        return named
    ours, *others = CONVENTIONS[name]
    exact = [column for column in file_columns if column == ours]
    alike = [column for column in file_columns if column.strip().casefold() == ours]
    return exact or alike or [column for column in file_columns if column.strip().casefold() in others]


def _only(matches: Sequence[str], name: str, source: str) -> str:
    if len(matches) > 1:
        raise DataValidationError(
            f"{source} has {len(matches)} columns that could be {name}: {_listed(matches)}; name the right one in "
            f"task.columns ({{{name}: …}}), or rename the others. What stands in several belongs into one column."
        )
    return matches[0]


def _missing_message(told: str, formats: Sequence[Format], found: Mapping[str, Sequence[str]], source: str) -> str:
    wanted = " or ".join(f"{one} rows need {' and '.join(COLUMNS_OF_FORMAT[one])}" for one in formats)
    missing = [name for one in formats for name in COLUMNS_OF_FORMAT[one] if not found[name]]
    return (
        f"{source} has {told}, and {wanted}; nothing is named like {', '.join(missing)}. "
        f"Rename the columns, or name them in task.columns, for example {{{missing[0]}: NAME IN THE FILE}}."
    )


def _told(names: Sequence[str], task: TaskSchema, source: str, include_texts: bool) -> str:
    """What a message says of a file's columns; without texts it quotes only names that a column is looked for by."""
    expected = {name.strip().casefold() for known in (task.columns.values(), *CONVENTIONS.values()) for name in known}
    familiar = [name for name in names if name.strip().casefold() in expected]
    notes = []
    if include_texts or len(familiar) == len(names):
        told = f"the columns {_listed(names)}"
    else:
        told = f"{len(names)} columns, {f'among them {_listed(familiar)}' if familiar else 'none of a name looked for'}"
        notes.append("deal validate shows the names")
    if names and not familiar and file_kind(Path(source)) == "csv":
        notes.append("if its first line is a row and no header, put the columns' names above it")
    return told + (f" ({'; '.join(notes)})" if notes else "")


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name[:40]) for name in names[:12])
    return f"{shown}, … ({len(names)} in all)" if len(names) > 12 else shown or "(none)"
