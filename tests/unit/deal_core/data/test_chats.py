"""Chats of every form become the same messages, a bad chat says why, and every turn of a chat can be learned."""

from __future__ import annotations

import json
from collections.abc import Collection, Generator
from pathlib import Path
from typing import Any

import pytest

from deal_core.data.arrow_rows import rows_in
from deal_core.data.chats import MAX_EARLIER_TURNS, earlier_turns, normal_chat, parse_messages
from deal_core.data.columns import Columns
from deal_core.data.reading.batches import RowList
from deal_core.data.reading.readers import read_batches
from deal_core.data.row_checks import RowChecker
from deal_core.data.rows import Problem, RawRow, Row, row_digest, stored_input_digest
from deal_core.data.schema import TaskSchema
from tests.built import Built, build, chat, write_rows

CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
NORMAL_CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
CALLING = {"role": "assistant", "content": None, "tool_calls": [CALL]}
STORED_CALLING = {**CALLING, "content": "", "tool_calls": [NORMAL_CALL]}
RESULT = {"role": "tool", "tool_call_id": "1", "content": "2"}
TOOLS = [{"type": "function", "function": {"name": "add"}}]
SYSTEM = {"role": "system", "content": "Be brief."}


WITH_TOOL = [*chat("1 + 1?"), CALLING, RESULT, *chat("", "2.")[1:]]


def messages_of(cell: object, tools: object = None) -> list[dict[str, Any]]:
    found = parse_messages(cell, tools)
    assert isinstance(found, list)
    return found


def checker(max_text_chars: int = 1000) -> RowChecker:
    columns = Columns(format="chat", names={"messages": "m", "tools": "tools"})
    return RowChecker(TaskSchema(name="t", format="chat"), columns, max_text_chars)


def row_of(messages: object, tools: object = None) -> Row:
    (row,) = rows_in(checker().check(RowList([RawRow(1, {"m": messages, "tools": tools})])).good)
    return row


def test_the_forms_of_a_message_become_one() -> None:
    wanted = chat("Hi\nthere", "Hello")
    parts = [{"type": "text", "text": "Hi"}, {"type": "text", "text": "there"}]
    for cell in (
        wanted,
        json.dumps(wanted),
        [{"from": "human", "value": "Hi\r\nthere"}, {"from": "gpt", "value": "Hello"}],
        [{"role": "user", "content": parts}, *wanted[1:]],
        [{**message, "name": "Jo", "weight": 1, "from": None, "tool_calls": None} for message in wanted],
    ):
        assert messages_of(cell, TOOLS) == wanted, "a chat without tools is stored as ever"


@pytest.mark.parametrize(
    ("system", "asker", "answerer"),
    [("system", "human", "gpt"), ("developer", "user", "assistant"), ("Developer", "HUMAN", "Assistant")],
)
def test_every_name_of_a_role_is_stored_and_asked_as_ours(system: str, asker: str, answerer: str) -> None:
    wanted = [SYSTEM, *chat("Hi", "Hello", "And?", "So.")]
    roles = [system, asker, answerer, asker, answerer]
    plain = [{"role": role, "content": message["content"]} for role, message in zip(roles, wanted, strict=True)]
    sharegpt = [{"from": message["role"], "value": message["content"]} for message in plain]
    assert messages_of(plain) == messages_of(sharegpt) == wanted
    assert normal_chat(plain[:-1]) == wanted[:-1]
    asked = [RawRow(1, {"m": plain[:-1]}), RawRow(2, {"m": sharegpt[:-1]})]
    assert checker().check_inputs(RowList(asked)) == [json.dumps(wanted[:-1])] * 2


@pytest.mark.parametrize("blank", ["", " \r\n"])
def test_a_blank_system_message_at_the_beginning_says_nothing(blank: str) -> None:
    empty = {"role": "system", "content": blank}
    wanted = chat("Hi", "Hello", "And?", "So.")
    assert messages_of([empty, *wanted]) == wanted
    weighed = [empty, *[{**message, "weight": 1} for message in wanted]]
    weighed[-1]["weight"] = 0
    assert isinstance(parse_messages(weighed), Problem), "each message keeps its own cell"
    assert messages_of([empty, *WITH_TOOL], TOOLS) == messages_of(WITH_TOOL, TOOLS)
    assert normal_chat([empty, *wanted[:-1]]) == wanted[:-1]
    assert normal_chat([{**empty, "tools": TOOLS}, *wanted[:1]]) == [{**wanted[0], "tools": TOOLS}]
    assert normal_chat([{**empty, "content": ""}]) == [{**empty, "content": ""}], "a chat has a message"


def test_a_chat_with_tools_keeps_what_a_template_needs() -> None:
    asked, _, _, answer = WITH_TOOL
    stored = [{**asked, "tools": TOOLS}, STORED_CALLING, RESULT, answer]
    filled = [{**message, "tool_calls": message.get("tool_calls"), "name": None} for message in WITH_TOOL]
    for cell, tools in ((WITH_TOOL, TOOLS), (WITH_TOOL, json.dumps(TOOLS)), (filled, TOOLS)):  # Parquet fills in nulls
        assert messages_of(cell, tools) == stored
    offered = [{**TOOLS[0], "strict": None, "parameters": {"a": None, "b": [{"c": None}]}}]
    assert messages_of(WITH_TOOL, offered)[0]["tools"] == [{**TOOLS[0], "parameters": {"b": [{}]}}]
    flat = [asked, {**CALLING, "tool_calls": [{"name": "add", "arguments": {"a": 1}}]}, RESULT, answer]
    assert messages_of(flat)[1]["tool_calls"] == [{k: v for k, v in NORMAL_CALL.items() if k != "id"}]
    broken = {**RESULT, "name": "a\udcff", "tool_call_id": "\udcff"}
    assert messages_of([asked, CALLING, broken, answer])[2] == {"role": "tool", "content": "2"}, "names that are texts"


@pytest.mark.parametrize(
    ("messages", "tools", "why"),
    [
        ("Jane", None, "not JSON"),
        ({"role": "user"}, None, "not a list of messages"),
        ([{"role": "user", "content": 7}], None, "role or content"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], None, "role or content"),
        ([], None, "roles ; wanted"),
        (chat("Jane"), None, "roles user; wanted"),
        ([*chat("Jane"), *chat("b"), *chat("a", "c")[1:]], None, "roles user, user, assistant; wanted"),
        (chat("Jane", "b", "c"), None, "roles user, assistant, user; wanted"),
        ([{"role": "Jane", "content": "a"}], None, "roles (another); wanted"),
        ([*chat("Jane"), CALLING], None, "the last message calls a tool and has no text"),
        ([*chat("Jane"), CALLING, *chat("b", "c")], None, "no message of the tool follows"),
        ([*chat("Jane"), {**CALLING, "tool_calls": [{"name": 1}]}, *WITH_TOOL[2:]], None, "tool_calls is not"),
        (
            [*chat("Jane"), {**CALLING, "tool_calls": [{"name": "f", "arguments": "Jane"}]}, *WITH_TOOL[2:]],
            None,
            "tool_calls is not",
        ),
        *(([*chat("Jane"), *WITH_TOOL[1:]], bad, "tools is not") for bad in ("Jane", [{"name": "\ud800"}])),
        *(([*chat("Jane"), *WITH_TOOL[1:]], bad, "tools is not") for bad in ([{"name": "\0"}], [{"name": b""}])),
        (chat("Jane \ud800", "b"), None, "a byte that is not UTF-8, or a NUL"),
    ],
)
def test_a_bad_chat_says_why_without_a_word_of_it(messages: Any, tools: Any, why: str) -> None:
    found = parse_messages(messages, tools)
    assert isinstance(found, Problem)
    assert why in found.why and "Jane" not in found.why
    assert "Jane" in found.value or "Jane" not in str(messages)


def test_the_digest_of_a_chat_is_that_of_its_stored_input() -> None:
    plain, with_tools = row_of(WITH_TOOL), row_of(WITH_TOOL, TOOLS)
    assert plain.digest != with_tools.digest, "the tools count"
    assert all(row.input_digest == stored_input_digest("chat", row.input) for row in (plain, with_tools))
    assert row_of(chat("a", "b")).digest == row_digest("user", "a", "b"), "as ever"


def test_texts_of_a_chat_are_checked_as_those_of_any_row() -> None:
    chats = {"empty text": chat("a", " "), "over-long text": chat("a" * 10, "b"), "bad encoding": chat("nul \0", "b")}
    raws = [RawRow(number, {"m": messages}) for number, messages in enumerate(chats.values())]
    found = checker(10).check(RowList([*raws, RawRow(9, {"m": chat("a" * 9, "b")})]))
    assert [[problem.reason for problem in problems] for problems in found.bad.values()] == [[each] for each in chats]
    assert found.good.num_rows == 1


# --- turns


def test_every_earlier_answer_is_a_row_with_the_messages_before_it() -> None:
    messages = [*chat("a", "b", "c"), STORED_CALLING, RESULT, *chat("", "d", "e")[1:]]
    found = earlier_turns(json.dumps(messages))
    assert [(json.loads(row.input), row.output) for row in found] == [(messages[:1], "b"), (messages[:5], "d")]
    assert all(row.input_digest == stored_input_digest("chat", row.input) for row in found)
    assert earlier_turns(json.dumps(chat('say "role": "assistant"'))) == []
    long = earlier_turns(json.dumps(chat(*map(str, range(3001)))))
    assert [row.output for row in long] == [str(number) for number in range(3001) if number % 2][-MAX_EARLIER_TURNS:]


CHATS = [chat(f"Hi {i}", f"Hello {i}", f"And {i}?", f"So {i}.", f"Then {i}?", f"End {i}") for i in range(100)]


def built(folder: Path, chats: list[Any], turns: Any = "all", **options: Any) -> Built:
    rows = [each if isinstance(each, dict) else {"messages": each} for each in chats]
    task = TaskSchema(name="t", format="auto", assistant_turns=turns)
    return build(write_rows(folder / "chats.jsonl", rows), task, **options)


def test_all_turns_add_rows_for_training_and_change_no_row(tmp_path: Path) -> None:
    last = built(tmp_path, CHATS, "last")
    train, test = ({tuple(row.items())[:3] for row in last.rows(split)} for split in ("train", "test"))
    every = built(tmp_path, CHATS)
    assert {tuple(row.items())[:3] for row in every.rows("test")} == test, "a test chat is asked for its last answer"
    assert train < {tuple(row.items())[:3] for row in every.rows("train")}
    assert (last.manifest.num_turns, every.manifest.num_turns) == (0, every.manifest.num_train - len(train))
    assert every.manifest.task.assistant_turns == "all"
    assert sum(row["output"].startswith("Hello") for row in every.rows("train")) > len(train) / 2
    firsts = [{json.loads(input)[0]["content"] for input in every.inputs(split)} for split in ("train", "test")]
    assert not firsts[0] & firsts[1]


def test_no_turn_has_the_text_of_a_test_row_in_any_order_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def by_eights(path: Path, columns: Collection[str]) -> Generator[RowList]:
        for batch in read_batches(path, columns):
            rows = batch.rows()
            yield from (RowList(rows[start : start + 8]) for start in range(0, len(rows), 8))

    monkeypatch.setattr("deal_core.data.dataset.read_batches", by_eights)
    beginnings = [each[:2] for each in CHATS] + [each[:4] for each in CHATS]
    digests = set()
    for chats in ([*CHATS, *beginnings], [*beginnings, *CHATS]):
        found = built(tmp_path, chats)
        digests.add(found.manifest.sha256)
        words = {
            split: [int.from_bytes(digest[:4]) for digest in found.input_digests(split)] for split in ("test", "train")
        }
        assert min(words["train"]) > max(words["test"]), "the smallest digests are the test rows'"
    assert len(digests) == 1


def test_only_the_texts_of_given_test_rows_are_left_out(tmp_path: Path) -> None:
    rows = [{"messages": each, "split": "train"} for each in CHATS]
    found = built(tmp_path, [*rows, {"messages": CHATS[0][:2], "split": "test"}]).manifest
    assert (found.num_train, found.num_test, found.num_turns) == (299, 1, 199)
    frozen = [stored_input_digest("chat", json.dumps(CHATS[0][:1]))]
    found = built(tmp_path, CHATS, frozen_test_inputs=frozen).manifest
    assert (found.num_train, found.num_turns, found.num_rejected) == (299, 199, 0)
    found = built(tmp_path, [{"prompt": each[:-1], "completion": each[-1:]} for each in CHATS]).manifest
    assert found.num_turns == 0, "the prompt of a chat in two columns is not learned"


@pytest.mark.parametrize("is_longest_first", [True, False])
def test_a_chat_that_begins_another_one_is_no_duplicate(is_longest_first: bool, tmp_path: Path) -> None:
    """A log that writes each chat again after every answer holds every beginning."""
    chats = []
    for number in range(40):
        whole = chat(f"Hi {number}", "Hello", "How are you?", f"Well {number}")
        chats += [whole, whole[:2]] if is_longest_first else [whole[:2], whole]
    assert "duplicate row" not in built(tmp_path, chats).manifest.problems
    assert built(tmp_path, [*chats, *chats]).manifest.problems["duplicate row"] > 40, "whole repeats still are"
