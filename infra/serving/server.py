"""The web application of `deal serve`: requests, answers of the champion, and limits.

    POST /invocations          MLflow's format: {"dataframe_records": [{"input": "I lost my card.", "task": "billing"}]}
    POST /v1/chat/completions  OpenAI's format, and /v1/completions
    GET  /v1/models            the names of models that are served
    GET  /openapi.json         OpenAPI's description of the paths below /v1
    POST /feedback             [{"id": ID, "label": LABEL}]
    GET  /health, /ping        200 while a version answers
    GET  /version              the version that answers, the version that is being loaded, and the current problem
    GET  /metrics              figures for Prometheus

`infra.serving.formats` and `infra.serving.openai_api` read and write the bodies. A refusal is `{"error": "a
sentence"}`; below /v1 it has OpenAI's form.

Each request is a task of one event loop. The task that answers is cancelled when its client leaves.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Gauge, Histogram, generate_latest
from prometheus_client import Counter as CounterMetric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from infra.serving.champion import Champion
from infra.serving.formats import RETRY, Caller, HttpAnswer, RefusalError, give_feedback, predict
from infra.serving.openai_api import complete, list_models, openapi
from infra.serving.tracing import traced

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")
"""Host names of this machine. Requests of a foreign web page have the host name of its own site."""
MAX_BODY_BYTES = 16 << 20
MAX_IN_FLIGHT = 64
"""Number of requests that the model in this process answers, or lets wait; further requests get 503."""
MAX_ON_ENGINES = 1_024
"""The same for engines, which order their requests themselves."""
BODY_SECONDS = 30.0
"""Time for a client to send its rows."""
ANSWER_SECONDS = 300.0
"""Time after which a request is given up, or a stream that has no further piece."""
KEY_HEADER = "X-Deal-Key"
CLOSE = {"Connection": "close"}
BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
"""Upper limits of the histogram of seconds."""

Work = Callable[[Champion, bytes, Caller], Awaitable[HttpAnswer]]
"""The champion, the request's body and its client → the answer."""


def make_app(serving: Champion, trusted_hosts: Sequence[str] = LOOPBACK_NAMES, api_key: str | None = None) -> Starlette:
    """Return the web application. `trusted_hosts` are host names that clients may use; "*" allows all.

    `api_key` is the token that requests for answers and models must have; None: none.
    """
    num_places = MAX_ON_ENGINES if serving.streams else MAX_IN_FLIGHT
    places = asyncio.Semaphore(num_places)
    meter = Meter(serving)

    def answering(path: str, work: Work) -> Route:
        async def answer(request: Request, send: Send) -> None:
            with meter.measured(path) as labels, traced(path, request.headers):
                _require_key(request, api_key)
                _require_json(request)
                _require_place(places, num_places)
                body = await _read_body(request)  # without a place: a slow client takes none from others
                _require_place(places, num_places)
                async with places:
                    await _answer(serving, request, send, body, work, labels)

        return Route(path, _Endpoint(answer), methods=["POST"])

    async def health(_: Request) -> Response:
        is_serving = serving.version is not None
        return JSONResponse({"status": "serving" if is_serving else "waiting"}, 200 if is_serving else 503)

    async def version(_: Request) -> Response:
        return JSONResponse(serving.state())

    async def models(request: Request) -> Response:
        _require_key(request, api_key)
        return JSONResponse(list_models(serving.served, serving.version or "").model_dump())

    async def description(_: Request) -> Response:
        return JSONResponse(openapi())

    async def metrics(_: Request) -> Response:
        return meter.page()

    async def refuse(request: Request, error: Exception) -> Response:
        if isinstance(error, ClientDisconnect):  # no client reads this answer
            return Response(status_code=400)
        refusal = error
        if isinstance(error, HTTPException):  # a path or a method that the server does not have
            path, headers = request.url.path[:100], error.headers or {}
            told = f"{path} takes no {request.method[:20]}; send {headers.get('Allow')}."
            if error.status_code == 404:
                paths = ", ".join(route.path for route in request.app.routes)
                told = f"There is no {path} here; the paths are {paths}."
            refusal = RefusalError(error.status_code, told, headers)
        assert isinstance(refusal, RefusalError)
        body: Any = str(refusal)
        if f"{request.url.path}/".startswith("/v1/"):
            body = {"message": body, "type": "invalid_request_error", "param": None, "code": refusal.code}
        names = {"X-Deal-Version": serving.version or "", "X-Deal-Lineage": serving.lineage}
        return JSONResponse({"error": body}, refusal.status, {**names, **refusal.headers})

    return Starlette(
        routes=[
            answering("/invocations", predict),
            answering("/feedback", give_feedback),
            answering("/v1/chat/completions", partial(complete, is_chat=True)),
            answering("/v1/completions", partial(complete, is_chat=False)),
            Route("/v1/models", models),
            Route("/openapi.json", description),
            Route("/health", health),
            Route("/ping", health),
            Route("/version", version),
            Route("/metrics", metrics),
        ],
        middleware=[Middleware(_TrustedHosts, allowed_hosts=list(trusted_hosts), www_redirect=False)],
        exception_handlers=dict.fromkeys((404, 405, RefusalError, ClientDisconnect), refuse),
    )


class _TrustedHosts(TrustedHostMiddleware):
    """Refuses requests under other host names, but for /metrics: Prometheus asks by the address of a pod."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_scrape = scope["type"] == "http" and scope["path"] == "/metrics"
        await (self.app if is_scrape else super().__call__)(scope, receive, send)


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


def _require_place(places: asyncio.Semaphore, number: int) -> None:
    if places.locked():
        message = f"{number} requests are being answered; ask again in a moment."
        raise RefusalError(503, message, {**RETRY, **CLOSE})


async def _read_body(request: Request) -> bytes:
    """Return the body of a request, if it is small enough and comes in time."""
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


class _Endpoint:
    """A path whose answers may come in pieces, so it sends them itself."""

    def __init__(self, answer: Callable[[Request, Send], Awaitable[None]]) -> None:
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._answer(Request(scope, receive), send)


async def _answer(
    serving: Champion, request: Request, send: Send, body: bytes, work: Work, labels: dict[str, str]
) -> None:
    """Answer, and send the answer, or its pieces as they come. `labels` get the answer's status and version.

    The task that works is cancelled when the client leaves or the time ends. What an engine or the model does for it
    then ends too.
    """
    stream = _Stream(send, serving.lineage, labels)
    working = asyncio.ensure_future(work(serving, body, Caller(request.headers.get(KEY_HEADER), stream.send)))
    leaving = asyncio.ensure_future(request.receive())  # after the body only a disconnect can come
    is_late = False
    try:
        async with asyncio.timeout(ANSWER_SECONDS) as stream.limit:
            await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
    except TimeoutError:
        is_late = True
    finally:
        leaving.cancel()
        working.cancel()
        await asyncio.wait((working,))  # what it holds is free then
    try:
        if is_late and working.cancelled():
            raise RefusalError(503, f"No answer within {ANSWER_SECONDS:.0f} s; send fewer rows at once.", RETRY)
        if working.cancelled():
            raise ClientDisconnect
        answer = working.result()
    except RefusalError as refusal:
        if not stream.has_begun:
            raise
        await stream.refuse(refusal)
        return
    except ClientDisconnect:
        if not stream.has_begun:
            raise
        labels["status"] = "400"
        return
    if stream.has_begun:
        await stream.end(answer.body)
        return
    labels |= {"status": str(answer.status), "version": answer.version}
    headers = {"X-Deal-Version": answer.version, "X-Deal-Lineage": serving.lineage}
    await Response(answer.body, answer.status, headers, answer.kind)(request.scope, request.receive, send)


class _Stream:
    """The server-sent events of an answer. The first one decides the status, so an error after it is one of them."""

    limit: asyncio.Timeout
    """When the answer is given up. Each event postpones it."""

    def __init__(self, send: Send, lineage: str, labels: dict[str, str]) -> None:
        self._send, self._lineage, self._labels = send, lineage, labels
        self.has_begun = False

    async def send(self, version: str, events: str) -> None:
        """Send events of a version, once the client has taken those before."""
        if not self.has_begun:
            self.has_begun = True
            self._labels |= {"status": "200", "version": version}
            headers = {"X-Deal-Version": version, "X-Deal-Lineage": self._lineage}
            raw_headers = StreamingResponse((), headers=headers, media_type="text/event-stream").raw_headers
            await self._send({"type": "http.response.start", "status": 200, "headers": raw_headers})
        await self._send({"type": "http.response.body", "body": events.encode(), "more_body": True})
        self.limit.reschedule(asyncio.get_running_loop().time() + ANSWER_SECONDS)

    async def end(self, events: str) -> None:
        """Send the last events."""
        await self._send({"type": "http.response.body", "body": events.encode(), "more_body": False})

    async def refuse(self, refusal: RefusalError) -> None:
        """End with an error."""
        self._labels["status"] = str(refusal.status)
        error = {"message": str(refusal), "type": "server_error", "param": None, "code": refusal.code}
        await self.end(f"data: {json.dumps({'error': error}, ensure_ascii=False)}\n\n")


class Meter(Collector):
    """Figures of one server for Prometheus: its version and requests, and the rows and copies that it left out."""

    def __init__(self, serving: Champion) -> None:
        self._serving = serving
        self._registry = registry = CollectorRegistry()
        self._requests = CounterMetric(
            "deal_requests", "Requests that ended.", ["path", "status", "version"], registry=registry
        )
        self._seconds = Histogram(
            "deal_request_seconds", "Seconds of a request.", ["path"], buckets=BUCKETS, registry=registry
        )
        self._open = Gauge("deal_requests_in_flight", "Requests in flight.", registry=registry)
        registry.register(self)

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        """Return the state of the champion, and the figures that prediction log and rollout count themselves."""
        state = self._serving.state()
        names = ("lineage", "version", "champion")
        serving = GaugeMetricFamily("deal_serving", "The version that answers, and the champion.", labels=names)
        serving.add_metric([state[name] or "" for name in names], 1)
        yield serving
        failed = "1 while the champion does not load or the store does not answer."
        yield GaugeMetricFamily("deal_serving_problem", failed, value=state["problem"] is not None)
        log, rollout = self._serving.log, self._serving.rollout
        if engines := state.get("engines"):
            there = GaugeMetricFamily("deal_engine_up", "1 while the engine answers.", labels=["engine"])
            for engine in engines:
                there.add_metric([engine["url"]], engine["problem"] is None)
            yield there
        lost, left_out = "Answers that are missing in the prediction log.", "Copies that no shadow has answered."
        yield CounterMetricFamily("deal_predictions_dropped", lost, value=log.num_dropped if log else 0)
        yield CounterMetricFamily("deal_shadow_requests_dropped", left_out, value=rollout.num_dropped if rollout else 0)

    @contextmanager
    def measured(self, path: str) -> Iterator[dict[str, str]]:
        """Count a request, under labels to which the caller adds the answer's status and version."""
        begun, labels = time.perf_counter(), {"path": path, "status": "500", "version": ""}
        self._open.inc()
        try:
            yield labels
        except RefusalError as refusal:
            labels["status"] = str(refusal.status)
            raise
        except ClientDisconnect:
            labels["status"] = "400"
            raise
        finally:
            self._open.dec()
            self._requests.labels(**labels).inc()
            self._seconds.labels(path).observe(time.perf_counter() - begun)

    def page(self) -> Response:
        """Return the answer to GET /metrics."""
        return Response(generate_latest(self._registry), headers={"Content-Type": CONTENT_TYPE_LATEST})
