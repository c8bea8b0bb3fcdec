"""Chats: messages in one form, from the forms in which people keep them, and the turns of a chat as rows.

A message is stored as {role, content}. A message that calls tools also has `tool_calls`, a tool's message may have
`tool_call_id` and `name`, and the first message has the chat's `tools`, if there are any.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import pairwise
from typing import Any

from deal_core.data.rows import Problem, Row, message_parts, normal_line_ends, row_digests
from deal_core.safe_text import shorten

Message = dict[str, Any]

MAX_EARLIER_TURNS = 100
"""Most turns of one chat that become rows besides its last turn; the latest count. Each row repeats the turns before
it, so a chat of thousands of turns would fill the memory."""
UNDECODABLE = re.compile("[\x00\ud800-\udfff]")
NOT_UTF8 = "a byte that is not UTF-8, or a NUL"
_MAY_FOLLOW = {
    "system": ("",),
    "user": ("", "system", "assistant"),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}
"""The roles before a role; "": the chat begins."""
ROLES = tuple(_MAY_FOLLOW)
_ROLES = {**{role: role for role in _MAY_FOLLOW}, "human": "user", "gpt": "assistant", "developer": "system"}
"""Names of a role → the role. ShareGPT says human and gpt, and OpenAI says developer."""
_PLAIN_TURNS = ["user", "assistant"] * 8
_CALL = '{"function": {"name": …, "arguments": …}}'


def as_messages(value: object) -> list[dict[str, Any]] | None:
    """A cell's messages as they are; None if the cell is not a list of dicts, or its JSON."""
    cells = _from_json(value)
    if isinstance(cells, list) and cells and all(isinstance(message, dict) for message in cells):
        return cells
    return None


def parse_messages(value: object, tools: object = None, *, learns_every_turn: bool = False) -> list[Message] | Problem:
    """The messages of a cell, in the form in which they are stored. The last one is the assistant's answer.

    `tools` is the cell of the chat's tools. It counts only if the chat uses a tool. An answer that would be learned,
    although its `weight` is 0 (OpenAI's word for "not to be learned"), is a problem.
    """

    def malformed(why: str, shown: str | None = None) -> Problem:
        return Problem("malformed messages", f"{shown or why}: {shorten(value)}", why)

    cells = _from_json(value)
    if isinstance(cells, str):
        return malformed("not JSON")
    if not isinstance(cells, list) or not all(isinstance(message, dict) for message in cells):
        return malformed("not a list of messages")
    messages = [_role_and_content(message) for message in cells]
    if not all(isinstance(message["role"], str) and isinstance(message["content"], str) for message in messages):
        return malformed("a message's role or content is missing or is not a text")
    if _begins_blank(messages):
        messages, cells = messages[1:], cells[1:]
    if bad := UNDECODABLE.search("\n".join(part for message in messages for part in message.values())):
        return Problem("bad encoding", f"{shorten(bad.group())} in {shorten(value)}", NOT_UTF8)
    roles = [message["role"] for message in messages]
    if not _are_in_order(roles):
        wanted = (
            "wanted are system (or none), then user and assistant in turn; tool messages may follow the assistant's"
        )
        ours = ", ".join(role if role in _MAY_FOLLOW else "(another)" for role in roles)
        return malformed(f"roles {shorten(ours)}; {wanted}", f"roles {shorten(', '.join(roles))}; {wanted}")
    is_left_out = [
        message["role"] == "assistant" and cell.get("weight") == 0
        for message, cell in zip(messages, cells, strict=True)
    ]
    if is_left_out[-1]:
        return malformed("the last answer has weight 0, so there is no answer to learn")
    if learns_every_turn and any(is_left_out):
        return malformed("an earlier answer has weight 0, and all are learned; set task.assistant_turns to last")
    why = _add_tools(messages, cells, tools)
    return malformed(why) if why else messages


def is_any_empty(messages: Sequence[Message]) -> bool:
    """Whether a message without a tool call is empty. The result of a tool may be empty."""
    return any(
        not message["content"].strip() and message["role"] != "tool" and "tool_calls" not in message
        for message in messages
    )


def split_answers(cell: object) -> tuple[object, list[str]]:
    """A cell of messages whose last content lists right answers: the cell with the first of them, and all of them.

    Any other cell stays as it is, and the list is empty.
    """
    messages = as_messages(cell)
    name = "content" if messages and "content" in messages[-1] else "value"
    answers = messages[-1].get(name) if messages else None
    lists_texts = isinstance(answers, list) and all(type(text) is str for text in answers)
    if not messages or not answers or not lists_texts:
        return cell, []
    return [*messages[:-1], {**messages[-1], name: answers[0]}], list(dict.fromkeys(answers))


def chat_row(messages: Sequence[Message], others: Sequence[str] = ()) -> Row:
    """The row whose answer is the last message; `others` are further right answers."""
    *earlier, last = messages
    parts = [part for message in earlier for part in message_parts(message)]
    input, answers = json.dumps(earlier, ensure_ascii=False), (last["content"], *others)
    references = answers if others else ()
    return Row(input, answers[0], *row_digests(parts, answers), references)


def earlier_turns(stored: str) -> list[Row]:
    """A row for every answer of the assistant in a stored input, with the messages before it as the row's input.

    A message that calls a tool is no answer: it is part of the inputs of later answers.
    """
    if '"role": "assistant"' not in stored:
        return []
    messages: list[Message] = json.loads(stored)
    is_answer = [message["role"] == "assistant" and "tool_calls" not in message for message in messages]
    ends = [end for end, ends_turn in enumerate(is_answer, 1) if ends_turn]
    return [chat_row(messages[:end]) for end in ends[-MAX_EARLIER_TURNS:]]


def normal_chat(messages: Sequence[Mapping[str, Any]]) -> list[Message]:
    """Messages that a client asks with, in the form in which rows are stored; their order is not checked."""
    normal = [
        {**message, "role": role_of(message), "content": normal_line_ends(message["content"] or "")}
        for message in messages
    ]
    if _begins_blank(normal):
        offered = {"tools": normal[0]["tools"]} if "tools" in normal[0] else {}
        normal = [{**normal[1], **offered}, *normal[2:]]
    for message in normal:
        if message.get("tool_calls") and (calls := normal_calls(message["tool_calls"])):
            message["tool_calls"] = calls
    return normal


def _from_json(value: object) -> object:
    if isinstance(value, str):
        with suppress(ValueError, RecursionError):
            return json.loads(value)
    return value


def role_of(message: Mapping[str, Any]) -> Any:
    """The message's role by our name; a role that is not known stays as it is."""
    role = message.get("role")
    if type(role) is str and role in _MAY_FOLLOW:  # most messages
        return role
    role = message.get("from") if role is None else role  # ShareGPT
    return _ROLES.get(role.casefold(), role) if isinstance(role, str) else role


def _begins_blank(messages: Sequence[Message]) -> bool:
    """Whether the chat begins with a system message that says nothing. Exports write one if there was none."""
    return len(messages) > 1 and messages[0]["role"] == "system" and not messages[0]["content"].strip()


def _role_and_content(message: Mapping[str, Any]) -> Message:
    role, content = message.get("role"), message.get("content")
    if type(role) is str and type(content) is str:  # most messages; with the next fast path, a chat takes a fifth less
        return {"role": role if role in _MAY_FOLLOW else role_of(message), "content": normal_line_ends(content)}
    if role is None and "from" in message:  # ShareGPT
        content = message.get("value")
    role = role_of(message)
    if isinstance(content, list) and content and all(isinstance(p, dict) and p.get("type") == "text" for p in content):
        texts = [part.get("text") for part in content]
        content = "\n".join(texts) if all(isinstance(text, str) for text in texts) else None
    if content is None and message.get("tool_calls"):
        content = ""
    return {"role": role, "content": normal_line_ends(content) if isinstance(content, str) else content}


def _are_in_order(roles: list[str]) -> bool:
    if roles == _PLAIN_TURNS[: len(roles)]:  # most chats
        return roles[-1:] == ["assistant"]
    pairs = pairwise(["", *roles])
    return roles[-1:] == ["assistant"] and all(before in _MAY_FOLLOW.get(role, ()) for before, role in pairs)


def _add_tools(messages: Sequence[Message], cells: Sequence[Mapping[str, Any]], tools: object) -> str | None:
    """Add what a chat template needs for tools, except calls with a text that no tool answers; return what is wrong."""
    if all(message["role"] != "tool" and message["content"].strip() for message in messages):
        return None
    followers = [*(message["role"] for message in messages[1:]), ""]
    calling = [
        message["role"] == "assistant"
        and bool(cell.get("tool_calls"))
        and (after == "tool" or not message["content"].strip())
        for message, cell, after in zip(messages, cells, followers, strict=True)
    ]
    if calling[-1]:
        return "the last message calls a tool and has no text, so there is no answer to learn"
    for message, cell, calls_tool, after in zip(messages, cells, calling, followers, strict=True):
        if calls_tool:
            calls = normal_calls(cell["tool_calls"])
            if calls is None:
                return f"tool_calls is not a list of {_CALL}"
            if after != "tool":
                return "a message calls a tool, and no message of the tool follows"
            message["tool_calls"] = calls
        elif message["role"] == "tool":
            message |= {
                name: cell[name]
                for name in ("tool_call_id", "name")
                if cell.get(name) and type(cell[name]) is str and not UNDECODABLE.search(cell[name])
            }
    if not any(calling) and not any(message["role"] == "tool" for message in messages):
        return None  # a message is empty
    offered = _plain_json(_from_json(tools))
    if isinstance(offered, list) and all(isinstance(tool, dict) for tool in offered):
        if offered:
            messages[0]["tools"] = offered
        return None
    return None if tools is None or tools == "" else "tools is not a list of tools"


def normal_calls(calls: object) -> list[Message] | None:
    """Tool calls in the form that chat templates expect, with arguments as an object; None if they are malformed."""
    plain = _plain_json(calls)
    if not isinstance(plain, list) or not all(isinstance(call, dict) for call in plain):
        return None
    normal = []
    for call in plain:
        function = call.get("function", call)
        name = function.get("name") if isinstance(function, dict) else None
        arguments = _from_json(function.get("arguments", {})) if isinstance(name, str) else None
        if not isinstance(arguments, dict):
            return None
        own = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        normal.append({**own, "type": "function", "function": {"name": name, "arguments": arguments}})
    return normal


def _plain_json(value: object) -> object:
    """The value as JSON has it, without nulls: Parquet fills missing keys with null. None if it is no JSON."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        return None if UNDECODABLE.search(text) or "\\u0000" in text else _without_nulls(json.loads(text))
    except (TypeError, ValueError, RecursionError):
        return None


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nulls(inner) for name, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value
