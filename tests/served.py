"""A server of `deal serve` in a thread, in front of a champion that answers in capitals."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from starlette.applications import Starlette

from deal_core.data.schema import TaskSchema
from deal_core.errors import ConfigError
from deal_core.evaluation.answerer import Answered, Sampling
from deal_core.evaluation.answering import InputRow, ServedTask, ServedVersion
from deal_core.evaluation.generation import Confidence
from infra.serving import run
from infra.serving.champion import Champion as LoadedChampion
from infra.serving.prediction_log import PredictionLog
from infra.serving.server import LOOPBACK_NAMES, make_app

WAIT_SECONDS = 60
TASKS = (TaskSchema(name="bank", labels=("a", "b")), TaskSchema(name="talk", format="chat"))


class Champion:
    """Answers in capitals. Some texts cause errors."""

    lineage = "l"
    version = "3"
    streams = False
    served = ServedVersion(
        lineage="l",
        base_source="b",
        base_name="b",
        base_sha256="0",
        tasks=tuple(ServedTask(schema=task, max_prompt_tokens=64, max_new_tokens=8) for task in TASKS),
        newest_task="bank",
    )

    def __init__(self, log: PredictionLog | None = None) -> None:
        self.log = log
        self.rollout, self.canary = None, None
        self.num_inside = 0
        self.may_answer = threading.Event()
        self.may_answer.set()
        self.num_given_up = 0
        self._changed = threading.Condition()

    def state(self) -> dict[str, Any]:
        return {"lineage": self.lineage, "version": self.version, "champion": self.version, "problem": None}

    async def ask(
        self,
        rows: Sequence[InputRow],
        key: str | None = None,
        version: str | None = None,
        sampling: Sampling | None = None,
        ids: Sequence[str] = (),
    ) -> Answered:
        if any(row.task == "nope" for row in rows):
            raise ConfigError("Row 1 names the task 'nope'; this version knows bank.")
        if any(row.input == "poison" for row in rows):
            raise RuntimeError("the model broke")
        with self._changed:
            self.num_inside += 1
            self._changed.notify_all()
        try:
            while not self.may_answer.is_set():
                await asyncio.sleep(0.01)
        except asyncio.CancelledError:
            with self._changed:
                self.num_given_up += 1
                self._changed.notify_all()
            raise
        sure, is_cut = [Confidence(0.75, 0.5)] * len(rows), [row.input == "long" for row in rows]
        found = Answered([row.input.upper() for row in rows], self.served, self.version, sure, is_cut=is_cut)
        return found if self.log is None else self.log.note(rows, found, 0.25)

    def wait_until(self, check: Callable[[], bool]) -> None:
        with self._changed:
            assert self._changed.wait_for(check, WAIT_SECONDS)


@contextmanager
def running(champion: Champion, log: Path, *trusted: str, api_key: str | None = None) -> Iterator[int]:
    """The server on a loopback port, in a thread. Its log is `log`."""
    with listening(make_app(champion, [*LOOPBACK_NAMES, *trusted], api_key), log) as port:
        try:
            yield port
        finally:
            champion.may_answer.set()


@contextmanager
def following(champion: LoadedChampion, log: Path) -> Iterator[tuple[int, asyncio.AbstractEventLoop]]:
    """A champion that is loaded and followed as in `deal serve`, in a thread: its loopback port, and its event loop."""
    listener = run.listen("127.0.0.1", 0)
    server, ended, begun = run.make_server(make_app(champion), champion.drain), threading.Event(), threading.Event()
    follower, loops, errors = run.Follower(champion, ended), list[asyncio.AbstractEventLoop](), list[Exception]()

    def announce() -> None:
        loops.append(asyncio.get_running_loop())
        begun.set()

    def serve() -> None:
        try:
            with run._logged_to(log):
                asyncio.run(run.answer(champion, follower, server, listener, announce))
        except Exception as error:
            errors.append(error)
        finally:
            begun.set()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        begun.wait()
        if errors:
            raise errors[0]
        yield listener.getsockname()[1], loops[0]
    finally:
        ended.set()
        champion.stop()
        server.should_exit = True
        thread.join(WAIT_SECONDS)
        follower.join(WAIT_SECONDS)
        listener.close()
        assert not thread.is_alive() and not follower.is_alive()


@contextmanager
def listening(app: Starlette, log: Path) -> Iterator[int]:
    """A web application behind the server of `deal serve`, on a loopback port, in a thread."""
    listener = run.listen("127.0.0.1", 0)
    server = run.make_server(app)

    def serve() -> None:
        with run._logged_to(log):
            server.run([listener])

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(WAIT_SECONDS)
        listener.close()
        assert not thread.is_alive()
