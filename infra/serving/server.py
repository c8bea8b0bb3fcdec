"""The web application of `deal serve`: requests, answers of the champion, and limits.

    POST /invocations          MLflow's format: {"dataframe_records": [{"input": "I lost my card.", "task": "billing"}]}
    POST /v1/chat/completions  OpenAI's format, and /v1/completions; `infra.serving.openai_api` reads it
    GET  /v1/models            the names of models that are served
    POST /feedback             [{"id": ID, "label": LABEL}]; `infra.serving.feedback` reads it
    GET  /health, /ping        200 while a version answers
    GET  /version              the version that answers, the version that is being loaded, and the current problem
    GET  /metrics              figures for Prometheus

The body of a refusal is `{"error": "a sentence"}`, or OpenAI's form of it below /v1.
"""

from __future__ import annotations

import asyncio
import hmac
import io
import json
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

from mlflow.exceptions import MlflowException
from mlflow.pyfunc.scoring_server import infer_and_parse_data, predictions_to_json
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from deal_core.errors import ConfigError
from deal_core.evaluation.answerer import GivenUpError
from infra.served_model import VERSION
from infra.serving.champion import Champion
from infra.serving.feedback import FEEDBACK_BODY, take_feedback
from infra.serving.meter import Meter
from infra.serving.openai_api import list_models, read_request
from infra.serving.prediction_log import LOG
from infra.serving.refusal import RefusalError

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")
"""Host names of this machine. Requests of a foreign web page have the host name of its own site."""
MAX_BODY_BYTES = 16 << 20
MAX_IN_FLIGHT = 64
"""Number of open requests; further requests get 503."""
BODY_SECONDS = 30.0
"""Time for a client to send its rows."""
ANSWER_SECONDS = 300.0
"""Time after which a request is given up."""
TABLE_BODY = '{"dataframe_records": [{"input": "the text"}]}'
OPENAI_BODY = '{"model": LINEAGE, "messages": [{"role": "user", "content": "the text"}]}'
KEY_HEADER = "X-Deal-Key"
RETRY = {"Retry-After": "2"}
CLOSE = {"Connection": "close"}


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


Work = Callable[[Champion, bytes, Caller], HttpAnswer]
"""The champion, the request's body and its client → the answer."""


def make_app(
    serving: Champion, trusted_hosts: Sequence[str] = LOOPBACK_NAMES, api_key: str | None = None
) -> Starlette:
    """Return the web application.

    Args:
        serving: The champion.
        trusted_hosts: Host names that clients may use; "*" allows all.
        api_key: The token that requests for answers and models must have; None: none.
    """
    pool = ThreadPoolExecutor(MAX_IN_FLIGHT, thread_name_prefix="answer")
    places, log = asyncio.Semaphore(MAX_IN_FLIGHT), serving.log
    meter = Meter(
        lambda: log.num_dropped if log is not None else 0,
        lambda: serving.rollout.num_dropped if serving.rollout is not None else 0,
    )

    def answering(path: str, work: Work, refusal_body: Callable[[RefusalError], Any]) -> Route:
        async def respond(request: Request) -> Response:
            with meter.measured(path) as measured:
                try:
                    _require_key(request, api_key)
                    _require_json(request)
                    if places.locked():
                        message = f"{MAX_IN_FLIGHT} requests are being answered; ask again in a moment."
                        raise RefusalError(503, message, {**RETRY, **CLOSE})
                    async with places:
                        found = await _answer(serving, pool, request, await _read(request), work)
                except RefusalError as refusal:
                    measured.status = refusal.status
                    body = json.dumps(refusal_body(refusal), ensure_ascii=False)
                    named = {"X-Deal-Version": serving.version or "", "X-Deal-Lineage": serving.lineage}
                    return Response(body, refusal.status, {**named, **refusal.headers}, "application/json")
                except ClientDisconnect:  # no client reads this answer
                    measured.status = 400
                    return Response(status_code=400)
                measured.status, measured.version = found.status, found.version
                headers = {"X-Deal-Version": found.version, "X-Deal-Lineage": serving.lineage}
                return Response(found.body, found.status, headers, found.kind)

        return Route(path, respond, methods=["POST"])

    async def health(_: Request) -> Response:
        is_serving = serving.version is not None
        return JSONResponse({"status": "serving" if is_serving else "waiting"}, 200 if is_serving else 503)

    async def version(_: Request) -> Response:
        return JSONResponse(serving.state())

    async def models(request: Request) -> Response:
        try:
            _require_key(request, api_key)
        except RefusalError as refusal:
            return JSONResponse(_api_refusal(refusal), refusal.status, dict(refusal.headers))
        return JSONResponse(list_models(serving.served, serving.version or ""))

    async def metrics(_: Request) -> Response:
        return Response(*meter.page())

    return Starlette(
        routes=[
            answering("/invocations", predict, lambda refusal: {"error": str(refusal)}),
            answering("/feedback", give_feedback, lambda refusal: {"error": str(refusal)}),
            answering("/v1/chat/completions", partial(complete, is_chat=True), _api_refusal),
            answering("/v1/completions", partial(complete, is_chat=False), _api_refusal),
            Route("/v1/models", models), Route("/health", health), Route("/ping", health), Route("/version", version),
            Route("/metrics", metrics),
        ],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=list(trusted_hosts), www_redirect=False)],
    )  # fmt: skip


def _api_refusal(refusal: RefusalError) -> dict[str, Any]:
    return {"error": {"message": str(refusal), "type": "invalid_request_error", "param": None, "code": refusal.code}}


def _require_key(request: Request, api_key: str | None) -> None:
    """Require the bearer token. The comparison takes the same time for every wrong token."""
    if api_key is None:
        return
    kind, _, token = request.headers.get("authorization", "").partition(" ")
    if kind.lower() != "bearer" or not hmac.compare_digest(token.strip().encode("latin-1"), api_key.encode()):
        message = "The token is missing or wrong; send the header Authorization: Bearer TOKEN."
        raise RefusalError(401, message, {"WWW-Authenticate": "Bearer", **CLOSE}, "invalid_api_key")


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


async def _answer(
    serving: Champion, pool: ThreadPoolExecutor, request: Request, body: bytes, work: Work
) -> HttpAnswer:
    """Answer in a thread; give up the work when the client leaves or the time ends.

    Raises:
        ClientDisconnect: The client has closed the connection.
        RefusalError: The request cannot be answered.
    """
    given_up = threading.Event()
    caller = Caller(given_up.is_set, request.headers.get(KEY_HEADER))
    working = asyncio.get_running_loop().run_in_executor(pool, work, serving, body, caller)
    gone = asyncio.ensure_future(request.receive())  # after the body only a disconnect can come
    waited: list[asyncio.Future[Any]] = [working, gone]
    try:
        await asyncio.wait(waited, timeout=ANSWER_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        if gone.done():
            raise ClientDisconnect
        raise RefusalError(503, f"No answer within {ANSWER_SECONDS:.0f} s; send fewer rows at once.", RETRY)
    finally:
        given_up.set()
        gone.cancel()
        if not working.done():
            working.add_done_callback(lambda done: done.cancelled() or done.exception())  # the result is not needed


def complete(serving: Champion, body: bytes, caller: Caller, *, is_chat: bool) -> HttpAnswer:
    """Answer a body in the form of OpenAI's API.

    Raises:
        RefusalError: 400 or 404: the request cannot be answered. 500: the model fails.
    """
    try:
        asked = read_request(_decode_object(body, OPENAI_BODY), serving.served, is_chat=is_chat)
        asked.require_version(serving.version, serving.canary)
        answered = serving.ask(asked.rows, caller.is_given_up, caller.key or asked.user, asked.version)
        asked.require_version(answered.version)  # the champion may have moved
    except ConfigError as error:
        raise RefusalError(400, str(error)) from None
    except GivenUpError as error:
        raise RefusalError(503, str(error), RETRY) from None
    except RefusalError:
        raise
    except Exception:
        raise _failed() from None
    kind = "text/event-stream" if asked.is_stream else "application/json"
    return HttpAnswer(asked.body(answered), answered.version, kind)


def give_feedback(serving: Champion, body: bytes, caller: Caller) -> HttpAnswer:
    """Take feedback on answers.

    Raises:
        RefusalError: The feedback is not taken, see `take_feedback`.
    """
    del caller  # there is nothing to wait for
    number = take_feedback(serving.log, serving.served, _decode(body, FEEDBACK_BODY))
    return HttpAnswer(json.dumps({"taken": number}), serving.version or "", status=202)


def _failed() -> RefusalError:
    LOG.exception("A request could not be answered")
    return RefusalError(500, "The model failed on this request; the server's log has the error.")


def predict(serving: Champion, body: bytes, caller: Caller) -> HttpAnswer:
    """Answer a body in MLflow's format: JSON with dataframe_records, dataframe_split, instances or inputs.

    Raises:
        RefusalError: 400: the body is no valid table of rows. 500: the model fails.
    """
    model = serving.model(caller.is_given_up, caller.key)
    values = _decode_object(body, TABLE_BODY)
    values.pop("params", None)  # MLflow's clients may send params; the model has none
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
        raise _failed() from None
    written = io.StringIO()
    predictions_to_json(predictions, written)  # type: ignore[no-untyped-call]
    return HttpAnswer(written.getvalue(), predictions.attrs[VERSION])


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
