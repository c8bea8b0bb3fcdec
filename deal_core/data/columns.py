"""Find a file's columns by the task's `columns`, else by common names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from deal_core.data.reading.readers import file_kind
from deal_core.data.schema import COLUMNS_OF_FORMAT, OPTIONAL_OF_FORMAT, Format, TaskSchema
from deal_core.errors import DataValidationError

CONVENTIONS: dict[str, tuple[str, ...]] = {
    "text": (
        "text",
        "sentence",
        "body",
        "content",
        "document",
        "review",
        "comment",
        "utterance",
        "note",
        "message",
        "description",
    ),
    "label": ("label", "category", "class", "intent", "topic", "sentiment"),
    "prompt": ("prompt", "instruction", "question", "input"),
    "completion": ("completion", "response", "answer", "output", "target"),
    "context": ("context",),
    "messages": ("messages", "conversation", "conversations"),
    "tools": ("tools",),
    "chosen": ("chosen",),
    "rejected": ("rejected",),
    "split": ("split",),
    "is_random": ("is_random",),
}
"""Possible names of a column; case and outer blanks do not count. The first wins; of the others a file may have one."""
CONTEXTS: dict[str, tuple[str, ...]] = {"instruction": ("input", "context"), "question": ("context",)}
"""A prompt's column → columns whose text belongs under the prompt, as in Alpaca and Dolly files."""
SPLITTING = ("split", "is_random")
"""Columns that say which rows are test rows: by name, and as the rows that were drawn at random."""


@dataclass(frozen=True, kw_only=True)
class Columns:
    """The columns that were found in a file."""

    format: Format
    names: Mapping[str, str]
    """This project's name → the file's name, for every required column, and for optional columns that the file has. A
    chat has "messages", or "prompt" and "completion" if each of them holds messages. A file of preferences has
    "rejected" too, and its better answers are the completions or messages."""
    label_names: Mapping[str, str] = field(default_factory=dict)
    """Content of a label cell → label, if the file itself names its labels."""
    shape: str = ""
    """What the file was recognised as, for people."""
    unread: frozenset[str] = frozenset()
    """Keys that the first rows of a JSON file lack, and that would be read if the first rows had them."""

    @property
    def has_preferences(self) -> bool:
        """Whether every row has a better and a worse answer."""
        return "rejected" in self.names

    @property
    def splitting(self) -> str | None:
        """The column that says which rows are test rows; None if there is none."""
        return next((name for name in SPLITTING if name in self.names), None)

    def without(self, *dropped: str) -> Columns:
        """The same without some optional columns."""
        names = {name: column for name, column in self.names.items() if name not in dropped}
        return replace(self, names=names, unread=self.unread - {*dropped})


def resolve_columns(
    file_columns: Sequence[str], task: TaskSchema, source: str, *, include_texts: bool = False
) -> Columns:
    """Find the task's columns in a file. Format "auto" becomes the format whose columns the file has.

    `file_columns` are the file's column names, with repetitions. With `include_texts`, the message of an error may
    quote unknown names. They can be texts of a row: in a CSV without a header, or as keys in JSON lines.

    Raises:
        DataValidationError: A column or the format is missing or ambiguous.
    """
    formats = _possible_formats(task)
    if not formats:
        kinds = "; ".join(f"{one}: {' and '.join(columns)}" for one, columns in COLUMNS_OF_FORMAT.items())
        raise DataValidationError(
            f"task.columns names {' and '.join(task.columns)}, which are of different formats; name the columns of one "
            f"of them ({kinds})."
        )
    overview = _describe(file_columns, task, source, include_texts)
    matches = {name: _matches(name, file_columns, task, source, overview) for name in CONVENTIONS}
    _find_context(matches, task)
    fitting = [one for one in formats if all(matches[name] for name in COLUMNS_OF_FORMAT[one])]
    if not fitting:
        wanted_columns = " or ".join(f"{one} rows need {' and '.join(COLUMNS_OF_FORMAT[one])}" for one in formats)
        missing = [name for one in formats for name in COLUMNS_OF_FORMAT[one] if not matches[name]]
        raise DataValidationError(
            f"{source} has {overview}, and {wanted_columns}; no column is named like {', '.join(missing)}. "
            f"Rename the columns, or name them, for example with --set task.columns.{missing[0]}=NAME_IN_THE_FILE."
        )
    if len(fitting) > 1:
        raise DataValidationError(
            f"{source} has the columns of more than one format ({', '.join(fitting)}); set task.format to one of them."
        )
    wanted = (*COLUMNS_OF_FORMAT[fitting[0]], *OPTIONAL_OF_FORMAT[fitting[0]])
    names = {name: _only(matches[name], name, source) for name in wanted if matches[name]}
    if len(set(names.values())) < len(names):
        raise DataValidationError(f"task.columns gives one column of {source} two meanings: {names}; correct it.")
    return Columns(format=fitting[0], names=names)


def find_input(file_columns: Sequence[str], task: TaskSchema, source: str, column: str | None = None) -> Columns:
    """Find the input column of a task; columns of answers are not needed.

    Messages quote the file's column names, because only the caller sees them. The task's format must not be "auto".
    `column` is the column's name if neither the task's `columns` nor a common name gives it.

    Raises:
        DataValidationError: The column is missing or ambiguous.
    """
    kind = task.format
    assert kind != "auto", "a task that was learned has a format"
    name = COLUMNS_OF_FORMAT[kind][0]
    others = {ours: theirs for ours, theirs in task.columns.items() if ours != name and theirs in file_columns}
    if column is not None:
        task = replace(task, columns={**others, name: column})
    elif name in task.columns and task.columns[name] not in file_columns:
        task = replace(task, columns=others)  # the names of the task's first file need not be this file's
    overview = _describe(file_columns, task, source, include_texts=True)
    wanted = (name, *(optional for optional in OPTIONAL_OF_FORMAT[kind] if optional not in SPLITTING))
    matches = {ours: _matches(ours, file_columns, task, source, overview) for ours in wanted}
    if kind == "completion":
        _find_context(matches, task)
        if column is not None and not matches["context"]:
            contexts = CONTEXTS.get(column.strip().casefold(), ())
            matches["context"] = [theirs for theirs in file_columns if theirs.strip().casefold() in contexts][:1]
    if not matches[name]:
        raise DataValidationError(f"{source} has {overview}; no column is named like {name}. Name it with --column.")
    return Columns(format=kind, names={ours: _only(matches[ours], ours, source) for ours in wanted if matches[ours]})


def late_keys(task: TaskSchema, columns: Columns) -> frozenset[str]:
    """Keys of rows that are not read with these columns, and would be if the first rows of the file had them."""
    wanted = [name for name in OPTIONAL_OF_FORMAT[columns.format] if name not in columns.names and name != "is_random"]
    keys = {task.columns.get(name, name) for name in wanted if name != "split" or columns.splitting is None}
    if "context" in wanted and "context" not in task.columns:
        prompt = columns.names.get("prompt", "").strip().casefold()
        keys = keys - {"context"} | {*(CONTEXTS.get(prompt, ()) if "prompt" not in task.columns else ())}
    return frozenset(keys - {*columns.names.values()})


def _find_context(matches: dict[str, list[str]], task: TaskSchema) -> None:
    """Decide which column is the prompt's context. A column that `task.columns` gives for the prompt has none."""
    if "context" in task.columns:
        return
    named = {column.strip().casefold(): column for column in matches["prompt"]}
    contexts = {"input": [named["input"]] if "input" in named else [], "context": matches["context"]}
    matches["context"] = []
    for prompt, others in CONTEXTS.items():
        fitting = [contexts[other] for other in others if contexts[other]]
        if prompt in named and fitting and "prompt" not in task.columns:
            matches["prompt"] = [column for column in matches["prompt"] if column != named.get("input")]
            matches["context"] = fitting[0]
            return


def _possible_formats(task: TaskSchema) -> list[Format]:
    if task.format != "auto":
        return [task.format]
    named = set(task.columns)
    formats = [one for one, columns in COLUMNS_OF_FORMAT.items() if named <= {*columns, *OPTIONAL_OF_FORMAT[one]}]
    return ["labelled"] if task.labels else formats


def _matches(name: str, file_columns: Sequence[str], task: TaskSchema, source: str, overview: str) -> list[str]:
    """The file's columns that could be column `name`; `overview` describes these columns for a message."""
    if name in task.columns:
        named = [column for column in file_columns if column.strip() == task.columns[name].strip()]
        if not named:
            raise DataValidationError(
                f"{source} has no column {task.columns[name]!r}, which task.columns gives for {name}; it has "
                f"{overview}. Correct one of the two."
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
            f"task.columns ({{{name}: …}}), or rename the others. Values from several columns belong in one column."
        )
    return matches[0]


def _describe(names: Sequence[str], task: TaskSchema, source: str, include_texts: bool) -> str:
    """Describe a file's columns for a message. Without texts, only names that the search knows are quoted."""
    expected = {name.strip().casefold() for names in (task.columns.values(), *CONVENTIONS.values()) for name in names}
    familiar = [name for name in names if name.strip().casefold() in expected]
    notes = []
    if include_texts or len(familiar) == len(names):
        overview = f"the columns {_listed(names)}"
    else:
        among = f"among them {_listed(familiar)}" if familiar else "none of a name looked for"
        overview = f"{len(names)} columns, {among}"
        notes.append("deal check shows the names")
    if names and not familiar and file_kind(Path(source)) == "csv":
        notes.append("if its first line is a row and no header, put the columns' names above it")
    return overview + (f" ({'; '.join(notes)})" if notes else "")


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name[:40]) for name in names[:12])
    return f"{shown}, … ({len(names)} in all)" if len(names) > 12 else shown or "(none)"
