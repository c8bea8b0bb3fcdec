"""Chats of every form become the same messages, a bad chat says why, and every turn of a chat can be learned."""

from __future__ import annotations

import json
from collections.abc import Collection, Generator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from deal_core.config import DataConfig
from deal_core.data.chats import MAX_EARLIER_TURNS, earlier_turns, normal_chat, parse_messages
from deal_core.data.check import RowChecker
from deal_core.data.columns import Columns
from deal_core.data.dataset import Landing, build_dataset
from deal_core.data.good_rows import rows_in
from deal_core.data.reading.batches import RowList
from deal_core.data.reading.readers import read_batches
from deal_core.data.rows import Problem, RawRow, row_digest, stored_input_digest
from deal_core.data.schema import DatasetManifest, TaskSchema
from deal_core.data.source_files import files_at

CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
NORMAL_CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
CALLING = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "1", "content": "2"}
TOOLS = [{"type": "function", "function": {"name": "add"}}]


def chat(*contents: str) -> list[dict[str, Any]]:
    """A chat whose first message is the user's."""
    return [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(contents)]


def test_the_forms_of_a_message_become_one() -> None:
    wanted = chat("Hi\nthere", "Hello")
    assert parse_messages(wanted) == wanted
    assert parse_messages(json.dumps(wanted)) == wanted
    assert parse_messages([{"from": "human", "value": "Hi\r\nthere"}, {"from": "gpt", "value": "Hello"}]) == wanted
    parts = [{"type": "text", "text": "Hi"}, {"type": "text", "text": "there"}]
    assert parse_messages([{"role": "user", "content": parts}, *wanted[1:]]) == wanted
    more = [{**message, "name": "Jo", "weight": 1, "from": None, "tool_calls": None} for message in wanted]
    assert parse_messages(more, TOOLS) == wanted, "a chat without tools is stored as ever"


@pytest.mark.parametrize(
    ("system", "asker", "answerer"),
    [
        ("system", "human", "gpt"),
        ("developer", "user", "assistant"),
        ("Developer", "Human", "GPT"),
        ("SYSTEM", "User", "Assistant"),
    ],
)
def test_every_name_of_a_role_is_stored_and_asked_as_ours(system: str, asker: str, answerer: str) -> None:
    wanted = [{"role": "system", "content": "Be brief."}, *chat("Hi", "Hello", "And?", "So.")]
    roles = [system, asker, answerer, asker, answerer]
    plain = [{"role": role, "content": message["content"]} for role, message in zip(roles, wanted, strict=True)]
    sharegpt = [{"from": message["role"], "value": message["content"]} for message in plain]
    assert parse_messages(plain) == parse_messages(sharegpt) == wanted
    assert normal_chat(plain[:-1]) == wanted[:-1]
    checker = RowChecker(TaskSchema(name="t", format="chat"), Columns(format="chat", names={"messages": "m"}), 1000)
    for asked in (plain[:-1], sharegpt[:-1]):
        assert checker.check_inputs(RowList([RawRow(1, {"m": asked})])) == [json.dumps(wanted[:-1])]


@pytest.mark.parametrize("blank", ["", " \r\n"])
def test_a_blank_system_message_at_the_beginning_says_nothing(blank: str) -> None:
    empty = {"role": "system", "content": blank}
    wanted = chat("Hi", "Hello", "And?", "So.")
    assert parse_messages([empty, *wanted]) == wanted
    weighed = [empty, *[{**message, "weight": 1} for message in wanted]]
    weighed[-1]["weight"] = 0
    assert isinstance(parse_messages(weighed), Problem), "each message keeps its own cell"
    called = [*chat("1 + 1?"), CALLING, RESULT, *chat("", "2.")[1:]]
    assert parse_messages([empty, *called], TOOLS) == parse_messages(called, TOOLS)
    assert normal_chat([empty, *wanted[:-1]]) == wanted[:-1]
    assert normal_chat([{**empty, "tools": TOOLS}, *wanted[:1]]) == [{**wanted[0], "tools": TOOLS}]
    assert normal_chat([{**empty, "content": ""}]) == [{**empty, "content": ""}], "a chat has a message"


def test_a_chat_with_tools_keeps_what_a_template_needs() -> None:
    asked, answer = {"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2."}
    messages = [asked, CALLING, RESULT, answer]
    stored = [{**asked, "tools": TOOLS}, {**CALLING, "content": "", "tool_calls": [NORMAL_CALL]}, RESULT, answer]
    assert parse_messages(messages, TOOLS) == parse_messages(messages, json.dumps(TOOLS)) == stored
    filled = [{**message, "tool_calls": message.get("tool_calls"), "name": None} for message in messages]
    assert parse_messages(filled, TOOLS) == stored, "Parquet fills what is missing with null"
    offered = [{**TOOLS[0], "strict": None, "parameters": {"a": None, "b": [{"c": None}]}}]
    assert parse_messages(messages, offered)[0]["tools"] == [{**TOOLS[0], "parameters": {"b": [{}]}}]  # type: ignore[call-overload]
    flat = [asked, {**CALLING, "tool_calls": [{"name": "add", "arguments": {"a": 1}}]}, RESULT, answer]
    assert parse_messages(flat)[1]["tool_calls"] == [{k: v for k, v in NORMAL_CALL.items() if k != "id"}]  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("messages", "tools", "why"),
    [
        ("Jane", None, "not JSON"),
        ({"role": "user"}, None, "not a list of messages"),
        ([{"role": "user", "content": 7}], None, "a message's role or content is missing or is not a text"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], None, "is not a text"),
        ([], None, "roles ; wanted"),
        (chat("Jane"), None, "roles user; wanted"),
        ([*chat("Jane"), *chat("b"), *chat("a", "c")[1:]], None, "roles user, user, assistant; wanted"),
        (chat("Jane", "b", "c"), None, "roles user, assistant, user; wanted are system (or none), then user and"),
        ([{"role": "Jane", "content": "a"}], None, "roles (another); wanted"),
        ([*chat("Jane"), CALLING], None, "the last message calls a tool and has no text"),
        ([*chat("Jane"), CALLING, *chat("b", "c")], None, "no message of the tool follows"),
        (
            [*chat("Jane"), {**CALLING, "tool_calls": [{"name": 1}]}, RESULT, *chat("", "c")[1:]],
            None,
            "is not a list of",
        ),
        (
            [
                *chat("Jane"),
                {**CALLING, "tool_calls": [{"name": "f", "arguments": "Jane"}]},
                RESULT,
                *chat("", "c")[1:],
            ],
            None,
            "tool_calls is not a list of",
        ),
        ([*chat("Jane"), CALLING, RESULT, *chat("", "c")[1:]], "Jane", "tools is not a list of tools"),
        ([*chat("Jane"), CALLING, RESULT, *chat("", "c")[1:]], [{"name": "\ud800"}], "tools is not a list of tools"),
        ([*chat("Jane"), CALLING, RESULT, *chat("", "c")[1:]], [{"name": "\0"}], "tools is not a list of tools"),
        ([*chat("Jane"), CALLING, RESULT, *chat("", "c")[1:]], [{"name": b""}], "tools is not a list of tools"),
        (chat("Jane \ud800", "b"), None, "a byte that is not UTF-8, or a NUL"),
    ],
)
def test_a_bad_chat_says_why_without_a_word_of_it(messages: Any, tools: Any, why: str) -> None:
    found = parse_messages(messages, tools)
    assert isinstance(found, Problem)
    assert why in found.why and "Jane" not in found.why
    assert "Jane" in found.value or "Jane" not in str(messages)


def test_the_digest_of_a_chat_is_that_of_its_stored_input() -> None:
    checker = RowChecker(
        TaskSchema(name="t", format="chat"), Columns(format="chat", names={"messages": "m", "tools": "tools"}), 1000
    )
    found = {}
    for tools in (None, TOOLS):
        messages = [*chat("1 + 1?"), CALLING, RESULT, *chat("", "2.")[1:]]
        (row,) = rows_in(checker.check(RowList([RawRow(1, {"m": messages, "tools": tools})])).good)
        assert row.input_digest == stored_input_digest("chat", row.input)
        found[row.digest] = row.input
    assert len(found) == 2, "the tools count"
    (plain,) = rows_in(checker.check(RowList([RawRow(1, {"m": chat("a", "b")})])).good)
    assert plain.digest == row_digest("user", "a", "b"), "as ever"


def test_texts_of_a_chat_are_checked_as_those_of_any_row() -> None:
    checker = RowChecker(TaskSchema(name="t", format="chat"), Columns(format="chat", names={"messages": "m"}), 10)
    for messages, reason in (
        (chat("a", " "), "empty text"),
        (chat("a" * 11, "b"), "over-long text"),
        (chat("nul \0", "b"), "bad encoding"),
    ):
        ((problem,),) = checker.check(RowList([RawRow(1, {"m": messages})])).bad.values()
        assert problem.reason == reason


# --- turns


def test_every_earlier_answer_is_a_row_with_the_messages_before_it() -> None:
    messages = [
        *chat("a", "b"),
        *chat("c"),
        {**CALLING, "content": "", "tool_calls": [NORMAL_CALL]},
        RESULT,
        *chat("", "d")[1:],
        *chat("e"),
    ]
    stored = json.dumps(messages)
    found = earlier_turns(stored)
    assert [(json.loads(row.input), row.output) for row in found] == [(messages[:1], "b"), (messages[:5], "d")]
    assert all(row.input_digest == stored_input_digest("chat", row.input) for row in found)
    assert earlier_turns(json.dumps(chat('say "role": "assistant"'))) == []


def test_a_chat_of_very_many_turns_gives_its_latest_ones_only() -> None:
    found = earlier_turns(json.dumps(chat(*map(str, range(3001)))))
    assert [row.output for row in found] == [str(number) for number in range(3001) if number % 2][-MAX_EARLIER_TURNS:]


CHATS = [chat(f"Hi {i}", f"Hello {i}", f"And {i}?", f"So {i}.", f"Then {i}?", f"End {i}") for i in range(100)]


def build(folder: Path, chats: list[Any], turns: Any, **options: Any) -> DatasetManifest:
    source = folder / "chats.jsonl"
    rows = [each if isinstance(each, dict) else {"messages": each} for each in chats]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = TaskSchema(name="t", format="auto", assistant_turns=turns)
    config = DataConfig(max_bad_share=1.0)
    return build_dataset(Landing(sources=files_at(source), task=task, config=config, **options), folder / "dataset")


def stored(folder: Path, split: str) -> dict[tuple[str, str], str]:
    """Digests of the stored rows."""
    table = pq.read_table(folder / "dataset" / f"{split}.parquet")
    return {(row["input"], row["output"]): row["sha256"] for row in table.to_pylist()}


def test_all_turns_add_rows_for_training_and_change_no_row(tmp_path: Path) -> None:
    last = build(tmp_path, CHATS, "last")
    train, test = stored(tmp_path, "train"), stored(tmp_path, "test")
    every = build(tmp_path, CHATS, "all")
    assert stored(tmp_path, "test") == test, "a test chat is asked for its last answer"
    assert train.items() < stored(tmp_path, "train").items()
    assert (last.num_turns, every.num_turns) == (0, len(stored(tmp_path, "train")) - len(train))
    assert every.num_read + every.num_turns == every.num_train + every.num_test + every.num_rejected
    assert every.task.assistant_turns == "all"
    learned = {output for _, output in stored(tmp_path, "train")}
    assert len([each for each in learned if each.startswith("Hello")]) > len(train) / 2
    of_tests = {json.loads(input)[0]["content"] for input, _ in test}
    assert not of_tests & {json.loads(input)[0]["content"] for input, _ in stored(tmp_path, "train")}


def first_word(input: str) -> int:
    return int.from_bytes(stored_input_digest("chat", input)[:4])


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
        digests.add(build(tmp_path, chats, "all").sha256)
        asked = {input for input, _ in stored(tmp_path, "test")}
        assert asked and not asked & {input for input, _ in stored(tmp_path, "train")}
        words = {split: [first_word(input) for input, _ in stored(tmp_path, split)] for split in ("test", "train")}
        assert min(words["train"]) > max(words["test"]), "the smallest digests are the test rows'"
    assert len(digests) == 1


def test_with_a_split_only_the_texts_of_its_test_rows_are_left_out(tmp_path: Path) -> None:
    rows = [{"messages": each, "split": "train"} for each in CHATS]
    rows.append({"messages": CHATS[0][:2], "split": "test"})
    manifest = build(tmp_path, rows, "all")
    assert (manifest.num_train, manifest.num_test, manifest.num_turns) == (299, 1, 199)


def test_with_frozen_test_rows_only_their_texts_are_left_out(tmp_path: Path) -> None:
    frozen = [stored_input_digest("chat", json.dumps(CHATS[0][:1]))]
    manifest = build(tmp_path, CHATS, "all", frozen_test_inputs=frozen)
    assert (manifest.num_train, manifest.num_turns, manifest.num_rejected) == (299, 199, 0)


def test_the_prompt_of_a_chat_in_two_columns_is_not_learned(tmp_path: Path) -> None:
    manifest = build(tmp_path, [{"prompt": each[:-1], "completion": each[-1:]} for each in CHATS], "all")
    assert manifest.num_turns == 0 and manifest.num_train + manifest.num_test == 100


@pytest.mark.parametrize("is_longest_first", [True, False])
def test_a_chat_that_begins_another_one_is_no_duplicate(is_longest_first: bool, tmp_path: Path) -> None:
    """A log that writes each chat again after every answer holds every beginning."""
    chats = []
    for number in range(40):
        whole = chat(f"Hi {number}", "Hello", "How are you?", f"Well {number}")
        chats += [whole, whole[:2]] if is_longest_first else [whole[:2], whole]
    found = build(tmp_path, chats, "all")
    assert "duplicate row" not in found.problems
    assert found.num_read + found.num_turns == found.num_train + found.num_test + found.num_rejected
    assert build(tmp_path, [*chats, *chats], "all").problems["duplicate row"] > 40, "whole repeats still are"


def test_a_tools_name_that_is_no_text_is_left_out() -> None:
    bad = {**RESULT, "name": "a\udcff", "tool_call_id": "\udcff"}
    found = parse_messages([*chat("1+1?"), CALLING, bad, {"role": "assistant", "content": "2"}])
    assert not isinstance(found, Problem) and found[2] == {"role": "tool", "content": "2"}
