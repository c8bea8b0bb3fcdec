"""From a stored row to token ids: the prompt for the model, and the answer that it learns."""

from __future__ import annotations

import json
import string
from bisect import bisect_left
from collections.abc import Callable
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

from jinja2 import TemplateError

from deal_core.base_model.turn_ends import end_id
from deal_core.data.chats import Message
from deal_core.data.schema import DEFAULT_TEMPLATE, OPTIONS_SEPARATOR, TaskSchema
from deal_core.errors import ConfigError
from deal_core.safe_text import shorten

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


MAX_CHARS_PER_TOKEN = 64
"""A longer text than this for every token of a prompt does not fit, so it need not be tokenised to know that. Usual
texts have two to five characters a token; only a flood of blanks has more than this."""


class CutPrompt(NamedTuple):
    """A prompt's token ids, and whether the row's text was cut."""

    ids: list[int]
    is_cut: bool


class _Chat(NamedTuple):
    """Messages of a chat, and the tools that its template offers."""

    messages: list[Message]
    tools: list[Message] | None


def render_prompt(task: TaskSchema, input: str, tokenizer: PreTrainedTokenizerBase | None) -> str:
    r"""The prompt of one row.

    A labelled task asks "{instruction}\nOption: {a, b, c}\n{text}\nAnswer:"; lines without content are left out. A
    completion is the unchanged prompt, under the instruction if the task has one. A chat is rendered by the tokenizer's
    chat template. With the task's `prompt: chat`, the prompt of a labelled task or of a completion is the one message
    of a chat, without the line "Answer:".

    `input` is as stored, and the task's format must not be "auto". Only a chat template needs the tokenizer.

    Raises:
        ConfigError: The tokenizer has no chat template, and the task needs one.
    """
    if task.format == "chat":
        chat = _chat_of(task, input)
    else:
        before, after = _around_text(task)
        if not task.uses_chat_template:
            return before + input + after
        chat = _one_message(before + input + after)
    assert tokenizer is not None, "a chat needs the tokenizer's template"
    return _render_chat(task, chat, tokenizer)


def readable_prompt(task: TaskSchema, input: str) -> str:
    """The prompt for people and other models: without the base model's chat template."""
    if task.format != "chat":
        before, after = _around_text(task)
        return before + input + after
    chat = _chat_of(task, input)
    return "\n".join(f"{message['role']}: {message['content']}" for message in chat.messages)


def _around_text(task: TaskSchema) -> tuple[str, str]:
    """What stands before and after the text in the task's template, with the instruction and the options."""
    if task.format == "auto":
        raise ConfigError(f"Task {task.name} has format auto; use the schema in its dataset's manifest.")
    template = task.template if task.template is not None else _default_template(task)
    values = {"instruction": task.instruction.strip(), "options": OPTIONS_SEPARATOR.join(task.labels)}
    sides = [""]
    for literal, name, _, _ in string.Formatter().parse(template):
        sides[-1] += literal
        if name == "text":
            sides.append("")
        elif name is not None:
            sides[-1] += values[name]
    before, after = sides
    return before, after


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, task: TaskSchema, input: str, max_prompt_tokens: int
) -> list[int]:
    """Token ids of a row's prompt, at most `max_prompt_tokens` of them.

    The text of a longer prompt is cut at its end; the instruction, the options and "Answer:" are never cut. A chat
    first loses its oldest turns. Special tokens are those that the tokenizer adds by default: a beginning token for
    decoders that have one, the end token for T5's encoder.

    Raises:
        ConfigError: The prompt is too long even with an empty text.
    """
    return cut_prompt(tokenizer, task, input, max_prompt_tokens).ids


def cut_prompt(tokenizer: PreTrainedTokenizerBase, task: TaskSchema, input: str, max_prompt_tokens: int) -> CutPrompt:
    """As `encode_prompt`, and whether the text was cut."""
    if task.format == "chat":
        return _encode_chat(tokenizer, task, _chat_of(task, input), max_prompt_tokens)
    before, after = _around_text(task)

    def encode(shortened: str) -> list[int]:
        prompt = before + shortened + after
        if task.prompt == "chat":
            return _encode_rendered(tokenizer, _render_chat(task, _one_message(prompt), tokenizer))
        return _encode(tokenizer, prompt)

    return _encode_shortened(encode, input, task, max_prompt_tokens)


def answer_text(task: TaskSchema, output: str) -> str:
    """An answer as it follows the prompt: after a blank, except in a chat."""
    return output if task.uses_chat_template or output[:1].isspace() else " " + output


def encode_answer(
    tokenizer: PreTrainedTokenizerBase, task: TaskSchema, output: str, max_answer_tokens: int
) -> list[int]:
    """Token ids of a row's answer (see `answer_text`), and its end token (see `turn_ends.end_id`).

    The answer is tokenised apart from the prompt, so the prompt's ids are the same in training and in generation. A
    longer answer is cut but keeps the end token, because generation must learn to stop.

    Raises:
        ConfigError: The tokenizer has no end token.
    """
    ids = tokenizer(answer_text(task, output), add_special_tokens=False, verbose=False)["input_ids"]
    return [*ids[: max_answer_tokens - 1], end_id(tokenizer, in_chat=task.uses_chat_template)]


def _default_template(task: TaskSchema) -> str:
    if task.format == "completion":
        return "{instruction}\n{text}" if task.instruction.strip() else "{text}"
    template = DEFAULT_TEMPLATE
    if not task.instruction.strip():
        template = template.replace("{instruction}\n", "")
    if task.prompt == "chat":  # the chat template says where the answer begins
        template = template.removesuffix("\nAnswer:")
    return template if task.labels else template.replace("Option: {options}\n", "")


def _encode(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    ids: list[int] = tokenizer(prompt, verbose=False)["input_ids"]
    # A decoder's tokenizer may be set to add an end token. It is removed, because the answer follows the prompt. T5 has
    # no beginning token, and its encoder expects the end token.
    adds_end = len(ids) > 1 and ids[-1] == tokenizer.eos_token_id and not prompt.endswith(str(tokenizer.eos_token))
    return ids[:-1] if adds_end and tokenizer.bos_token_id is not None else ids


def _encode_shortened(
    encode: Callable[[str], list[int]], text: str, task: TaskSchema, max_prompt_tokens: int
) -> CutPrompt:
    """Ids with the longest beginning of the text that fits; the search is a bisection."""
    max_chars = MAX_CHARS_PER_TOKEN * max_prompt_tokens
    if len(text) <= max_chars and len(ids := encode(text)) <= max_prompt_tokens:
        return CutPrompt(ids, is_cut=False)
    best = encode("")
    if len(best) > max_prompt_tokens:
        raise ConfigError(
            f"The prompt of task {task.name} takes {len(best)} tokens without any text, more than max_prompt_tokens = "
            f"{max_prompt_tokens}; raise train.max_prompt_tokens or shorten the task's instruction and labels."
        )
    fits, too_long = 0, len(text)
    while too_long - fits > 1:
        middle = (fits + too_long) // 2
        if middle <= max_chars and len(ids := encode(text[:middle])) <= max_prompt_tokens:
            fits, best = middle, ids
        else:
            too_long = middle
    return CutPrompt(best, is_cut=True)


def _one_message(prompt: str) -> _Chat:
    return _Chat([{"role": "user", "content": prompt}], None)


def _chat_of(task: TaskSchema, input: str) -> _Chat:
    messages: list[Message] = json.loads(input)
    tools = messages[0].pop("tools", None)
    if task.instruction.strip() and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": task.instruction.strip()}, *messages]
    return _Chat(messages, tools)


def _render_chat(task: TaskSchema, chat: _Chat, tokenizer: PreTrainedTokenizerBase) -> str:
    if not tokenizer.chat_template:
        is_chat = task.format == "chat"
        cause = "is made of chats" if is_chat else "has prompt: chat"
        other = "rows of prompt and completion" if is_chat else "task.prompt: plain"
        raise ConfigError(
            f"Task {task.name} {cause}, and the base model's tokenizer has no chat template; use an "
            f"instruction-tuned base model, or {other}."
        )
    more: dict[str, Any] = {"tools": chat.tools} if chat.tools else {}
    try:
        rendered = str(tokenizer.apply_chat_template(chat.messages, add_generation_prompt=True, tokenize=False, **more))
    except TemplateError as error:
        raise ConfigError(
            f"The base model's chat template cannot write a chat of task {task.name} ({shorten(str(error), 160)}); use "
            "a base model whose template can, or leave these chats out."
        ) from error
    if missing := _not_shown(chat, rendered):
        raise ConfigError(
            f"The base model's chat template leaves out the {missing} of a chat of task {task.name}, so the model "
            "would not see what it answers. Use a base model whose template shows tools, or leave these chats out."
        )
    return rendered


def _not_shown(chat: _Chat, rendered: str) -> str | None:
    """The part of a chat with tools that a template has left out; None if all of it is there."""
    calls = [call for message in chat.messages for call in message.get("tool_calls", ())]
    names = [call["function"]["name"] for call in calls if "function" in call]
    if not all(name in rendered for name in names):
        return "tool calls"
    for message in chat.messages:
        result = message["content"].strip() if message["role"] == "tool" else ""
        spellings = (result, json.dumps(result)[1:-1], json.dumps(result, ensure_ascii=False)[1:-1])
        if not any(spelling in rendered for spelling in spellings):
            return "tool messages"
    offered = [tool.get("function", tool).get("name") for tool in chat.tools or ()]
    return "tools" if any(isinstance(name, str) and name not in rendered for name in offered) else None


def _encode_rendered(tokenizer: PreTrainedTokenizerBase, rendered: str) -> list[int]:
    """Token ids of a rendered chat; the template writes the beginning token itself."""
    ids: list[int] = tokenizer(rendered, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _encode_chat(
    tokenizer: PreTrainedTokenizerBase, task: TaskSchema, chat: _Chat, max_prompt_tokens: int
) -> CutPrompt:
    """Ids of the longest end of the chat that begins with a user's turn and fits, under the chat's system message.

    The time grows with the messages that can fit, not with those that are left out.
    """

    def encode(messages: list[Message]) -> list[int]:
        return _encode_rendered(tokenizer, _render_chat(task, chat._replace(messages=messages), tokenizer))

    messages = chat.messages
    system = messages[:1] if messages[0]["role"] == "system" else []
    turns = messages[len(system) :]
    starts = [0, *(index for index, turn in enumerate(turns) if index and turn["role"] == "user")]

    def fits(start: int) -> bool:
        return len(encode([*system, *turns[start:]])) <= max_prompt_tokens

    # A message takes at least one token, so of a very long chat only the latest messages are looked at. Most chats fit
    # as they are and are rendered once. Leaving out more turns makes a prompt shorter, so the rest is a bisection.
    lengths = accumulate(len(turn["content"]) for turn in reversed(turns[-max_prompt_tokens:]))
    num_latest = sum(length <= MAX_CHARS_PER_TOKEN * max_prompt_tokens for length in lengths)
    first = min(bisect_left(starts, len(turns) - num_latest), len(starts) - 1)
    if len(turns) - starts[first] > num_latest or not fits(starts[first]):
        first = min(bisect_left(starts, True, lo=first + 1, key=fits), len(starts) - 1)
    *earlier, last = [*system, *turns[starts[first] :]]
    cut = _encode_shortened(
        lambda text: encode([*earlier, {**last, "content": text}]), last["content"], task, max_prompt_tokens
    )
    return CutPrompt(cut.ids, is_cut=cut.is_cut or first > 0)
