"""The formats of requests and answers: MLflow's tables, OpenAI's API, and feedback.

A model's name in OpenAI's API is the lineage, with a version, a task, or both: support, support@7, support/billing,
support@7/billing. The server renders the task's prompt. A task of chats takes the messages; any other task takes one
user message.

A request that cannot be answered raises RefusalError, with status 500 if the model fails.
"""

from __future__ import annotations

import io
import json
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

from mlflow.exceptions import MlflowException
from mlflow.models import Model
from mlflow.pyfunc import PyFuncModel
from mlflow.pyfunc.scoring_server import infer_and_parse_data, predictions_to_json

from deal_core.data.chats import ROLES, normal_calls, role_of
from deal_core.data.schema import TaskSchema
from deal_core.errors import ConfigError
from deal_core.evaluation.answerer import Answered, Choice, GivenUpError, Sampling
from deal_core.evaluation.answering import InputRow, ServedTask, ServedVersion, require_few_messages
from deal_core.monitoring.feedback import read_entry
from deal_core.safe_text import brief
from infra.served_model import SIGNATURE, VERSION, ServedModel
from infra.serving.champion import Champion
from infra.serving.engines import MAX_TOPS, PASSED_ON
from infra.serving.prediction_log import LOG

MAX_ENTRIES = 1000
"""Entries of one request with feedback."""
TABLE_BODY = '{"dataframe_records": [{"input": "the text"}]}'
OPENAI_BODY = '{"model": LINEAGE, "messages": [{"role": "user", "content": "the text"}]}'
FEEDBACK_BODY = '[{"id": ID, "label": LABEL}]'
RETRY = {"Retry-After": "2"}
DONE = "data: [DONE]\n\n"
REFUSED = ("tools", "functions", "audio")
"""Keys of a request that ask for something that the server does not have."""
MAX_ANSWERS = 128
"""Most answers to a row."""


class RefusalError(Exception):
    """A request that is not answered. `message` tells the client what is wrong and what to send.

    `code` is OpenAI's name of the error, if it has one.
    """

    def __init__(
        self, status: int, message: str, headers: Mapping[str, str] | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers or {}
        self.code = code


class HttpAnswer(NamedTuple):
    """The body of an answer, and the version that gave the answer."""

    body: str
    version: str
    kind: str = "application/json"
    status: int = 200


class Caller(NamedTuple):
    """The client of a request."""

    is_given_up: Callable[[], bool]
    """Tells whether it has gone."""
    key: str | None = None
    """In a canary's rollout, requests with the same key go to the same version; None: the client names no key."""
    send: Callable[[str, str], None] = lambda version, text: None
    """Sends a piece of a stream, and the version that gives it. What `complete` returns is then the rest."""


def predict(serving: Champion, body: bytes, caller: Caller) -> HttpAnswer:
    """Answer a body in MLflow's format: JSON with dataframe_records, dataframe_split, instances or inputs."""
    values = _decode_object(body, TABLE_BODY)
    values.pop("params", None)  # MLflow's clients may send params; the model has none
    if "task" in values:  # MLflow ignores what stands beside the rows, so another task would answer
        raise RefusalError(400, "task stands beside the rows; give it in each row.")
    try:
        table = infer_and_parse_data(values, SIGNATURE.inputs)
    except MlflowException as error:
        raise RefusalError(400, _reason(error)) from None
    except Exception as error:  # pandas raises many kinds of errors
        raise RefusalError(400, f"The body is no table of rows ({type(error).__name__}).") from None
    model = ServedModel(lambda rows: serving.ask(rows, caller.is_given_up, caller.key))
    with _refusing():  # like MLflow's servers, PyFuncModel checks the table against the signature
        predictions: Any = PyFuncModel(model_meta=Model(signature=SIGNATURE), model_impl=model).predict(table)
    written = io.StringIO()
    predictions_to_json(predictions, written)  # type: ignore[no-untyped-call]
    return HttpAnswer(written.getvalue(), predictions.attrs[VERSION])


def complete(serving: Champion, body: bytes, caller: Caller, *, is_chat: bool) -> HttpAnswer:
    """Answer a body of POST /v1/chat/completions (`is_chat`) or /v1/completions.

    An engine gets the settings of sampling (temperature, top_p, seed, stop, max_tokens, logprobs, n). Without an engine
    they have no effect: an answer is the most likely one, up to the task's longest answer.
    """
    values, served = _decode_object(body, OPENAI_BODY), serving.served
    model = values.get("model")
    if not isinstance(model, str):
        raise _wrong(f"model is missing; give the lineage's name: {served.lineage}.")
    name, _, task_name = model.partition("/")
    lineage, _, version = name.partition("@")
    if lineage != served.lineage:
        raise _not_found(f"model is {model[:100]!r}; {served.lineage} is served here, or {served.lineage}/TASK.")
    for key in REFUSED:
        if values.get(key):
            raise _wrong(f"{key}: the server has no {key}; leave {key} out.")
    sampling = _sampling(values, is_chat) if serving.streams else _without_sampling(values)
    task = served.task(task_name or None)
    if task is None:
        names = ", ".join(task.schema.name for task in served.tasks)
        raise _not_found(f"model names the task {task_name!r}; the version that answers knows {names}.")
    texts = _chat_input(values, task.schema) if is_chat else _prompts(values, task.schema)
    rows = [InputRow(text, task.schema.name) for text in texts]
    user = values["user"] if isinstance(values.get("user"), str) else None

    def require_version(*answering: str | None) -> None:
        if version and version not in answering:
            raise _not_found(f"Version {version} does not answer here; version {answering[0]} does.")

    require_version(serving.version, serving.canary)
    is_stream, stream = values.get("stream") is True, None
    if is_stream and serving.streams:
        stream = _Stream(serving.new_ids(len(rows)), is_chat, version, sampling.num_answers, caller.send)
        sampling = replace(sampling, on_piece=stream.pass_on)
    with _refusing():
        answered = serving.ask(
            rows, caller.is_given_up, caller.key or user, version or None, sampling, stream.ids if stream else ()
        )
    require_version(answered.version)  # the champion may have moved
    kind = "text/event-stream" if is_stream else "application/json"
    text = stream.end(answered) if stream else _written(answered, task, is_chat, is_stream=is_stream)
    return HttpAnswer(text, answered.version, kind)


def _without_sampling(values: Mapping[str, Any]) -> Sampling:
    """Refuse what only an engine can give."""
    if values.get("logprobs"):
        raise _wrong("logprobs: the server has no log-probabilities; leave logprobs out.")
    if values.get("n") not in (None, 1):
        raise _wrong("n: the server gives one answer, the most likely one; leave n out.")
    return Sampling()


def _sampling(values: Mapping[str, Any], is_chat: bool) -> Sampling:
    """Return what a client wants of the engine. The engine checks the values that are passed on."""

    def number(key: str, least: int, most: int) -> int | None:
        value = values.get(key)
        if value is not None and (type(value) is not int or not least <= value <= most):
            raise _wrong(f"{key} is {brief(value)}; give a number from {least} to {most}.")
        return value

    num_tops = None if is_chat else number("logprobs", 0, MAX_TOPS)
    if is_chat and values.get("logprobs") is True:
        num_tops = number("top_logprobs", 0, MAX_TOPS) or 0
    longest = number("max_completion_tokens", 1, 1_000_000)
    return Sampling(
        passed_on={key: values[key] for key in PASSED_ON if values.get(key) is not None},
        max_tokens=number("max_tokens", 1, 1_000_000) if longest is None else longest,
        num_answers=number("n", 1, MAX_ANSWERS) or 1,
        num_tops=num_tops,
    )


class _Stream:
    """The events of an answer that comes in pieces."""

    def __init__(
        self, ids: Sequence[str], is_chat: bool, version: str, num_answers: int, send: Callable[[str, str], None]
    ) -> None:
        self.ids, self._is_chat, self._version, self._send = ids, is_chat, version, send
        self._num_answers = num_answers
        self._head = _head(ids, is_chat, is_stream=True)
        self._begun: set[int] = set()

    def pass_on(self, piece: Choice, served: ServedVersion, version: str) -> None:
        """Send a piece."""
        if self._version not in ("", version):
            raise GivenUpError(f"Version {self._version} does not answer any more; ask again.")
        choice = _choice(piece, self.ids, self._num_answers, self._is_chat, is_stream=True)
        if self._is_chat and piece.place not in self._begun:
            choice["delta"] = {"role": "assistant", **choice["delta"]}
        self._begun.add(piece.place)
        event = {**self._head, "model": f"{served.lineage}@{version}", "choices": [choice]}
        self._send(version, f"data: {json.dumps(event, ensure_ascii=False)}\n\n")

    def end(self, answered: Answered) -> str:
        """Return the last events."""
        model = f"{answered.served.lineage}@{answered.version}"
        event = {**self._head, "model": model, "choices": [], "usage": _usage(answered)}
        return f"data: {json.dumps(event, ensure_ascii=False)}\n\n{DONE}"


def give_feedback(serving: Champion, body: bytes, _: Caller) -> HttpAnswer:
    """Store feedback on answers. A wrong entry refuses all entries."""
    values, log = _decode(body, FEEDBACK_BODY), serving.log
    if log is None:
        raise RefusalError(409, "The prediction log is off; start deal serve with DEAL_LOG_PREDICTIONS.")
    if not isinstance(values, list) or not values or len(values) > MAX_ENTRIES:
        raise RefusalError(400, f"The body is no list of 1 to {MAX_ENTRIES} entries; send {FEEDBACK_BODY}.")
    tasks = {task.schema.name: task.schema for task in serving.served.tasks}
    now, checked = time.time(), []
    try:
        for number, entry in enumerate(values, 1):
            place = f"Entry {number}"
            read = read_entry(entry, place, source="api", now=now)
            read.check_texts(log.keeps_texts, place)
            checked.append(read.check_against(tasks, log.task_of(read.feedback.id), place))
    except ConfigError as error:
        raise RefusalError(400, str(error)) from None
    if not log.take_feedback(checked):
        raise RefusalError(503, "The feedback was not stored; send it again in a moment.", RETRY)
    return HttpAnswer(json.dumps({"taken": len(checked)}), serving.version or "", status=202)


@contextmanager
def _refusing() -> Iterator[None]:
    """Turn the errors of a model into refusals."""
    try:
        yield
    except ConfigError as error:
        raise RefusalError(400, str(error)) from None
    except MlflowException as error:
        raise RefusalError(400, _reason(error)) from None
    except GivenUpError as error:
        raise RefusalError(503, str(error), RETRY) from None
    except Exception:
        LOG.exception("A request could not be answered")
        raise RefusalError(500, "The model failed on this request; the server's log has the error.") from None


def _decode_object(body: bytes, example: str) -> dict[str, Any]:
    """Read a JSON object; `example` is one, for the message."""
    values = _decode(body, example)
    if not isinstance(values, dict):
        raise RefusalError(400, f"The body is no JSON object; send {example}.")
    return values


def _decode(body: bytes, example: str) -> Any:
    try:
        values = json.loads(body)
        json.dumps(values, ensure_ascii=False).encode()  # a lone surrogate cannot be encoded
    except RecursionError:
        raise RefusalError(400, f"The body is nested too deeply; send {example}.") from None
    except UnicodeEncodeError:
        raise RefusalError(400, "The body has half of a surrogate pair, which is no character.") from None
    except ValueError as error:
        raise RefusalError(400, f"The body is no JSON in UTF-8: {str(error)[:200]}.") from None
    return values


def _reason(error: MlflowException) -> str:
    """Return MLflow's message as one sentence, without the texts of the request."""
    message = str(error.message)
    if "Failed to enforce schema" in message:
        message = message.rpartition("Error: ")[2]
    message = message.split("\nInput:")[0].split(" IMPORTANT:")[0]  # the texts of the request; advice on MLflow 1
    return " ".join(message.split())[:1000]


def _head(ids: Sequence[str], is_chat: bool, *, is_stream: bool) -> dict[str, Any]:
    """Return the first keys of an answer. Its id is that of its row in the prediction log."""
    kind = "text_completion"
    if is_chat:
        kind = "chat.completion.chunk" if is_stream else "chat.completion"
    own_id = f"{'chatcmpl' if is_chat else 'cmpl'}-{[*ids, uuid.uuid4().hex][0]}"
    return {"id": own_id, "object": kind, "created": int(time.time())}


def _choice(answer: Choice, ids: Sequence[str], num_answers: int, is_chat: bool, *, is_stream: bool) -> dict[str, Any]:
    """Return an answer, or a piece of one. Of several rows, each choice has its row's id."""
    choice: dict[str, Any] = {
        "index": answer.place,
        "logprobs": _log_probs(answer, is_chat),
        "finish_reason": answer.finish_reason,
    }
    if len(ids) > 1:
        choice["id"] = ids[answer.place // num_answers]
    if not is_chat:
        return {**choice, "text": answer.text}
    if is_stream:
        return {**choice, "delta": {"content": answer.text}}
    return {**choice, "message": {"role": "assistant", "content": answer.text}}


def _log_probs(answer: Choice, is_chat: bool) -> dict[str, Any] | None:
    """Return the log-probabilities of an answer's tokens in the form of chats, or of completions."""
    if answer.log_probs is None:
        return None
    if not is_chat:
        return {
            "tokens": [token for token, _, _ in answer.log_probs],
            "token_logprobs": [value for _, value, _ in answer.log_probs],
            "top_logprobs": [dict(tops) for _, _, tops in answer.log_probs],
        }

    def entry(token: str, value: float) -> dict[str, Any]:
        return {"token": token, "logprob": value, "bytes": list(token.encode())}

    return {
        "content": [
            {**entry(token, value), "top_logprobs": [entry(*top) for top in tops]}
            for token, value, tops in answer.log_probs
        ]
    }


def _usage(answered: Answered) -> dict[str, int] | None:
    if not answered.usage:
        return None
    return {**answered.usage, "total_tokens": sum(answered.usage.values())}


def _written(answered: Answered, task: ServedTask, is_chat: bool, *, is_stream: bool) -> str:
    """Return the body of an answer as JSON, or as server-sent events, each answer as one piece.

    A choice has `problem` if it is no label of the task.
    """
    answers = answered.choices
    if not answers:  # of the model in this process
        is_cut = answered.is_cut or [False] * len(answered.answers)
        answers = [
            Choice(number, text, "length" if cut else "stop")
            for number, (text, cut) in enumerate(zip(answered.answers, is_cut, strict=True))
        ]
    num_answers = len(answers) // max(1, len(answered.answers))
    choices = []
    for answer in answers:
        stripped = answer._replace(text=answer.text.strip())
        choice = _choice(stripped, answered.ids, num_answers, is_chat, is_stream=is_stream)
        if problem := task.problem_of(stripped.text):
            choice["problem"] = problem
        if is_chat and is_stream:  # the end of a chat is a piece of its own
            choice["delta"] = {"role": "assistant", **choice["delta"]}
            choices += [{**choice, "finish_reason": None}, {**choice, "delta": {}}]
        else:
            choices.append(choice)
    whole = {
        **_head(answered.ids, is_chat, is_stream=is_stream),
        "model": f"{answered.served.lineage}@{answered.version}",
    }
    if not is_stream:
        usage = {"usage": used} if (used := _usage(answered)) else {}
        return json.dumps({**whole, "choices": choices, **usage}, ensure_ascii=False)
    pieces = [json.dumps({**whole, "choices": [choice]}, ensure_ascii=False) for choice in choices]
    return "".join(f"data: {piece}\n\n" for piece in pieces) + DONE


def list_models(served: ServedVersion, version: str) -> dict[str, Any]:
    """Return the body of GET /v1/models: the champion, its version, and the champion for each task."""
    tasks = [f"{served.lineage}/{task.schema.name}" for task in served.tasks]
    names = [served.lineage, f"{served.lineage}@{version}", *tasks]
    return {
        "object": "list",
        "data": [{"id": name, "object": "model", "created": 0, "owned_by": "deal"} for name in names],
    }


def _wrong(message: str) -> RefusalError:
    return RefusalError(400, message, code="invalid_request_error")


def _not_found(message: str) -> RefusalError:
    return RefusalError(404, message, code="model_not_found")


def _chat_input(values: Mapping[str, Any], task: TaskSchema) -> list[str]:
    messages = values.get("messages")
    if not isinstance(messages, list) or not messages or not all(isinstance(message, dict) for message in messages):
        raise _wrong("messages is no list of messages; give role and content for each.")
    try:
        require_few_messages(len(messages), "The chat")
    except ConfigError as error:
        raise _wrong(str(error)) from None
    chat = [_message(message) for message in messages]
    if task.format == "chat":
        return [json.dumps(chat, ensure_ascii=False)]
    if [message["role"] for message in chat] != ["user"]:
        raise _wrong(
            f"The task {task.name} takes one text, under the server's instruction; send one message of the role user."
        )
    return [chat[0]["content"]]


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message with the keys that rows of chats are stored with (see `deal_core.data.chats`)."""
    if message.keys() == {"role", "content"} and type(message["content"]) is str and message["role"] in ROLES:
        return dict(message)  # most messages; a chat may have thousands
    role, calls = role_of(message), message.get("tool_calls")
    if not isinstance(role, str):
        raise _wrong("A message's role is no text; give role and content for each message.")
    if role not in ROLES:
        raise _wrong(f"A message has the role {brief(role)}; the roles are {', '.join(ROLES)}.")
    if calls and normal_calls(calls) is None:
        raise _wrong('tool_calls is no list of {"function": {"name": …, "arguments": …}}.')
    content = message.get("content")
    parts = content if isinstance(content, list) else []
    if content is None and calls:
        content = ""
    elif parts and all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in parts):
        content = "\n".join(part["text"] for part in parts)  # as training joins them
    if not isinstance(content, str):
        raise _wrong("A message's content is no text; the server reads texts only.")
    names = ("tool_calls", "tool_call_id", "name") if role == "tool" else ("tool_calls",)
    kept = {name: message[name] for name in names if message.get(name)}  # clients send null for what is not there
    return {"role": role, "content": content, **kept}


def _prompts(values: Mapping[str, Any], task: TaskSchema) -> list[str]:
    if task.format == "chat":
        raise _wrong(f"The task {task.name} takes chats; send its messages to /v1/chat/completions.")
    prompt = values.get("prompt")
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(prompts, list) or not prompts or not all(isinstance(text, str) for text in prompts):
        raise _wrong("prompt is no text and no list of texts; token numbers are not read.")
    return prompts
