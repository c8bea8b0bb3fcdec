"""The facts that a version needs to answer, in addition to its adapter (`deal.json`).

The folder of a version holds the PEFT files and `deal.json`. `deal.json` holds the base model's name and digest and the
prompt settings of each task. The base model is not in the folder; it is found when the folder is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from deal_core.config import Quantize
from deal_core.data.chats import ROLES, as_messages, normal_calls, role_of
from deal_core.data.row_checks import normal_input
from deal_core.data.schema import TaskSchema, label_key
from deal_core.errors import AdapterStateError, ConfigError
from deal_core.safe_text import brief
from deal_core.schema_version import VersionedJson

SERVED_FILE = "deal.json"
MAX_INPUT_CHARS = 1_000_000
"""Characters of one input that a version is asked, a whole chat included. Training takes `data.max_text_chars`."""
MAX_INPUT_MESSAGES = 10_000
"""Messages of a chat that a version is asked. The prompt holds only the latest of them."""


class InputRow(NamedTuple):
    """One text to answer. Without a task, the newest task is meant."""

    input: str
    task: str | None = None


@dataclass(frozen=True, kw_only=True)
class ServedTask:
    """A task's schema and its limits for prompt and answer."""

    schema: TaskSchema
    max_prompt_tokens: int
    max_new_tokens: int

    def readable(self, text: str, place: str) -> str:
        """The input in the form in which the task's rows are stored.

        Raises:
            ConfigError: the input is empty, too long or no Unicode, or is no list of messages for a chat task; the
                message names the place.
        """
        if not text.strip():
            raise ConfigError(f"{place} has an empty input; give the text to answer.")
        if len(text) > MAX_INPUT_CHARS:
            raise ConfigError(f"{place} has {len(text):,} characters; give at most {MAX_INPUT_CHARS:,}.")
        if self.schema.format == "chat":
            self._check_chat(as_messages(text) or [{}], place)
        assert self.schema.format != "auto", "a task that was learned has a format"
        stored = normal_input(self.schema.format, text)
        try:
            stored.encode()
        except UnicodeEncodeError:
            raise ConfigError(f"{place} has half of a surrogate pair, which is no character.") from None
        return stored

    def problem_of(self, answer: str) -> str | None:
        """Say that an answer is no label of the task; None: it is one, or the task has no labels."""
        if not self.schema.labels or label_key(answer) in set(map(label_key, self.schema.labels)):
            return None
        return f"the answer is no label of {self.schema.name}"

    def _check_chat(self, messages: Sequence[Mapping[str, Any]], place: str) -> None:
        require_few_messages(len(messages), place)
        if not all(map(_is_message, messages)):
            raise ConfigError(
                f"{place} is of the chat task {self.schema.name}, whose input is a JSON list of messages with role and "
                'content, such as [{"role": "user", "content": "Hello"}].'
            )
        if unknown := [message["role"] for message in messages if role_of(message) not in ROLES]:
            raise ConfigError(
                f"{place} has a message of the role {brief(unknown[0])}; the roles are {', '.join(ROLES)}."
            )


@dataclass(frozen=True, kw_only=True)
class ServedVersion(VersionedJson, what=SERVED_FILE, error=AdapterStateError, version=1):
    """The content of `deal.json`."""

    lineage: str
    base_source: str
    """Source of the base model when the version was made: an id, or a path on that machine."""
    base_name: str
    base_sha256: str
    tasks: tuple[ServedTask, ...]
    newest_task: str
    quantize: Quantize = "none"
    """How the base model's linear layers were quantized when the version was trained and judged."""

    @property
    def held_base(self) -> tuple[str, Quantize]:
        """What tells the base model in memory from others: its digest, and its quantization."""
        return self.base_sha256, self.quantize

    def task(self, name: str | None) -> ServedTask | None:
        """The task of that name; None: the newest."""
        name = self.newest_task if name is None else name
        return next((task for task in self.tasks if task.schema.name == name), None)

    def task_and_input(self, row: InputRow, number: int) -> tuple[ServedTask, str]:
        """The row's task, and its input in the form in which that task's rows are stored.

        Raises:
            ConfigError: the version knows no such task, or the input does not fit it; the message names the row.
        """
        task = self.task(row.task)
        if task is None:
            names = ", ".join(task.schema.name for task in self.tasks)
            raise ConfigError(f"Row {number} names the task {row.task!r}; this version knows {names}.")
        return task, task.readable(row.input, f"Row {number}")

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dict that `from_json` reads back; how a file is read is of no use to a client."""
        tasks = tuple(replace(task, schema=task.schema.as_asked()) for task in self.tasks)
        return super(ServedVersion, replace(self, tasks=tasks)).to_json()


def read_served(folder: Path) -> ServedVersion:
    """Read `deal.json` from an adapter's folder.

    Raises:
        AdapterStateError: the folder has no `deal.json`, or one of another schema version.
    """
    path = folder / SERVED_FILE
    if not path.is_file():
        raise AdapterStateError(
            f"{folder} has no {SERVED_FILE}, so it is not the whole folder of a version; give one that deal version "
            "export wrote."
        )
    return ServedVersion.from_json(json.loads(path.read_text(encoding="utf-8")))


def require_few_messages(number: int, place: str) -> None:
    """Refuse a chat of too many messages, whose texts no prompt has room for.

    Raises:
        ConfigError: there are more than MAX_INPUT_MESSAGES; the message names the place.
    """
    if number > MAX_INPUT_MESSAGES:
        raise ConfigError(f"{place} has {number:,} messages; give the latest {MAX_INPUT_MESSAGES:,} of them.")


def _is_message(message: Mapping[str, Any]) -> bool:
    """Whether a message has a role and a content. With tool calls, the content may be null."""
    if message.keys() == {"role", "content"}:  # most messages; a chat may have thousands
        return type(message["role"]) is type(message["content"]) is str
    rest = {name: value for name, value in message.items() if name not in ("tool_calls", "tools")}
    lists = [message[name] for name in ("tool_calls", "tools") if name in message]
    if rest.get("content", "") is None and message.get("tool_calls"):
        rest["content"] = ""
    return (
        {"role", "content"} <= rest.keys()
        and all(isinstance(value, str) for value in rest.values())
        and all(isinstance(items, list) and all(isinstance(item, dict) for item in items) for items in lists)
        and (not message.get("tool_calls") or normal_calls(message["tool_calls"]) is not None)
    )
