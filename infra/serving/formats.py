"""The bodies of MLflow's tables and of feedback; OpenAI's are in `infra.serving.openai_api`.

A request that cannot be answered raises RefusalError, with status 500 if the model fails.
"""

from __future__ import annotations

import asyncio
import io
import json
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from mlflow.exceptions import MlflowException
from mlflow.models import Model
from mlflow.pyfunc import PyFuncModel
from mlflow.pyfunc.scoring_server import infer_and_parse_data, predictions_to_json

from deal_core.errors import ConfigError
from deal_core.evaluation.answerer import Answered, GivenUpError
from deal_core.evaluation.answering import InputRow
from deal_core.monitoring.feedback import Feedback, read_entry
from infra.served_model import SIGNATURE, RowsOfTable, table_of
from infra.serving.champion import Champion
from infra.serving.prediction_log import LOG

MAX_ENTRIES = 1000
"""Entries of one request with feedback."""
LONG_BODY = 1 << 16
"""Bodies of more bytes are read in a thread, so that the event loop goes on."""
TABLE_BODY = '{"dataframe_records": [{"input": "the text"}]}'
FEEDBACK_BODY = '[{"id": ID, "label": LABEL}]'
RETRY = {"Retry-After": "2"}


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
    """The client of a request. Its task is cancelled when it leaves."""

    key: str | None
    """In a canary's rollout, requests with the same key go to the same version; None: the client names no key."""
    send: Callable[[str, str], Awaitable[None]]
    """Sends a piece of a stream, and the version that gives it. What the work returns is then the rest."""


async def predict(serving: Champion, body: bytes, caller: Caller) -> HttpAnswer:
    """Answer a body in MLflow's format: JSON with dataframe_records, dataframe_split, instances or inputs.

    Tables are read and written in a thread.
    """
    rows = await asyncio.to_thread(_rows_of, await decode_object(body, TABLE_BODY))
    with refusing():
        answered = await serving.ask(rows, caller.key)
    return HttpAnswer(await asyncio.to_thread(_table, rows, answered), answered.version)


def _rows_of(values: dict[str, Any]) -> list[InputRow]:
    """Read a table. Like MLflow's servers, PyFuncModel checks it against the signature."""
    values.pop("params", None)  # MLflow's clients may send params; the model has none
    if "task" in values:  # MLflow ignores what stands beside the rows, so another task would answer
        raise RefusalError(400, "task stands beside the rows; give it in each row.")
    try:
        table = infer_and_parse_data(values, SIGNATURE.inputs)
    except MlflowException as error:
        raise RefusalError(400, _reason(error)) from None
    except Exception as error:  # pandas raises many kinds of errors
        raise RefusalError(400, f"The body is no table of rows ({type(error).__name__}).") from None
    with refusing():
        rows: list[InputRow] = PyFuncModel(model_meta=Model(signature=SIGNATURE), model_impl=RowsOfTable()).predict(
            table
        )
    return rows


def _table(rows: list[InputRow], answered: Answered) -> str:
    written = io.StringIO()
    predictions_to_json(table_of(rows, answered), written)  # type: ignore[no-untyped-call]
    return written.getvalue()


async def give_feedback(serving: Champion, body: bytes, _: Caller) -> HttpAnswer:
    """Store feedback on answers. A wrong entry refuses all entries."""
    values, log = await _decode(body, FEEDBACK_BODY), serving.log
    if log is None:
        raise RefusalError(409, "The prediction log is off; start deal serve with DEAL_LOG_PREDICTIONS.")
    if not isinstance(values, list) or not values or len(values) > MAX_ENTRIES:
        raise RefusalError(400, f"The body is no list of 1 to {MAX_ENTRIES} entries; send {FEEDBACK_BODY}.")
    tasks = {task.schema.name: task.schema for task in serving.served.tasks}
    now, checked = time.time(), list[Feedback]()
    try:
        for number, entry in enumerate(values, 1):
            place = f"Entry {number}"
            read = read_entry(entry, place, source="api", now=now)
            read.check_texts(log.keeps_texts, place)
            checked.append(read.check_against(tasks, log.task_of(read.feedback.id), place))
    except ConfigError as error:
        raise RefusalError(400, str(error)) from None
    if not await asyncio.get_running_loop().run_in_executor(log.threads, log.take_feedback, checked):
        raise RefusalError(503, "The feedback was not stored; send it again in a moment.", RETRY)
    return HttpAnswer(json.dumps({"taken": len(checked)}), serving.version or "", status=202)


@contextmanager
def refusing() -> Iterator[None]:
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


async def decode_object(body: bytes, example: str) -> dict[str, Any]:
    """Read a JSON object; `example` is one, for the message."""
    values = await _decode(body, example)
    if not isinstance(values, dict):
        raise RefusalError(400, f"The body is no JSON object; send {example}.")
    return values


async def _decode(body: bytes, example: str) -> Any:
    def decode() -> Any:
        values = json.loads(body)
        json.dumps(values, ensure_ascii=False).encode()  # a lone surrogate cannot be encoded
        return values

    try:
        return decode() if len(body) <= LONG_BODY else await asyncio.to_thread(decode)
    except RecursionError:
        raise RefusalError(400, f"The body is nested too deeply; send {example}.") from None
    except UnicodeEncodeError:
        raise RefusalError(400, "The body has half of a surrogate pair, which is no character.") from None
    except ValueError as error:
        raise RefusalError(400, f"The body is no JSON in UTF-8: {str(error)[:200]}.") from None


def _reason(error: MlflowException) -> str:
    """Return MLflow's message as one sentence, without the texts of the request."""
    message = str(error.message)
    if "Failed to enforce schema" in message:
        message = message.rpartition("Error: ")[2]
    message = message.split("\nInput:")[0].split(" IMPORTANT:")[0]  # the texts of the request; advice on MLflow 1
    return " ".join(message.split())[:1000]
