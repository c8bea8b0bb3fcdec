"""Rows: raw as in a file, good as in a dataset, and bad as in quarantine; and the digests of rows."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from deal_core.safe_text import shorten

if TYPE_CHECKING:  # a process that only reads a file starts sooner without the settings
    from deal_core.config import DataConfig
    from deal_core.data.schema import Doubt, Format

Reason = Literal[
    "malformed line",
    "missing column",
    "bad encoding",
    "empty text",
    "over-long text",
    "empty label",
    "label outside the task's set",
    "malformed messages",
    "unknown split",
    "duplicate row",
    "text of a test row",
    "nearly a test row",
    "equal answers",
]


NEAR: Reason = "nearly a test row"
MAX_EXAMPLES = 20
_SHOWN_EXAMPLES = 3
REMEDIES: dict[Reason, str] = {
    "over-long text": "For long texts raise data.max_text_chars; a prompt is cut by tokens.",
    "bad encoding": "Save the file as UTF-8, such as with: iconv -f CP1252 -t UTF-8 FILE.",
}
"""Reason of bad rows → what to do about it, as a sentence."""


class Problem(NamedTuple):
    """One problem of a row, and the shortened value that shows it."""

    reason: Reason
    value: str
    why: str = ""
    """What is wrong, without a word of the row. It may be shown where texts may not; empty if `reason` says it all."""


class RawRow(NamedTuple):
    """One row of a file, before any check."""

    number: int
    """Number of the row, from 1, without a CSV's header; in JSON lines the number of the line."""
    values: Mapping[str, Any]
    """The row's columns; empty if the row could not be read."""
    line: int | None = None
    """The line of the file on which the row begins; None if the file has no lines."""
    fault: Problem | None = None
    """Why the row could not be read."""
    whole: Callable[[], Any] | None = None
    """Returns the row for quarantine, if quarantine does not keep `values`."""
    doubt: Doubt | None = None
    """What looks wrong about the row even if it can be read."""

    def raw(self) -> Any:
        """The row for quarantine: its columns, or the text that could not be read."""
        return self.values if self.whole is None else self.whole()


def unreadable_row(
    number: int, line: int | None, text: str, found: str, why: str | None = None, reason: Reason = "malformed line"
) -> RawRow:
    """A row that could not be read. `found` may quote its text, `why` may not; None: they are the same."""
    fault = Problem(reason, f"{found}: {shorten(text)}", why or found)
    return RawRow(number, {}, line, fault, whole=partial(str, text))


class Row(NamedTuple):
    """A good row."""

    input: str
    output: str
    digest: bytes
    """SHA-256 of the normalised row, see `row_digest`."""
    input_digest: bytes
    """Digest of the normalised input: rows with one text are on one side of the split, even with different answers."""
    references: tuple[str, ...] = ()
    """All right answers, `output` first, if there are several."""
    rejected: str | None = None
    """The worse answer, if the row is a preference."""


@dataclass(frozen=True, kw_only=True)
class BadRow:
    """One row that cannot be used, and all its problems."""

    file: str
    row: int
    """As in `RawRow.number`."""
    line: int | None
    """As in `RawRow.line`."""
    problems: tuple[Problem, ...]

    def describe(self, include_texts: bool) -> str:
        """The row in a few words; its values are quoted only if texts may be shown."""
        line = f" (line {self.line})" if self.line not in (None, self.row) else ""
        shown = [(reason, repr(value) if include_texts else why) for reason, value, why in self.problems]
        return f"row {self.row}{line} {', '.join(f'{reason}: {what}' if what else reason for reason, what in shown)}"


@dataclass
class RowTally:
    """How many rows of some files were read, and the bad ones among them."""

    name: str
    """How messages name the files."""
    num_read: int = 0
    num_bad: int = 0
    problems: Counter[str] = field(default_factory=Counter)
    examples: list[BadRow] = field(default_factory=list)
    """The first MAX_EXAMPLES bad rows."""

    def add_bad(self, row: BadRow) -> None:
        """Count a bad row."""
        self.num_bad += 1
        self.problems.update(problem.reason for problem in row.problems)
        if len(self.examples) < MAX_EXAMPLES:
            self.examples.append(row)

    def refusal(self, config: DataConfig, new_label_remedy: str) -> str | None:
        """Why the files are refused; None if they have few enough bad rows. For the remedy see `Landing`."""
        limit = config.max_bad_share
        faults = Counter({reason: count for reason, count in self.problems.items() if reason != NEAR})
        num_faulty = self.num_bad - self.problems[NEAR]  # a row that nearly equals a test row is right
        if num_faulty <= limit * self.num_read:
            return None
        reasons = ", ".join(f"{count} × {reason}" for reason, count in faults.most_common())
        # A row is shown with its file if that is not the one that the message names.
        rows = [(bad.file, bad.describe(config.include_texts)) for bad in self.examples[:_SHOWN_EXAMPLES]]
        first = "; ".join(row if file == self.name else f"{file} {row}" for file, row in rows)
        shown = f" The first: {first}." if first else ""
        remedies = {**REMEDIES, "label outside the task's set": new_label_remedy}
        shown += "".join(f" {remedy}" for reason, remedy in remedies.items() if self.problems[reason])
        return (
            f"{self.name}: {num_faulty} of {self.num_read} rows cannot be used "
            f"({num_faulty / self.num_read:.1%}, allowed are {limit:.1%}): {reasons}.{shown} Correct these rows "
            "and land the file again, or raise data.max_bad_share."
        )


def normal_line_ends(text: str) -> str:
    """The text with Unix line ends."""
    return text.replace("\r\n", "\n")


def json_text(value: object) -> str:
    """A cell that JSON cannot hold, such as a date, as text: the `default` of `json.dumps`."""
    return value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else str(value)


_quote = json.JSONEncoder(ensure_ascii=False).encode


def row_digest(*parts: str) -> bytes:
    """SHA-256 of a row's inputs (a chat has several) and its output, or only of its inputs.

    Unicode's form (NFC) and the amount of white space do not change the digest.
    """
    return _sha256(map(normal_part, parts))


def row_digests(inputs: Iterable[str], outputs: Iterable[str]) -> tuple[bytes, bytes]:
    """`row_digest` of a row's inputs and outputs, and of its inputs alone."""
    normal = [normal_part(part) for part in inputs]
    return _sha256([*normal, *map(normal_part, outputs)]), _sha256(normal)


def normal_part(part: str) -> str:
    """A part of a row as it counts in the digest: in Unicode's form NFC, with single spaces, quoted as JSON."""
    return _quote(" ".join(unicodedata.normalize("NFC", part).split()))


def _sha256(normal: Iterable[str]) -> bytes:
    return hashlib.sha256(f"[{', '.join(normal)}]".encode()).digest()


def preference_digest(digest: bytes, rejected: str) -> bytes:
    """Digest of a preference, from that of the row without its worse answer, and the worse answer."""
    return row_digest(digest.hex(), rejected)


def stored_input_digest(kind: Format, stored: str) -> bytes:
    """`Row.input_digest` of an input as a dataset stores it."""
    return row_digest(*input_parts(kind, stored))


def input_parts(kind: Format, stored: str) -> list[str]:
    """An input as a dataset stores it, in the parts of a digest."""
    return [part for message in json.loads(stored) for part in message_parts(message)] if kind == "chat" else [stored]


def message_parts(message: Mapping[str, Any]) -> list[str]:
    """A chat's message as parts of a digest: role, content, and one part for its tools and tool calls, if any."""
    parts = [message["role"], message["content"]]
    if len(message) > len(parts):
        more = {name: value for name, value in message.items() if name not in ("role", "content")}
        parts.append(json.dumps(more, ensure_ascii=False, sort_keys=True))
    return parts
