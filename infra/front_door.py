"""The front door: one address for clients, whichever model server stands behind it.

A request waits while there is no server, and is sent again when its server died: answering changes nothing, so that
asking twice does no harm. Every answer names the version that gave it.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, Protocol

import httpx
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from infra.model_server import ANSWER_SECONDS

MAX_BODY_BYTES = 16 << 20
MAX_TRIES = 3
"""A request that was being answered when so many servers died is taken to be the reason."""
WAIT_SECONDS = 120.0
"""How long a request waits for a server."""


class Server(Protocol):
    """What the front door needs of a model server."""

    version: str
    url: str | None
    num_in_flight: int


class Backends:
    """The server that answers now. Of one that was replaced, the requests in flight are counted until none is left."""

    def __init__(self) -> None:
        self.current: Server | None = None
        self._changed = asyncio.Condition()

    async def switch(self, server: Server | None) -> Server | None:
        """Let `server` take all new requests; return the one that did before."""
        async with self._changed:
            before, self.current = self.current, server
            self._changed.notify_all()
        return before

    async def drained(self, server: Server) -> None:
        """Return when nothing is in flight at a server that takes no new requests."""
        async with self._changed:
            await self._changed.wait_for(lambda: server.num_in_flight == 0)

    @asynccontextmanager
    async def lent(self) -> AsyncIterator[Server]:
        """The server that answers now, waited for if there is none, and kept from ending until it is given back."""
        async with self._changed:
            await self._changed.wait_for(lambda: self.current is not None)
            server = self.current
            assert server is not None
            server.num_in_flight += 1
        try:
            yield server
        finally:
            async with self._changed:
                server.num_in_flight -= 1
                self._changed.notify_all()


def make_app(
    backends: Backends, client: httpx.AsyncClient, lineage: str, state: Callable[[], dict[str, Any]]
) -> Starlette:
    """The web application: POST /invocations, GET /health, GET /version.

    Args:
        backends: where requests go.
        client: asks the servers.
        lineage: whose versions answer.
        state: what /version says.
    """

    async def invoke(request: Request) -> Response:
        body = await _read(request)
        if body is None:
            return _refusal(413, f"The request is larger than {MAX_BODY_BYTES >> 20} MB; send fewer rows at once.")
        kind = request.headers.get("content-type", "application/json")
        try:
            async with asyncio.timeout(WAIT_SECONDS + ANSWER_SECONDS):
                return await _ask(backends, client, lineage, body, kind)
        except TimeoutError:
            return _refusal(503, f"No version of {lineage} answered in time; GET /version says how it stands.")

    async def health(_: Request) -> Response:
        is_serving = backends.current is not None
        return JSONResponse({"status": "serving" if is_serving else "waiting"}, 200 if is_serving else 503)

    async def version(_: Request) -> Response:
        return JSONResponse(state())

    return Starlette(routes=[
        Route("/invocations", invoke, methods=["POST"]),
        Route("/health", health),
        Route("/ping", health),
        Route("/version", version),
    ])  # fmt: skip


async def _ask(backends: Backends, client: httpx.AsyncClient, lineage: str, body: bytes, kind: str) -> Response:
    num_deaths = 0
    while num_deaths < MAX_TRIES:
        async with backends.lent() as server:
            headers = {"X-Deal-Lineage": lineage, "X-Deal-Version": server.version}
            try:
                answer = await client.post(
                    f"{server.url}/invocations", content=body, headers={"content-type": kind}, timeout=ANSWER_SECONDS
                )
            except httpx.ReadTimeout:
                raise TimeoutError from None
            except httpx.ConnectError:
                pass  # it had died already: the request waits for the next one, and is not the reason
            except httpx.TransportError:
                num_deaths += 1  # it died, or closed a connection that it had kept open
            else:
                if answer.is_success:
                    return Response(answer.content, 200, headers, answer.headers.get("content-type"))
                return _refusal(answer.status_code, _reason(answer), headers)
        await asyncio.sleep(0.5)  # until its end has been noticed
    return _refusal(502, f"{MAX_TRIES} servers ended while they answered this request; send it in smaller parts.")


async def _read(request: Request) -> bytes | None:
    """The body; None if it is too large."""
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > MAX_BODY_BYTES:
            return None
        parts.append(part)
    return b"".join(parts)


def _reason(answer: httpx.Response) -> str:
    """What MLflow's server says, in one sentence and without the request's texts, which it repeats before it."""
    try:
        message = str(answer.json()["message"])
    except (ValueError, KeyError, TypeError):
        message = answer.text
    message = message.rpartition("\nError: ")[2]
    if "Failed to enforce schema" in message:
        message = message.rpartition("Error: ")[2]
    message = message.split("\nInput:")[0].split(" IMPORTANT:")[0]  # the request again; advice on MLflow 1
    return " ".join(message.split())[:1000]


def _refusal(status: int, message: str, headers: dict[str, str] | None = None) -> Response:
    body = json.dumps({"error": message}, ensure_ascii=False)
    return Response(body, status, headers, "application/json")
