"""Requests and answers in the form of OpenAI's API, as its clients and many other programs speak it.

A model's name is the lineage, with a version, a task, or both: support, support@7, support/billing, support@7/billing.
The server renders the task's prompt. A task of chats takes the messages; any other task takes one user message.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from deal_core.evaluation.answerer import Answered
from deal_core.evaluation.answering import InputRow, ServedVersion
from infra.serving.refusal import RefusalError

NOT_FOUND = "model_not_found"
DONE = "data: [DONE]\n\n"
REFUSED = {"tools": "tools", "functions": "functions", "logprobs": "log-probabilities", "audio": "audio"}
"""Keys of a request that ask for something that the server does not have."""


class ModelName(NamedTuple):
    """The parts of a model's name."""

    lineage: str
    version: str | None
    task: str | None


@dataclass(frozen=True)
class ApiRequest:
    """The rows of a request, and how the answer is written."""

    rows: tuple[InputRow, ...]
    version: str | None
    """The version that has to answer; None: the champion, whatever its number."""
    is_chat: bool
    is_stream: bool
    user: str | None = None
    """The client's name of its user; None: it gives none."""

    def require_version(self, version: str | None, canary: str | None = None) -> None:
        """Require the version that the model's name has.

        Raises:
            RefusalError: `version` answers, which is another one, and so is `canary`.
        """
        if self.version is not None and self.version not in (version, canary):
            message = f"Version {self.version} does not answer here; version {version} does."
            raise RefusalError(404, message, code=NOT_FOUND)

    def body(self, answered: Answered) -> str:
        """Return the answer as JSON, or as server-sent events. A stream has each answer as one piece.

        The answer's id is that of its row in the prediction log. Of several rows, each choice has its row's id.
        """
        made = {
            "id": f"{'chatcmpl' if self.is_chat else 'cmpl'}-{[*answered.ids, uuid.uuid4().hex][0]}",
            "created": int(time.time()),
            "model": f"{answered.served.lineage}@{answered.version}",
        }
        if not self.is_stream:
            kind = "chat.completion" if self.is_chat else "text_completion"
            choices = [{**self._choice(*each), **self._id(answered, each[0])} for each in _ended(answered)]
            return json.dumps({**made, "object": kind, "choices": choices}, ensure_ascii=False)
        kind = "chat.completion.chunk" if self.is_chat else "text_completion"
        pieces = [{**piece, **self._id(answered, each[0])}
                  for each in _ended(answered) for piece in self._pieces(*each)]  # fmt: skip
        events = [json.dumps({**made, "object": kind, "choices": [piece]}, ensure_ascii=False) for piece in pieces]
        return "".join(f"data: {event}\n\n" for event in events) + DONE

    def _id(self, answered: Answered, number: int) -> dict[str, str]:
        return {"id": answered.ids[number]} if len(answered.ids) > 1 else {}

    def _choice(self, number: int, text: str, end: str) -> dict[str, Any]:
        said: dict[str, Any] = {"message": {"role": "assistant", "content": text}} if self.is_chat else {"text": text}
        return {"index": number, **said, "finish_reason": end, "logprobs": None}

    def _pieces(self, number: int, text: str, end: str) -> list[dict[str, Any]]:
        shared = {"index": number, "logprobs": None}
        if not self.is_chat:
            return [{**shared, "text": text, "finish_reason": end}]
        return [
            {**shared, "delta": {"role": "assistant", "content": text}, "finish_reason": None},
            {**shared, "delta": {}, "finish_reason": end},
        ]


def _ended(answered: Answered) -> list[tuple[int, str, str]]:
    """Every answer with its number and how it ended: stop, or length if it reached its longest length."""
    is_cut = answered.is_cut or [False] * len(answered.answers)
    ends = ["length" if cut else "stop" for cut in is_cut]
    return list(zip(range(len(ends)), answered.answers, ends, strict=True))


def list_models(served: ServedVersion, version: str) -> dict[str, Any]:
    """Return the body of GET /v1/models: the champion, its version, and the champion for each task."""
    tasks = [f"{served.lineage}/{task.schema.name}" for task in served.tasks]
    names = [served.lineage, f"{served.lineage}@{version}", *tasks]
    return {
        "object": "list",
        "data": [{"id": name, "object": "model", "created": 0, "owned_by": "deal"} for name in names],
    }


def read_request(values: Mapping[str, Any], served: ServedVersion, *, is_chat: bool) -> ApiRequest:
    """Read the body of POST /v1/chat/completions or /v1/completions.

    Sampling settings (temperature, top_p, seed, max_tokens, stop) have no effect: an answer is the most likely one, up
    to the task's longest answer.

    Raises:
        RefusalError: The model is not served here, or the request asks for something that the server does not have.
    """
    name = _model_name(values, served)
    for key, what in REFUSED.items():
        if values.get(key):
            raise _wrong(f"{key}: the server has no {what}; leave {key} out.")
    if values.get("n") not in (None, 1):
        raise _wrong("n: the server gives one answer, the most likely one; leave n out.")
    task = served.task(name.task)
    if task is None:
        names = ", ".join(each.schema.name for each in served.tasks)
        raise RefusalError(404, f"model names the task {name.task!r}; the version that answers knows {names}.",
                           code=NOT_FOUND)  # fmt: skip
    read = _chat_input if is_chat else _prompts
    texts = read(values, task.schema.format == "chat", task.schema.name)
    return ApiRequest(
        rows=tuple(InputRow(text, task.schema.name) for text in texts),
        version=name.version, is_chat=is_chat, is_stream=values.get("stream") is True,
        user=values["user"] if isinstance(values.get("user"), str) else None,
    )  # fmt: skip


def _wrong(message: str) -> RefusalError:
    return RefusalError(400, message, code="invalid_request_error")


def _model_name(values: Mapping[str, Any], served: ServedVersion) -> ModelName:
    model = values.get("model")
    if not isinstance(model, str):
        raise _wrong(f"model is missing; give the lineage's name: {served.lineage}.")
    rest, _, task = model.partition("/")
    lineage, _, version = rest.partition("@")
    if lineage != served.lineage:
        raise RefusalError(404, f"model is {model[:100]!r}; {served.lineage} is served here, or {served.lineage}/TASK.",
                           code=NOT_FOUND)  # fmt: skip
    return ModelName(lineage, version or None, task or None)


def _chat_input(values: Mapping[str, Any], takes_chat: bool, task: str) -> list[str]:
    messages = values.get("messages")
    if not isinstance(messages, list) or not messages or not all(isinstance(each, dict) for each in messages):
        raise _wrong("messages is no list of messages; give role and content for each.")
    read = [{"role": str(each.get("role")), "content": _content(each)} for each in messages]
    if takes_chat:
        return [json.dumps(read, ensure_ascii=False)]
    if [each["role"] for each in read] != ["user"]:
        raise _wrong(
            f"The task {task} takes one text, under the server's instruction; send one message of the role user."
        )
    return [read[0]["content"]]


def _content(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    parts = content if isinstance(content, list) else []
    if parts and all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in parts):
        return "\n".join(part["text"] for part in parts)  # as training joins them
    if not isinstance(content, str):
        raise _wrong("A message's content is no text; the server reads texts only.")
    return content


def _prompts(values: Mapping[str, Any], takes_chat: bool, task: str) -> Sequence[str]:
    if takes_chat:
        raise _wrong(f"The task {task} takes chats; send its messages to /v1/chat/completions.")
    prompt = values.get("prompt")
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(prompts, list) or not prompts or not all(isinstance(each, str) for each in prompts):
        raise _wrong("prompt is no text and no list of texts; token numbers are not read.")
    return prompts
