"""The schema of a task's rows, and the manifest of a dataset."""

from __future__ import annotations

import hashlib
import json
import re
import string
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar, Literal

import pyarrow as pa
from pydantic import ConfigDict

from deal_core.config import check_metric
from deal_core.errors import ConfigError, DataValidationError
from deal_core.safe_text import brief, listed
from deal_core.schema_version import VersionedJson

Format = Literal["labelled", "completion", "chat"]
Split = Literal["train", "test"]
Doubt = Literal["swallowed rows", "repeated header", "labels alike"]
"""What looks wrong about rows: a quoted cell of a CSV whose lines read like rows, a line with the names of the columns,
and a label that looks like another one."""
AssistantTurns = Literal["all", "last"]
PromptForm = Literal["plain", "chat"]

SCHEMA_VERSION = 1
"""Version of the stored rows, of the row digest and of the manifest."""

COLUMNS_OF_FORMAT: dict[Format, tuple[str, str] | tuple[str]] = {
    "labelled": ("text", "label"),
    "completion": ("prompt", "completion"),
    "chat": ("messages",),
}
"""The required columns of each format, by this project's names."""
OPTIONAL_OF_FORMAT: dict[Format, tuple[str, ...]] = {
    "labelled": ("split", "is_random"),
    "completion": ("context", "split", "is_random"),
    "chat": ("tools", "split", "is_random"),
}
"""The columns that a file of each format may have too."""
PREFERENCE_COLUMNS = ("chosen", "rejected")
"""In place of the answer, a file of preferences has the better and the worse answer of each row."""

ROW_SCHEMA = pa.schema([("input", pa.string()), ("output", pa.string()), ("sha256", pa.string())])
"""A stored row. labelled: input text, output label; completion: input prompt, output completion; chat: input the JSON
list of the messages before the answer, output the answer's content. sha256: digest of the normalised row."""
REFERENCES = pa.field("references", pa.list_(pa.string()))
"""One more column of the test rows of free answers: all right answers, `output` first; null for a row with one."""
REJECTED = pa.field("rejected", pa.string())
"""One more column of the rows of a task that learns preferences: the worse answer; `output` is the better one."""

OPTIONS_SEPARATOR = ", "
"""What stands between the labels in a prompt."""
DEFAULT_TEMPLATE = "{instruction}\nOption: {options}\n{text}\nAnswer:"
_TEMPLATE_FIELDS = ("instruction", "options", "text")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_UNSEEN = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]")
"""Invisible characters that Unicode does not call formats or controls."""
SURROGATE = re.compile("[\ud800-\udfff]")
"""What a byte that is not UTF-8 becomes in a text."""


def is_name(text: str) -> bool:
    """Return whether a text can name a task or a lineage. It can then be the name of a folder too."""
    return _NAME.fullmatch(text) is not None


def label_key(label: str) -> str:
    """Key of a label. Labels that differ only in case, white space or Unicode form have the same key."""
    return unicodedata.normalize("NFC", " ".join(label.split()).casefold())


def seen_key(label: str) -> str:
    """Key of a label as people see it: `label_key` without invisible characters.

    Example:
        >>> seen_key("lost\u200b card") == seen_key("Lost card")
        True
    """
    shown = _UNSEEN.sub("", label_key(label))
    return label_key("".join(char for char in shown if unicodedata.category(char) not in ("Cf", "Cc")))


@dataclass(frozen=True, kw_only=True)
class TaskSchema:
    """One task (domain): the form of its rows and of its prompts.

    Raises:
        ConfigError: A field is not valid; the message names the field and what to give.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    name: str
    """Name of letters, digits, dot, dash and underscore; it becomes part of paths."""
    format: Format | Literal["auto"] = "labelled"
    """Format of a row; "auto" is replaced by the format of the file's columns when the dataset is built."""
    labels: tuple[str, ...] = ()
    """Every allowed answer of a labelled task, in the spelling for the model; empty: taken from the first file."""
    instruction: str = ""
    """Instruction before each text; in a chat the system message of conversations that have none."""
    template: str | None = None
    """Prompt with {text} and optionally {instruction} and {options}; None: the default of the format."""
    prompt: PromptForm = "plain"
    """Form of a prompt. chat: the text under the instruction is a user's message in the base model's chat template.
    Chats always have that form, so the setting changes nothing for them."""
    metric: str = "exact"
    """How an answer is scored, 0 to 1: one of METRICS, or module:function. "auto" is replaced when the dataset is
    built: exact for labels, rouge_l for free answers."""
    columns: Mapping[str, str] = field(default_factory=dict, hash=False)
    """This project's name of a column (text, label, prompt, completion, context, messages, tools, chosen, rejected,
    split) → its name in the file."""
    label_names: Mapping[str, str] = field(default_factory=dict, hash=False)
    """Content of a label cell → label, for files that hold numbers or codes in place of labels."""
    assistant_turns: AssistantTurns = "last"
    """The turns of a training chat that are learned."""
    learns_preferences: bool = False
    """Whether every row has a better and a worse answer, and the task learns to prefer the better one. Filled in from
    the file's columns when the dataset of a new task is built."""

    def __post_init__(self) -> None:
        if not is_name(self.name):
            raise ConfigError(
                f"task.name is {brief(self.name)}; use 1 to 64 letters, digits, '.', '_' or '-', beginning with a "
                "letter or a digit."
            )
        if self.format not in (*COLUMNS_OF_FORMAT, "auto"):
            raise ConfigError(f"task.format is {brief(self.format)}; use one of {', '.join(COLUMNS_OF_FORMAT)}, auto.")
        # Neither a file nor a tokenizer can hold lone surrogates.
        texts = {"labels": self.labels, "instruction": [self.instruction], "template": [self.template or ""]}
        for field_name, values in {**texts, "columns": self.columns.values()}.items():
            if odd := [text for text in values if SURROGATE.search(text)]:
                raise ConfigError(f"task.{field_name} holds {odd[0][:80]!r}, which is not UTF-8; correct it.")
        _check_labels(self.labels, self.format)
        if self.metric != "auto":
            check_metric(self.metric)
        _check_template(self.template, self.format)
        of_formats = (*COLUMNS_OF_FORMAT.values(), *OPTIONAL_OF_FORMAT.values())
        ours = {*PREFERENCE_COLUMNS, *(name for names in of_formats for name in names)}
        unknown = sorted(set(self.columns) - ours)
        if unknown:
            raise ConfigError(f"task.columns names {listed(unknown)}; the columns are {', '.join(sorted(ours))}.")
        object.__setattr__(self, "labels", tuple(label.strip() for label in self.labels))
        object.__setattr__(self, "columns", dict(self.columns))
        keys = {label_key(label) for label in self.labels}
        if unknown := [name for name in self.label_names.values() if label_key(name) not in keys]:
            raise ConfigError(
                f"task.label_names gives {listed(unknown)}, which task.labels does not have; add them there."
            )
        names = {" ".join(cell.split()): name.strip() for cell, name in self.label_names.items()}
        object.__setattr__(self, "label_names", names)
        if self.prompt not in ("plain", "chat"):
            raise ConfigError(f"task.prompt is {brief(self.prompt)}; use plain or chat.")
        if self.format == "chat":
            object.__setattr__(self, "prompt", "plain")
        if self.assistant_turns not in ("all", "last"):
            raise ConfigError(f"task.assistant_turns is {brief(self.assistant_turns)}; use all or last.")

    @property
    def sha256(self) -> str:
        """Digest of all that a prompt is made of; how cells are read and answers scored is not in it."""
        parts = [self.format, list(self.labels), self.instruction, self.template, self.prompt]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    @property
    def uses_chat_template(self) -> bool:
        """Whether the base model's chat template writes the prompts."""
        return self.format == "chat" or self.prompt == "chat"

    @property
    def shows_options(self) -> bool:
        """Whether a prompt lists the labels."""
        template = DEFAULT_TEMPLATE if self.template is None else self.template
        return bool(self.labels) and "options" in [name for _, name, _, _ in string.Formatter().parse(template)]

    def with_labels(self, labels: Iterable[str]) -> TaskSchema:
        """The same task with new labels appended in order; known labels are ignored.

        Raises:
            ConfigError: A label is not valid, or the task's format has no labels.
        """
        spelled: dict[str, str] = {}
        for label in (*self.labels, *labels):
            spelled.setdefault(label_key(label), label)
        return replace(self, labels=tuple(spelled.values()))

    def to_json(self) -> dict[str, Any]:
        """The schema as a dict of JSON types."""
        return {**asdict(self), "labels": list(self.labels)}

    def as_asked(self) -> TaskSchema:
        """The task as a client needs it, without what only reading a file needs."""
        return replace(self, columns={}, label_names={}, assistant_turns="last")


def stored_columns(task: TaskSchema, split: Split) -> pa.Schema:
    """The columns of a dataset's rows; the task's format is not "auto"."""
    has_references = split == "test" and task.format != "labelled" and not task.learns_preferences
    return pa.schema([*ROW_SCHEMA, *[REFERENCES] * has_references, *[REJECTED] * task.learns_preferences])


def _check_labels(labels: tuple[str, ...], task_format: str) -> None:
    if labels and task_format not in ("labelled", "auto"):
        raise ConfigError(f"task.labels is given for a {task_format} task; only labelled tasks have labels.")
    seen: dict[str, str] = {}
    for label in labels:
        if not label.strip() or "\n" in label.strip():
            raise ConfigError(f"task.labels holds {brief(label)}; a label is one line and not empty.")
        if label_key(label) in seen:
            raise ConfigError(
                f"task.labels holds {brief(seen[label_key(label)])} and {brief(label)}, which differ in case "
                "or blanks only; keep one of them."
            )
        seen[label_key(label)] = label


def _check_template(template: str | None, task_format: str) -> None:
    if template is None:
        return
    if task_format == "chat":
        raise ConfigError("task.template is given for a chat task; chats use the base model's own chat template.")
    try:
        pieces = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ConfigError(f"task.template cannot be read ({error}); write a literal brace as {{{{ or }}}}.") from error
    fields = [name for _, name, _, _ in pieces if name is not None]
    unknown = sorted(set(fields) - set(_TEMPLATE_FIELDS))
    if unknown or any(spec or conversion for _, _, spec, conversion in pieces):
        raise ConfigError(
            f"task.template may hold {', '.join('{' + name + '}' for name in _TEMPLATE_FIELDS)} and nothing else in "
            f"braces; it is {brief(template)}. Write a literal brace twice."
        )
    if fields.count("text") != 1:
        raise ConfigError(f"task.template holds {{text}} {fields.count('text')} times; it must hold it once.")


@dataclass(frozen=True, kw_only=True)
class Contradictions:
    """Rows that contradict others: all of them are kept."""

    num_texts: int
    """Inputs with more than one right answer; of preferences the pairs of answers that are preferred either way."""
    num_train: int
    """Training rows with such an input, or such a pair."""
    num_test: int
    examples: tuple[tuple[str, ...], ...] = ()
    """Shortened texts, each with its labels or its two answers. None if the arrival keeps texts out of reports."""


@dataclass(frozen=True, kw_only=True)
class RowsInDoubt:
    """Rows of an arrival that look wrong for one reason."""

    kind: Doubt
    num_rows: int
    rows: tuple[tuple[str, int], ...]
    """The first of them, each with its file and its number there (`RawRow.number`)."""


@dataclass(frozen=True, kw_only=True)
class DatasetManifest(
    VersionedJson,
    what="The manifest",
    error=DataValidationError,
    version=SCHEMA_VERSION,
    remedy="build the dataset again from its file",
):
    """The record of one dataset: its source, its rows and its bad rows."""

    task: TaskSchema
    """The task with its format and labels filled in."""
    sha256: str
    """Digest of the task's name and the rows with their split; order, file format and file name do not count."""
    source: str
    num_read: int
    num_train: int
    num_test: int
    num_added: int = 0
    """Test rows with new texts, which are added to those of a known task."""
    num_rejected: int
    """Bad rows; num_read + num_turns = num_train + num_test + num_rejected."""
    problems: Mapping[str, int] = field(hash=False)
    """Problems by reason; a bad row can have several."""
    split: Literal["given", "hash"]
    """given: the file or a separate test file names the test rows. hash: the rows' digests decide."""
    retain_training_rows: bool = False
    """Whether the training rows are kept after they are learned."""
    files: tuple[str, ...] = ()
    """SHA-256 of the bytes of each landed file: first the files of one arrival, then its test files. Files of other
    arrivals with the same rows follow."""
    num_training_files: int = 1
    """Number of the first of `files` that are no test files."""
    landed_sha256: str
    """Digest of the task's name and the good rows with the user's split, if any. Unlike `sha256`, it does not depend on
    the lineage's frozen test rows."""
    num_turns: int = 0
    """Training rows that are earlier turns of chats. num_read counts a chat once."""
    contradictions: Contradictions | None = None
    """None: no row contradicts another."""
    doubts: tuple[RowsInDoubt, ...] = ()
    """Rows that look wrong, by kind."""
    test_sha256: str | None = None
    """SHA-256 of the bytes of the file of test rows, which never changes. None if no file was written."""
    schema_version: int = SCHEMA_VERSION

    @property
    def training_files(self) -> tuple[str, ...]:
        """Digests of the files of one arrival with these rows, without its test files."""
        return self.files[: self.num_training_files]
