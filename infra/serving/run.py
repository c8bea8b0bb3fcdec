"""`deal serve` as a process: it listens, loads the champion, answers, and ends within seconds."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import threading
from asyncio import TimerHandle, Transport
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from deal_core.errors import ConfigError
from infra.logs import MAX_BYTES
from infra.serving.champion import LOG, Champion, Say
from infra.serving.server import LOOPBACK_NAMES, make_app

HEAD_SECONDS = 20.0
"""A client has this long to send the head of a request."""
KEEP_ALIVE_SECONDS = 30.0
"""A connection without a request is closed after this; longer than clients usually keep theirs."""
MAX_CONNECTIONS = 512
GRACE_SECONDS = 10
"""Requests in flight have this long at the end."""
JOIN_SECONDS = 1.0
EVERYWHERE = ("0.0.0.0", "::", "")


async def serve(
    lineage: str,
    home: Path,
    *,
    host: str,
    port: int,
    trusted_hosts: Sequence[str],
    say: Say,
    ready: Callable[[str, str], None],
) -> bool:
    """Serve the champion until SIGINT or SIGTERM; requests in flight are answered first. A second signal ends at once.

    Args:
        lineage: whose champion.
        home: folder for the log.
        host: address to listen on.
        port: port; 0 takes a free one.
        trusted_hosts: names under which the server may be asked, besides loopback's and `host`.
        say: told what happens.
        ready: called once with the address and the version that answers.

    Returns:
        Whether everything has ended. False: a thread still waits for MLflow, and would hold the process for minutes.

    Raises:
        ConfigError: the address cannot be listened on.
        NoChampionError: there is no champion.
        RegistryError: the champion may not serve, or the registry does not answer.
        ServingError: the champion does not load.
    """
    listener = _listen(host, port)
    champion, ended = Champion(lineage, say), threading.Event()
    begun: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    follower = _follow_in_thread(champion, begun, ended)
    with listener, _logged_to(home / "logs" / f"serve-{lineage}.log"), _signals() as (stopped, again):
        await asyncio.wait([begun, stopped], return_when=asyncio.FIRST_COMPLETED)
        try:
            if not stopped.done():
                begun.result()
                ready(_url(listener), str(champion.version))
                await _answer_until(stopped, again, make_app(champion, _trusted(host, trusted_hosts)), listener)
        finally:
            ended.set()
            champion.stop()
    follower.join(JOIN_SECONDS)
    return not follower.is_alive()


class ImpatientProtocol(H11Protocol):
    """Closes a connection whose client does not send the head of a request in time.

    uvicorn itself closes idle connections only after an answer, and waits for ever for the rest of a head.
    """

    _timer: TimerHandle | None = None

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        """Start to wait for a request."""
        super().connection_made(transport)
        if len(self.connections) > MAX_CONNECTIONS:
            transport.abort()
        self._wait_for_head()

    def data_received(self, data: bytes) -> None:
        """Wait no more once the head is there."""
        super().data_received(data)
        if not self._has_request():
            self._wait_for_head()
        elif self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone."""
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)

    def _wait_for_head(self) -> None:
        if self._timer is None:  # one byte now and then does not win time
            self._timer = self.loop.call_later(HEAD_SECONDS, self._close_without_request)

    def _has_request(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _close_without_request(self) -> None:
        self._timer = None
        if not self._has_request():
            self.timeout_keep_alive_handler()


class _Server(uvicorn.Server):
    """Leaves the signals to `serve`."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def _answer_until(
    stopped: asyncio.Future[None], again: asyncio.Future[None], app: Any, listener: socket.socket
) -> None:
    config = uvicorn.Config(
        app, http=ImpatientProtocol, ws="none", lifespan="off", log_config=None, access_log=False,
        server_header=False, timeout_keep_alive=KEEP_ALIVE_SECONDS,  # type: ignore[arg-type]  # it is handed to call_later
        timeout_graceful_shutdown=GRACE_SECONDS,
    )  # fmt: skip
    server = _Server(config)
    serving = asyncio.ensure_future(server.serve(sockets=[listener]))
    await asyncio.wait([serving, stopped], return_when=asyncio.FIRST_COMPLETED)
    server.should_exit = True
    await asyncio.wait([serving, again], return_when=asyncio.FIRST_COMPLETED)
    server.force_exit = True
    await serving


def _follow_in_thread(champion: Champion, begun: asyncio.Future[None], ended: threading.Event) -> threading.Thread:
    """Load the champion and follow the alias in a thread that the process does not wait for."""
    loop = asyncio.get_running_loop()

    def tell(error: Exception | None) -> None:
        if begun.done():
            return
        if error is None:
            begun.set_result(None)
        else:
            begun.set_exception(error)

    def follow() -> None:
        try:
            champion.begin()
        except Exception as error:
            if not ended.is_set():
                loop.call_soon_threadsafe(tell, error)
            return
        if not ended.is_set():
            loop.call_soon_threadsafe(tell, None)
        champion.follow(ended)

    thread = threading.Thread(target=follow, name="champion", daemon=True)
    thread.start()
    return thread


@contextmanager
def _signals() -> Iterator[tuple[asyncio.Future[None], asyncio.Future[None]]]:
    """Two futures: the first SIGINT or SIGTERM is done with the first, the next one with the second."""
    loop = asyncio.get_running_loop()
    futures: tuple[asyncio.Future[None], asyncio.Future[None]] = loop.create_future(), loop.create_future()

    def on_signal() -> None:
        next((future for future in futures if not future.done()), loop.create_future()).set_result(None)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal)
    try:
        yield futures
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


@contextmanager
def _logged_to(path: Path) -> Iterator[None]:
    """Let the server and asyncio write into a file, which stays small, and not to the screen."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = RotatingFileHandler(path, maxBytes=MAX_BYTES, backupCount=1, delay=True, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    loggers = (LOG, logging.getLogger("uvicorn.error"), logging.getLogger("asyncio"))
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.WARNING)
        logger.propagate = False
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
        handler.close()


def _trusted(host: str, more: Sequence[str]) -> list[str]:
    own = [] if host in EVERYWHERE else [f"[{host}]" if ":" in host else host]
    return [*LOOPBACK_NAMES, *own, *more]


def _url(listener: socket.socket) -> str:
    address, port = listener.getsockname()[:2]
    return f"http://{f'[{address}]' if ':' in address else address}:{port}"


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(f"Cannot listen on {host} port {port} ({reason}); give another with --port.") from None
