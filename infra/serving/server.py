"""The web application of `deal serve`: requests in MLflow's format, answers of the champion, and limits.

    POST /invocations    {"dataframe_records": [{"input": "I lost my card.", "task": "billing"}]}
    GET  /health, /ping  200 while a version answers
    GET  /version        the version that answers, the version that is being loaded, and the current problem

The body of every refusal is `{"error": "a sentence"}`.
"""

from __future__ import annotations

import asyncio
import io
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from mlflow.exceptions import MlflowException
from mlflow.pyfunc.scoring_server import infer_and_parse_data, predictions_to_json
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from deal_core.evaluation.answerer import GivenUpError
from infra.served_model import VERSION
from infra.serving.champion import LOG, Champion

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")
"""Host names of this machine. Requests of a foreign web page have the host name of its own site."""
MAX_BODY_BYTES = 16 << 20
MAX_IN_FLIGHT = 64
"""Number of open requests; further requests get 503."""
BODY_SECONDS = 30.0
"""Time for a client to send its rows."""
ANSWER_SECONDS = 300.0
"""Time after which a request is given up."""
RETRY = {"Retry-After": "2"}
CLOSE = {"Connection": "close"}


class RefusalError(Exception):
    """A request that is not answered."""

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers or {}


class Predictions(NamedTuple):
    """The body of an answer, and the version that gave the answer."""

    body: str
    version: str


def make_app(serving: Champion, trusted_hosts: Sequence[str] = LOOPBACK_NAMES) -> Starlette:
    """Return the web application. Clients may use the host names in `trusted_hosts`; "*" allows all."""
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
            body = json.dumps({"error": str(refusal)}, ensure_ascii=False)
            named = {"X-Deal-Version": serving.version or "", "X-Deal-Lineage": serving.lineage}
            return Response(body, refusal.status, {**named, **refusal.headers}, "application/json")
        except ClientDisconnect:  # no client reads this answer
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
            Route("/invocations", invoke, methods=["POST"]), Route("/health", health), Route("/ping", health),
            Route("/version", version),
        ],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=list(trusted_hosts), www_redirect=False)],
    )  # fmt: skip


def _require_json(request: Request) -> None:
    """Refuse other content types: browsers let foreign web pages send text, but not JSON."""
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


async def _answer(serving: Champion, pool: ThreadPoolExecutor, request: Request, body: bytes) -> Predictions:
    """Answer in a thread; give up the work when the client leaves or the time ends.

    Raises:
        ClientDisconnect: The client has closed the connection.
        RefusalError: The request cannot be answered.
    """
    given_up = threading.Event()
    work = asyncio.get_running_loop().run_in_executor(pool, predict, serving, body, given_up.is_set)
    gone = asyncio.ensure_future(request.receive())  # after the body only a disconnect can come
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
            work.add_done_callback(lambda done: done.cancelled() or done.exception())  # the result is not needed


def predict(serving: Champion, body: bytes, is_given_up: Callable[[], bool]) -> Predictions:
    """Answer a body in MLflow's format: JSON with dataframe_records, dataframe_split, instances or inputs.

    Raises:
        RefusalError: 400: the body is no valid table of rows. 500: the model fails.
    """
    model = serving.model(is_given_up)
    values = _decode(body)
    try:
        schema = model.metadata.get_input_schema()  # type: ignore[no-untyped-call]
        table = infer_and_parse_data(values, schema)
    except MlflowException as error:
        raise RefusalError(400, _reason(error)) from None
    except Exception as error:  # pandas raises many kinds of errors
        raise RefusalError(400, f"The body is no table of rows ({type(error).__name__}).") from None
    try:
        predictions: Any = model.predict(table)
    except MlflowException as error:
        raise RefusalError(400, _reason(error)) from None
    except GivenUpError as error:
        raise RefusalError(503, str(error), RETRY) from None
    except Exception:
        LOG.exception("A request could not be answered")
        raise RefusalError(500, "The model failed on this request; the server's log has the error.") from None
    written = io.StringIO()
    predictions_to_json(predictions, written)  # type: ignore[no-untyped-call]
    return Predictions(written.getvalue(), predictions.attrs[VERSION])


def _decode(body: bytes) -> dict[str, Any]:
    try:
        values = json.loads(body)
        json.dumps(values, ensure_ascii=False).encode()  # a lone surrogate cannot be encoded
    except RecursionError:
        raise RefusalError(400, "The body is nested too deeply; send a table of rows.") from None
    except UnicodeEncodeError:
        raise RefusalError(400, "The body has half of a surrogate pair, which is no character.") from None
    except ValueError as error:
        raise RefusalError(400, f"The body is no JSON in UTF-8: {str(error)[:200]}.") from None
    if not isinstance(values, dict):
        raise RefusalError(400, 'The body is no JSON object; send {"dataframe_records": [{"input": "the text"}]}.')
    values.pop("params", None)  # MLflow's clients may send params; the model has none
    return values


def _reason(error: MlflowException) -> str:
    """Return MLflow's message as one sentence, without the texts of the request."""
    message = str(error.message)
    if "Failed to enforce schema" in message:
        message = message.rpartition("Error: ")[2]
    message = message.split("\nInput:")[0].split(" IMPORTANT:")[0]  # the texts of the request; advice on MLflow 1
    return " ".join(message.split())[:1000]
