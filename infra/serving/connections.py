"""The connections of the web server: how many there may be, from one address and in all, and how long they may idle.

uvicorn limits neither, and waits for ever for the first request. Here a protocol stands in front of uvicorn's own. At a
limit, the connection that has waited longest for its client is closed, not the new one. So nobody keeps others away by
idle connections or slow requests, and a look at /health always comes through.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

MAX_CONNECTIONS = 512
MAX_OF_ADDRESS = 256
"""Connections from one address. Behind a proxy all clients have the proxy's address."""
IDLE_SECONDS = 30.0
"""Time for a client to send the head of a request, from the connection's beginning or the last answer's end."""


class Connections:
    """The open connections of one server, and its application in front of `app`, which sees requests begin and end."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._open: dict[Any, Connection] = {}

    def protocol(self, **options: Any) -> Connection:
        """Return the protocol of a new connection. `options` are those of uvicorn's."""
        return Connection(self, H11Protocol(**options))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request. Only while the answer is computed, its connection does not wait for the client."""
        connection = self._open.get(scope["client"])
        if connection is None:  # the client has gone already
            await self._app(scope, receive, send)
            return

        async def hear() -> Message:
            message = await receive()
            if not message.get("more_body"):
                connection.is_answering = True
            return message

        async def say(message: Message) -> None:
            connection.is_answering = False
            await send(message)

        connection.end_limit()
        try:
            await self._app(scope, hear, say)
        finally:
            connection.begin_limit()

    def add(self, new: Connection) -> None:
        """Take a connection, and close another one if there are too many."""
        self._open[new.peer] = new
        numbers = Counter(connection.address for connection in self._open.values())
        if numbers[new.address] > MAX_OF_ADDRESS:
            crowd = [connection for connection in self._open.values() if connection.address == new.address]
        elif len(self._open) > MAX_CONNECTIONS:
            crowd = list(self._open.values())
        else:
            return
        waiting = [connection for connection in crowd if connection is not new and not connection.is_answering]
        # the address with the most connections loses one, and of its connections the one that has waited longest
        closed = min(waiting, key=lambda connection: (-numbers[connection.address], connection.since), default=new)
        self.remove(closed)
        closed.abort()

    def remove(self, connection: Connection) -> None:
        """Forget a connection that is closed."""
        if self._open.get(connection.peer) is connection:
            del self._open[connection.peer]


class Connection:
    """One connection. It hands everything to uvicorn's protocol, and closes if its client sends no request in time."""

    def __init__(self, connections: Connections, inner: asyncio.Protocol) -> None:
        self._connections, self._inner = connections, inner
        # bytes do not restart the time limit, since a request ends it: they go straight to uvicorn's protocol
        self.data_received, self.eof_received = inner.data_received, inner.eof_received
        self.pause_writing, self.resume_writing = inner.pause_writing, inner.resume_writing
        self._limit: asyncio.TimerHandle | None = None
        self.is_answering = False
        """Whether the server has the whole request and its answer has not begun."""
        self.since = 0.0
        """When it began to wait for its client, by the loop's clock."""

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Begin the time limit for the first request."""
        self._transport = transport
        self.peer = (transport.get_extra_info("peername") or (None, id(self)))[:2]
        """Address and port, as a request's scope has them."""
        self.address = self.peer[0]
        self._inner.connection_made(transport)
        self.begin_limit()
        self._connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """End the time limit."""
        self.end_limit()
        self._connections.remove(self)
        self._inner.connection_lost(exc)

    def begin_limit(self) -> None:
        """Wait for the client's next request, for IDLE_SECONDS."""
        self.end_limit()
        loop = asyncio.get_running_loop()
        self.since, self.is_answering = loop.time(), False
        if not self._transport.is_closing():
            self._limit = loop.call_later(IDLE_SECONDS, self._transport.close)

    def end_limit(self) -> None:
        """Go on without a time limit: there is a request."""
        if self._limit is not None:
            self._limit.cancel()
            self._limit = None

    def abort(self) -> None:
        """Close the connection at once."""
        self._transport.abort()
