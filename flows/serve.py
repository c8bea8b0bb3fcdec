"""Serve: a lineage's champion answers at one address, and whichever version the alias moves to takes over.

When the alias moves, a server of the new version is started beside the old one; once it answers its health check it
takes all new requests, and the old one ends when those in flight are answered.
"""

from __future__ import annotations

import asyncio
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import uvicorn

from deal_core.errors import ConfigError, DealError, RegistryError
from flows.history import unknown_lineage
from infra.front_door import Backends, make_app
from infra.model_server import ModelServer, ServerError
from infra.registry import VersionInfo, open_registry, require_through_gate
from infra.served_copies import ServedCopies

POLL_SECONDS = 2.0
"""Between two looks at the alias."""
TICK_SECONDS = 0.2
START_SECONDS = 300.0
"""A version that does not answer by then counts as one that does not load."""
PAUSE_SECONDS = 60.0
"""A version that did not load is tried again after so long."""
DRAIN_SECONDS = 330.0
SERVED_VERSION = "DEAL_SERVED_VERSION"

Say = Callable[[str], None]


class Follower:
    """Keeps the server of the champion running, and moves with the alias."""

    def __init__(self, lineage: str, home: Path, say: Say) -> None:
        self.lineage = lineage
        self.backends = Backends()
        self.problem: str | None = None
        self._copies = ServedCopies(home, lineage)
        self._say = say
        self._registry = open_registry()
        self._client = httpx.AsyncClient(limits=httpx.Limits(max_connections=None, max_keepalive_connections=64))
        self._champion: str | None = None
        self._looked_at = -POLL_SECONDS
        self._looking: asyncio.Task[None] | None = None
        self._serving: ModelServer | None = None
        self._served: str | None = None
        self._before: str | None = None
        """What served before that: its copy stays, for a quick rollback."""
        self._candidate: ModelServer | None = None
        self._started_at = 0.0
        self._failed: dict[str, float] = {}
        self._ending: dict[asyncio.Task[None], str] = {}

    @property
    def client(self) -> httpx.AsyncClient:
        """What asks the servers."""
        return self._client

    def state(self) -> dict[str, Any]:
        """What GET /version says."""
        return {
            "lineage": self.lineage,
            "version": self._serving.version if self._serving else None,
            "champion": self._champion,
            "starting": self._candidate.version if self._candidate else None,
            "problem": self.problem,
        }

    async def begin(self) -> None:
        """Return when the champion answers.

        Raises:
            RegistryError: there is no champion that may serve, or the registry does not answer.
            ServerError: the champion does not load.
        """
        champion = await asyncio.to_thread(self._ask)
        if champion is None:
            raise RegistryError(unknown_lineage(self.lineage))
        self._champion = champion.version
        self._copies.open()
        while self._serving is None:
            await self.tick()
            if champion.version in self._failed:
                raise ServerError(self.problem or "")
            await asyncio.sleep(TICK_SECONDS)

    async def follow(self) -> None:
        """Look after the servers until cancelled."""
        while True:
            await self.tick()
            await asyncio.sleep(TICK_SECONDS)

    async def tick(self) -> None:
        """One look at the server that answers and the one that starts, and every two seconds at the alias."""
        self._look_beside()
        if self._serving and not self._serving.is_alive():
            self._say(f"The server of version {self._serving.version} died; it is started again.")
            self._retire(self._serving)
            self._serving = None
            await self.backends.switch(None)
        wanted = self._wanted()
        if self._candidate and self._candidate.version != wanted:
            self._retire(self._candidate)
            self._candidate = None
        if self._candidate:
            await self._try_candidate(self._candidate)
        elif wanted and (self._serving is None or self._serving.version != wanted):
            await self._start(wanted)

    async def close(self) -> None:
        """End every server."""
        tasks = [*self._ending, *([self._looking] if self._looking else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        servers = [server for server in (self._serving, self._candidate) if server]
        await asyncio.gather(*(asyncio.to_thread(server.stop) for server in servers))
        await self._client.aclose()
        self._copies.close()

    def _look_beside(self) -> None:
        """See that the alias is looked at, beside all else: an MLflow that is away takes minutes to say so."""
        if self._looking and self._looking.done():
            looked, self._looking = self._looking, None
            looked.result()
        if self._looking is None and time.monotonic() - self._looked_at >= POLL_SECONDS:
            self._looking = asyncio.create_task(self._look())

    async def _look(self) -> None:
        try:
            champion = await asyncio.to_thread(self._ask)
        except RegistryError as error:
            self._note(f"{error} What serves goes on.")
            return
        finally:
            self._looked_at = time.monotonic()
        if champion is None:
            self._note(f"{self.lineage} has no champion any more; what serves goes on.")
        elif champion.version != self._champion:
            self._champion = champion.version
            self._failed.clear()
            self.problem = None
        elif not self._failed:
            self.problem = None

    def _ask(self) -> VersionInfo | None:
        """The champion; one that did not come through its gate is an error."""
        champion = self._registry.champion(self.lineage)
        if champion is not None:
            require_through_gate(champion)
        return champion

    def _wanted(self) -> str | None:
        """The version that should serve: the champion, unless it has just failed to load."""
        version = self._champion
        if version is not None and time.monotonic() - self._failed.get(version, -PAUSE_SECONDS) < PAUSE_SECONDS:
            return self._served
        return version

    async def _start(self, version: str) -> None:
        folder, log = self._copies.folder_of(version), self._copies.log_of(version)
        try:
            if not folder.exists():
                await asyncio.to_thread(self._registry.download, self.lineage, version, folder)
            # threads that forked it must not end before it: this is the main one
            self._candidate = ModelServer(version, folder, log, {SERVED_VERSION: version})
        except (DealError, OSError) as error:  # a full disk must not end the server that answers
            self._fail(version, str(error))
            return
        self._started_at = time.monotonic()

    async def _try_candidate(self, candidate: ModelServer) -> None:
        try:
            if not await candidate.is_ready(self._client):
                if time.monotonic() - self._started_at > START_SECONDS:
                    raise ServerError(f"it did not answer within {START_SECONDS:.0f} s; see {candidate.log}.")
                return
        except ServerError as error:
            self._candidate = None
            self._retire(candidate)
            self._fail(candidate.version, str(error))
            return
        self._candidate, before, self._serving = None, self._serving, candidate
        await self.backends.switch(candidate)
        seconds = time.monotonic() - self._started_at
        if candidate.version != self._served:
            self._before, self._served = self._served, candidate.version
        self._failed.pop(candidate.version, None)
        self.problem = None
        self._say(f"Version {candidate.version} serves (ready in {seconds:.1f} s).")
        if before:
            self._retire(before)

    def _fail(self, version: str, reason: str) -> None:
        self._failed[version] = time.monotonic()
        self._copies.remove(version)  # fetched anew when it is tried again
        serving = f"; version {self._serving.version} goes on serving" if self._serving else ""
        self._note(f"Version {version} does not load: {reason.rstrip('.')}{serving}.")

    def _note(self, problem: str) -> None:
        if problem != self.problem:
            self._say(problem)
        self.problem = problem

    def _retire(self, server: ModelServer) -> None:
        task = asyncio.create_task(self._end(server))
        self._ending[task] = server.version
        task.add_done_callback(self._tidy)

    def _tidy(self, ended: asyncio.Task[None]) -> None:
        """A server has ended: remove what was fetched and logged of versions that nobody needs any more."""
        del self._ending[ended]
        needed = {self._champion, self._served, self._before, *self._ending.values()}
        self._copies.keep({version for version in needed if version is not None})

    async def _end(self, server: ModelServer) -> None:
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(DRAIN_SECONDS):
                    await self.backends.drained(server)
        finally:
            await asyncio.to_thread(server.stop)


async def serve(lineage: str, home: Path, *, host: str, port: int, say: Say, ready: Callable[[str, str], None]) -> None:
    """Serve the champion until SIGINT or SIGTERM; requests in flight are answered first.

    Args:
        lineage: whose champion.
        home: folder for logs and fetched versions.
        host: address to listen on.
        port: port; 0 takes a free one.
        say: told what happens.
        ready: called once with the address and the version that answers.

    Raises:
        ConfigError: the address cannot be listened on.
        RegistryError: there is no champion that may serve, or the registry does not answer.
        ServerError: the champion does not load.
    """
    listener = _listen(host, port)
    follower = Follower(lineage, home, say)
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopped.set)
    try:
        if not await _unless(stopped, follower.begin()):
            return
        address, bound = listener.getsockname()[:2]
        ready(f"http://{f'[{address}]' if ':' in address else address}:{bound}", str(follower.state()["version"]))
        await _run(follower, listener, stopped)
    finally:
        listener.close()
        await follower.close()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


async def _run(follower: Follower, listener: socket.socket, stopped: asyncio.Event) -> None:
    app = make_app(follower.backends, follower.client, follower.lineage, follower.state)
    config = uvicorn.Config(app, log_level="warning", lifespan="off", timeout_graceful_shutdown=30)
    server = _Server(config)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    following = asyncio.create_task(follower.follow())
    waiting = asyncio.create_task(stopped.wait())
    await asyncio.wait([serving, following, waiting], return_when=asyncio.FIRST_COMPLETED)
    server.should_exit = True
    await serving
    waiting.cancel()
    if following.done():
        following.result()  # it ends by itself only if it broke
    following.cancel()


class _Server(uvicorn.Server):
    """Leaves the signals to us: the model servers end after the last request is answered."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def _unless(stopped: asyncio.Event, work: Any) -> bool:
    """Do the work; False if it was stopped before its end."""
    working, waiting = asyncio.ensure_future(work), asyncio.create_task(stopped.wait())
    await asyncio.wait([working, waiting], return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    if working.done():
        working.result()
        return True
    working.cancel()
    await asyncio.gather(working, return_exceptions=True)
    return False


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(f"Cannot listen on {host} port {port} ({reason}); give another with --port.") from None
