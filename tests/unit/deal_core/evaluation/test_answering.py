"""The content of deal.json, and which rows fit a version."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from deal_core.errors import ConfigError
from deal_core.evaluation.answering import (
    MAX_INPUT_CHARS,
    MAX_INPUT_MESSAGES,
    InputRow,
    ServedVersion,
    read_served,
)


@pytest.fixture
def version(served_version: ServedVersion) -> ServedVersion:
    return served_version


def test_what_lies_beside_the_adapter_is_read_back(served_folder: Path, version: ServedVersion) -> None:
    assert read_served(served_folder) == version
    schema = version.tasks[1].schema
    label, read = schema.labels[0], {"columns": {"text": "t"}, "assistant_turns": "all"}
    of_a_file = replace(version.tasks[1], schema=replace(schema, label_names={"0": label}, **read))
    assert replace(version, tasks=(version.tasks[0], of_a_file)).to_json() == version.to_json(), "columns are of no use"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (InputRow("x", "nope"), "'nope'; this version knows help, colours"),
        (InputRow(" \n"), "empty input"),
        (InputRow("hello", "help"), "of the chat task help"),
        (InputRow("[]", "help"), "of the chat task"),
        (InputRow('[{"role": "user", "content": null}]', "help"), "of the chat task"),
        (InputRow('[{"role": "user", "content": "a", "tool_calls": [{"function": 3}]}]', "help"), "of the chat task"),
        (InputRow('[{"role": "\\ud800", "content": "a"}]', "help"), r"the role '\\ud800'"),
        (InputRow("half \ud800"), "half of a surrogate pair"),
        (InputRow('[{"role": "user", "content": "a", "tools": [{"\\udfff": 1}]}]', "help"), "half of a"),
        (InputRow("a" * (MAX_INPUT_CHARS + 1)), "1,000,001 characters"),
        (
            InputRow(json.dumps([{"role": "user", "content": "a"}] * (MAX_INPUT_MESSAGES + 1)), "help"),
            "10,001 messages",
        ),
    ],
)
def test_a_row_that_cannot_be_asked_is_named(version: ServedVersion, row: InputRow, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^Row 2 .*{message}"):
        version.task_and_input(row, 2)


def test_what_is_asked_is_normalised_as_learned_rows_are(version: ServedVersion) -> None:
    asked = [
        version.task_and_input(row, 1)[1]
        for row in (
            InputRow(" the sea\r\nis green\n"),
            InputRow(json.dumps([{"role": "user", "content": "a\r\nb "}]), "help"),
        )
    ]
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "add", "arguments": '{"a": 1}'}]}
    chat = [{"role": "user", "content": "a", "tools": [{"name": "add"}]}, call, {"role": "tool", "content": "2"}]
    stored = json.loads(version.task_and_input(InputRow(json.dumps(chat), "help"), 1)[1])
    assert (stored[0], stored[2], stored[1]["content"]) == (chat[0], chat[2], "")
    assert stored[1]["tool_calls"] == [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]
    assert asked == ["the sea\nis green", json.dumps([{"role": "user", "content": "a\nb "}])]
