"""The web application of `deal serve`: MLflow's request format in, answers of the champion out, and limits.

    POST /invocations    {"dataframe_records": [{"input": "I lost my card.", "task": "billing"}]}
    GET  /health, /ping  200 while a version answers
    GET  /version        which version answers, which one is being loaded, and what is wrong

Every refusal is `{"error": "one sentence"}`.
"""

from __future__ import annotations

import asyncio
import io
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

from mlflow.exceptions import MlflowException
from mlflow.pyfunc import PyFuncModel
from mlflow.pyfunc.scoring_server import infer_and_parse_data, predictions_to_json
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from deal_core.evaluation.answerer import GivenUpError
from infra.served_model import VERSION
from infra.serving.champion import LOG

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")
"""Names under which a server on this machine is asked. A page of the web comes under the name of its own site."""
MAX_BODY_BYTES = 16 << 20
MAX_IN_FLIGHT = 64
"""Requests that are read, wait or are answered; one more gets 503."""
BODY_SECONDS = 30.0
"""A client has this long to send its rows."""
ANSWER_SECONDS = 300.0
"""A request that takes longer is given up."""
RETRY = {"Retry-After": "2"}
CLOSE = {"Connection": "close"}


class Serving(Protocol):
    """What the application needs of the champion."""

    lineage: str

    @property
    def version(self) -> str | None:
        """Number of the version that answers."""

    def state(self) -> dict[str, Any]:
        """What GET /version says."""

    def model(self, is_given_up: Callable[[], bool]) -> PyFuncModel:
        """What answers one request."""


class RefusalError(Exception):
    """A request that is not answered."""

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers or {}


class Predictions(NamedTuple):
    """A body that answers a request, and the version that gave the answers."""

    body: str
    version: str


def make_app(serving: Serving, trusted_hosts: Sequence[str] = LOOPBACK_NAMES) -> Starlette:
    """The web application.

    Args:
        serving: the champion.
        trusted_hosts: names under which the server may be asked; "*" stands for all.
    """
    pool = ThreadPoolExecutor(MAX_IN_FLIGHT, thread_name_prefix="answer")
    places = asyncio.Semaphore(MAX_IN_FLIGHT)

    async def invoke(request: Request) -> Response:
        try:
            _require_json(request)
            if places.locked():
                message = f"{MAX_IN_FLIGHT} requests are being answered; ask again in a moment."
                raise RefusalError(503, message, {**RETRY, **CLOSE})
            async with places:
                found = await _answer(serving, pool, request, await _read(request))
        except RefusalError as refusal:
            named = {"X-Deal-Version": serving.version or "", "X-Deal-Lineage": serving.lineage}
            return _error(refusal.status, str(refusal), {**named, **refusal.headers})
        except ClientDisconnect:  # there is no client to tell
            return Response(status_code=400)
        headers = {"X-Deal-Version": found.version, "X-Deal-Lineage": serving.lineage}
        return Response(found.body, 200, headers, "application/json")

    async def health(_: Request) -> Response:
        is_serving = serving.version is not None
        return JSONResponse({"status": "serving" if is_serving else "waiting"}, 200 if is_serving else 503)

    async def version(_: Request) -> Response:
        return JSONResponse(serving.state())

    return Starlette(
        routes=[
            Route("/invocations", invoke, methods=["POST"]),
            Route("/health", health),
            Route("/ping", health),
            Route("/version", version),
        ],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=list(trusted_hosts), www_redirect=False)],
    )  # fmt: skip


def _require_json(request: Request) -> None:
    """A page of another site can send text without asking the browser's leave, but no JSON."""
    kind, _, parameters = request.headers.get("content-type", "").lower().partition(";")
    charset = parameters.replace(" ", "").replace('"', "")
    if kind.strip() != "application/json" or charset not in ("", "charset=utf-8"):
        message = "The body must be JSON in UTF-8; send the header Content-Type: application/json."
        raise RefusalError(415, message, CLOSE)
    size = request.headers.get("content-length", "0")
    if size.isdecimal() and int(size) > MAX_BODY_BYTES:
        raise _too_large()


def _too_large() -> RefusalError:
    return RefusalError(413, f"The request is larger than {MAX_BODY_BYTES >> 20} MB; send fewer rows at once.", CLOSE)


async def _read(request: Request) -> bytes:
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                body += part
                if len(body) > MAX_BODY_BYTES:
                    raise _too_large()
    except TimeoutError:
        raise RefusalError(408, f"The request was not sent within {BODY_SECONDS:.0f} s.", CLOSE) from None
    return bytes(body)


async def _answer(serving: Serving, pool: ThreadPoolExecutor, request: Request, body: bytes) -> Predictions:
    """Answer in a thread; what nobody waits for any more is given up.

    Raises:
        ClientDisconnect: the client has gone.
        RefusalError: it cannot be answered.
    """
    given_up = threading.Event()
    work = asyncio.get_running_loop().run_in_executor(pool, predict, serving, body, given_up.is_set)
    gone = asyncio.ensure_future(request.receive())  # after the body there is nothing but the client's leaving
    waited: list[asyncio.Future[Any]] = [work, gone]
    try:
        await asyncio.wait(waited, timeout=ANSWER_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            return work.result()
        if gone.done():
            raise ClientDisconnect
        raise RefusalError(503, f"No answer within {ANSWER_SECONDS:.0f} s; send fewer rows at once.", RETRY)
    finally:
        given_up.set()
        gone.cancel()
        if not work.done():
            work.add_done_callback(lambda done: done.cancelled() or done.exception())  # nobody asks for it


def predict(serving: Serving, body: bytes, is_given_up: Callable[[], bool]) -> Predictions:
    """Answer the body of a request.

    Args:
        serving: the champion.
        body: JSON as MLflow defines it: dataframe_records, dataframe_split, instances or inputs.
        is_given_up: whether the client has gone.

    Raises:
        RefusalError: 400 where the body is no table of rows that can be asked, 500 where the model breaks.
    """
    model = serving.model(is_given_up)
    values = _decode(body)
    try:
        schema = model.metadata.get_input_schema()  # type: ignore[no-untyped-call]
        table = infer_and_parse_data(values, schema)
    except MlflowException as error:
        raise RefusalError(400, _reason(error)) from None
    except Exception as error:  # pandas has many ways to refuse what is no table
        raise RefusalError(400, f"The body is no table of rows ({type(error).__name__}).") from None
    try:
        predictions: Any = model.predict(table)
    except MlflowException as error:
        raise RefusalError(400, _reason(error)) from None
    except GivenUpError as error:
        raise RefusalError(503, str(error), RETRY) from None
    except Exception:
        LOG.exception("A request could not be answered")
        raise RefusalError(500, "The model broke on this request; the server's log says how.") from None
    written = io.StringIO()
    predictions_to_json(predictions, written)  # type: ignore[no-untyped-call]
    return Predictions(written.getvalue(), predictions.attrs[VERSION])


def _decode(body: bytes) -> dict[str, Any]:
    try:
        values = json.loads(body)
        json.dumps(values, ensure_ascii=False).encode()  # a lone surrogate is no text
    except RecursionError:
        raise RefusalError(400, "The body is nested too deeply; send a table of rows.") from None
    except UnicodeEncodeError:
        raise RefusalError(400, "The body has half of a surrogate pair, which is no character.") from None
    except ValueError as error:
        raise RefusalError(400, f"The body is no JSON in UTF-8: {str(error)[:200]}.") from None
    if not isinstance(values, dict):
        raise RefusalError(400, 'The body is no JSON object; send {"dataframe_records": [{"input": "the text"}]}.')
    values.pop("params", None)  # MLflow's clients may send it; there are none
    return values


def _reason(error: MlflowException) -> str:
    """What MLflow says, in one sentence and without the request's texts, which it repeats before it."""
    message = str(error.message)
    if "Failed to enforce schema" in message:
        message = message.rpartition("Error: ")[2]
    message = message.split("\nInput:")[0].split(" IMPORTANT:")[0]  # the request again; advice on MLflow 1
    return " ".join(message.split())[:1000]


def _error(status: int, message: str, headers: Mapping[str, str]) -> Response:
    body = json.dumps({"error": message}, ensure_ascii=False)
    return Response(body, status, headers, "application/json")
