"""The process of `deal serve`: it listens, loads the champion, answers, and ends within seconds."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import resource
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from logging.handlers import RotatingFileHandler
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp

from deal_core.errors import ConfigError
from deal_core.safe_text import brief
from infra.logs import MAX_BYTES, PlainFormatter
from infra.serving.champion import Champion, Say
from infra.serving.engines import Engines
from infra.serving.prediction_log import LOG, open_prediction_log
from infra.serving.server import LOOPBACK_NAMES, make_app
from infra.serving.tracing import sending_traces
from infra.settings import EngineSettings, ServingSettings
from infra.store.base import ObjectStore

MAX_CONNECTIONS = 2_048
"""At this number of open connections uvicorn answers every request with 503, also one to /health."""
IDLE_SECONDS = 30
"""Time from an answer to the next request of a connection."""
GRACE_SECONDS = 3
"""Time for open requests when the server ends."""
JOIN_SECONDS = 1.0
SWITCH_SECONDS = 0.0005
"""How long Python lets one thread compute while others wait. The model's thread gives way at each operation and waits
again, so with Python's 5 ms the reading of one large request would stop all answers."""
NUM_FILES = 2 * MAX_CONNECTIONS
"""Open files that the process may need: of clients, and of engines."""
API_KEY = "DEAL_SERVE_API_KEY"
EVERYWHERE = ("0.0.0.0", "::", "")
HOST_PATTERN = re.compile(r"\*|(\*\.)?[\w.-]+|\[[\da-f]*:[\da-f.:]+\]", re.ASCII | re.IGNORECASE)
"""A trusted host: *, a name, *. and a name, or an IPv6 address in brackets, as in the header of a request."""


def serve(
    store: ObjectStore,
    lineage: str,
    home: Path,
    *,
    host: str,
    port: int,
    trusted_hosts: Sequence[str],
    engines: Sequence[str] = (),
    say: Say,
    ready: Callable[[str, str], None],
) -> bool:
    """Serve the champion until SIGINT or SIGTERM. Open requests are answered first; a second SIGINT ends them.

    `store` has the versions and gets the prediction log. `home` gets the server's log. The port 0 is any free one.
    `trusted_hosts` are names that clients may use, in addition to those of loopback and `host`. `engines` are addresses
    of vLLM servers that answer; without any, the model is in this process.

    `say` gets each message for the user. `ready` is called once, with the address and the version that answers.

    Returns:
        Whether all threads have ended. False: a thread waits for the store and would delay the process's end.

    Raises:
        ConfigError: The server cannot listen on the address, the lineage or a trusted host has no valid name, or
            DEAL_SERVE_API_KEY is empty.
        DealError: The champion cannot be loaded; see `Champion.begin`.
    """
    api_key, trusted = _api_key(host, say), _trusted(host, trusted_hosts)
    listener = listen(host, port)
    log = open_prediction_log(store, lineage)
    on_engines = Engines(store, lineage, engines, EngineSettings(), say) if engines else None
    champion, ended = Champion(store, lineage, say, log, on_engines), threading.Event()

    def announce() -> None:
        if log is not None:
            log.start()  # not before: now the lineage is known
        address, bound_port = listener.getsockname()[:2]
        ready(f"http://{_in_brackets(address)}:{bound_port}", str(champion.version))

    follower = Follower(champion, ended)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C, also while the champion loads
    sys.setswitchinterval(SWITCH_SECONDS)
    _allow_files(NUM_FILES)
    log_file = home / "logs" / f"serve-{lineage}.log"
    with listener, _logged_to(log_file), sending_traces(), suppress(KeyboardInterrupt):
        try:
            server = make_server(make_app(champion, trusted, api_key), champion.drain)
            asyncio.run(answer(champion, follower, server, listener, announce))
        finally:
            ended.set()
            champion.stop()
            if log is not None:
                log.close()
    if follower.is_alive():
        follower.join(JOIN_SECONDS)
    return not follower.is_alive()


def listen(host: str, port: int) -> socket.socket:
    """Listen on an address; the port 0 is any free one. ConfigError: the address is taken, or not this machine's."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(f"Cannot listen on {host} port {port} ({reason}); give another with --port.") from None
    # Every connection has this option from here: asyncio sets it only on sockets that were made for TCP by number, and
    # create_server's are not. Without it, the second part of an answer waits for the client's acknowledgement, 40 ms.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


class Follower(threading.Thread):
    """Loads the champion, and follows the promotion log. A store that hangs delays no request, and no end."""

    def __init__(self, champion: Champion, ended: threading.Event) -> None:
        super().__init__(name="champion", daemon=True)
        self._champion, self._ended = champion, ended

    async def begin(self) -> None:
        """Begin, and wait until the champion is loaded; errors are those of `Champion.begin`."""
        self._loop = asyncio.get_running_loop()
        self._begun: asyncio.Future[None] = self._loop.create_future()
        self.start()
        await self._begun

    def run(self) -> None:
        """Do it; `begin` calls this in the thread."""
        error: Exception | None = None
        try:
            self._champion.begin()
        except Exception as problem:
            error = problem
        with suppress(RuntimeError):  # the event loop has ended
            self._loop.call_soon_threadsafe(self._tell, error)
        if error is None:
            self._champion.follow(self._ended)

    def _tell(self, error: Exception | None) -> None:
        if self._begun.cancelled():
            return
        if error is None:
            self._begun.set_result(None)
        else:
            self._begun.set_exception(error)


async def answer(
    champion: Champion,
    follower: Follower,
    server: uvicorn.Server,
    listener: socket.socket,
    announce: Callable[[], None],
) -> None:
    """Load the champion, announce it, and answer until the server is told to end."""
    async with champion:
        await follower.begin()
        announce()
        await server.serve([listener])


def _allow_files(number: int) -> None:
    """Let the process open so many files, as far as the system allows it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = number if hard == resource.RLIM_INFINITY else min(number, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _api_key(host: str, say: Say) -> str | None:
    """Return the token that clients must send, without white space around it; None: none."""
    if not os.environ.get(API_KEY, "x").strip():
        raise ConfigError(f"{API_KEY} is empty, so every client would be answered; give a token, or unset it.")
    secret = ServingSettings().serve_api_key
    if secret is None and host not in (*LOOPBACK_NAMES, "::1"):
        say(f"Clients need no token, and {host} may be reached by other machines; set {API_KEY}.")
    return None if secret is None else secret.get_secret_value().strip()


def make_server(app: ASGIApp, on_end: Callable[[], object] = lambda: None) -> uvicorn.Server:
    """Return a server of the web application with this module's limits. `on_end` is called when it begins to end."""
    config = uvicorn.Config(
        app,
        loop="asyncio",
        http="h11",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_keep_alive=IDLE_SECONDS,
        timeout_graceful_shutdown=GRACE_SECONDS,
    )
    return _Server(config, on_end)


class _Server(uvicorn.Server):
    """A server for which a signal is the end of its work. uvicorn's own server raises the signal again then."""

    def __init__(self, config: uvicorn.Config, on_end: Callable[[], object]) -> None:
        super().__init__(config)
        self._on_end = on_end

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        with super().capture_signals():
            yield
            self._captured_signals.clear()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Answer the open requests, and end."""
        self._on_end()
        await super().shutdown(sockets)


@contextmanager
def _logged_to(path: Path) -> Iterator[None]:
    """Send what the server says, and warnings of its libraries, to a file of limited size, not to the screen."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = RotatingFileHandler(path, maxBytes=MAX_BYTES, backupCount=1, delay=True, encoding="utf-8")
    handler.setFormatter(PlainFormatter())
    loggers = (LOG, *map(logging.getLogger, ("uvicorn.error", "asyncio")))
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO if logger is LOG else logging.WARNING)
        logger.propagate = False
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
        handler.close()


def _trusted(host: str, more: Sequence[str]) -> list[str]:
    """Return the host names that clients may use; raise ConfigError if one of `more` can match no request."""
    names = [_in_brackets(name) for name in more]
    for name in names:
        if not HOST_PATTERN.fullmatch(name):
            raise ConfigError(
                f"The trusted host is {brief(name)}; give a name without a port, such as model.example, or *.example "
                "for all names below it, or * for all hosts."
            )
    return [*LOOPBACK_NAMES, *([] if host in EVERYWHERE else [_in_brackets(host)]), *names]


def _in_brackets(host: str) -> str:
    """Return a host as requests name it: an IPv6 address in brackets."""
    return f"[{host}]" if host.count(":") > 1 and not host.startswith("[") else host
