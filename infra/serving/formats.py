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
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from mlflow.exceptions import MlflowException
from mlflow.models import Model
from mlflow.pyfunc import PyFuncModel
from mlflow.pyfunc.scoring_server import infer_and_parse_data, predictions_to_json

from deal_core.data.chats import ROLES, normal_calls, role_of
from deal_core.data.schema import TaskSchema
from deal_core.errors import ConfigError
from deal_core.evaluation.answerer import Answered, GivenUpError
from deal_core.evaluation.answering import InputRow, ServedVersion, require_few_messages
from deal_core.monitoring.feedback import read_entry
from deal_core.safe_text import brief
from infra.served_model import SIGNATURE, VERSION, ServedModel
from infra.serving.champion import Champion
from infra.serving.prediction_log import LOG

MAX_ENTRIES = 1000
"""Entries of one request with feedback."""
TABLE_BODY = '{"dataframe_records": [{"input": "the text"}]}'
OPENAI_BODY = '{"model": LINEAGE, "messages": [{"role": "user", "content": "the text"}]}'
FEEDBACK_BODY = '[{"id": ID, "label": LABEL}]'
RETRY = {"Retry-After": "2"}
DONE = "data: [DONE]\n\n"
REFUSED = {"tools": "tools", "functions": "functions", "logprobs": "log-probabilities", "audio": "audio"}
"""Keys of a request that ask for something that the server does not have."""


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

    Sampling settings (temperature, top_p, seed, max_tokens, stop) have no effect: an answer is the most likely one, up
    to the task's longest answer.
    """
    values, served = _decode_object(body, OPENAI_BODY), serving.served
    model = values.get("model")
    if not isinstance(model, str):
        raise _wrong(f"model is missing; give the lineage's name: {served.lineage}.")
    name, _, task_name = model.partition("/")
    lineage, _, version = name.partition("@")
    if lineage != served.lineage:
        raise _not_found(f"model is {model[:100]!r}; {served.lineage} is served here, or {served.lineage}/TASK.")
    for key, what in REFUSED.items():
        if values.get(key):
            raise _wrong(f"{key}: the server has no {what}; leave {key} out.")
    if values.get("n") not in (None, 1):
        raise _wrong("n: the server gives one answer, the most likely one; leave n out.")
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
    with _refusing():
        answered = serving.ask(rows, caller.is_given_up, caller.key or user, version or None)
    require_version(answered.version)  # the champion may have moved
    is_stream = values.get("stream") is True
    kind = "text/event-stream" if is_stream else "application/json"
    return HttpAnswer(_written(answered, is_chat, is_stream=is_stream), answered.version, kind)


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
    if refusal := log.refusal_of([feedback.id for feedback in checked]):
        raise RefusalError(400, f"Entry {refusal[0]} {refusal[1]}; leave it out.")
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


def _written(answered: Answered, is_chat: bool, *, is_stream: bool) -> str:
    """Return the body of an answer as JSON, or as server-sent events. A stream has each answer as one piece.

    The answer's id is that of its row in the prediction log. Of several rows, each choice has its row's id.
    """
    is_cut = answered.is_cut or [False] * len(answered.answers)
    choices: list[dict[str, Any]] = []
    for number, (text, cut) in enumerate(zip(answered.answers, is_cut, strict=True)):
        choice = {"index": number, "logprobs": None, "finish_reason": "length" if cut else "stop"}
        if len(answered.ids) > 1:
            choice["id"] = answered.ids[number]
        message = {"role": "assistant", "content": text}
        if not is_chat:
            choices.append({**choice, "text": text})
        elif not is_stream:
            choices.append({**choice, "message": message})
        else:  # the end of a chat is a piece of its own
            choices += [{**choice, "delta": message, "finish_reason": None}, {**choice, "delta": {}}]
    kind = "text_completion"
    if is_chat:
        kind = "chat.completion.chunk" if is_stream else "chat.completion"
    answer = {
        "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{[*answered.ids, uuid.uuid4().hex][0]}",
        "object": kind,
        "created": int(time.time()),
        "model": f"{answered.served.lineage}@{answered.version}",
    }
    if not is_stream:
        return json.dumps({**answer, "choices": choices}, ensure_ascii=False)
    pieces = [json.dumps({**answer, "choices": [choice]}, ensure_ascii=False) for choice in choices]
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
