"""Stages and the lock around them: timed, reported, stoppable, one run per lineage. What may pass is asked again."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import httpx
import pytest
import tenacity
from anyio import CancelScope
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows.lock import lock_lineage
from tasks.progress import (
    Interrupted,
    advance,
    in_stage,
    patient,
    raise_if_stopped,
    reporting_to,
    stage_times,
    staged,
    time_stages,
    to_the_end,
)

AT_ONCE = {"wait": tenacity.wait_none()}


@pytest.fixture
def no_server(home: Path) -> Iterator[None]:
    """Settings as on a machine without a Prefect server, whatever other tests have started."""
    with temporary_settings(restore_defaults={PREFECT_API_URL}):
        yield


class Recorder:
    """Keeps what is reported, and in which thread."""

    def __init__(self) -> None:
        self.events: list[tuple[object, ...]] = []

    def stage_started(self, stage: str) -> None:
        self.events.append(("started", stage))

    def advanced(self, stage: str, done: float, total: float | None, detail: str = "") -> None:
        self.events.append(("advanced", stage, done, total, detail))

    def stage_finished(self, stage: str, seconds: float, detail: str) -> None:
        self.events.append(("finished", stage, seconds >= 0, detail))

    def said(self, message: str) -> None:
        self.events.append(("said", message))


def test_a_stage_runs_in_a_thread_and_reports_to_the_flows_reporter() -> None:
    recorder, threads = Recorder(), []

    @staged("train", lambda result: f"it is {result}")
    def work(number: int) -> int:
        threads.append(threading.current_thread())
        advance("train", 4)(number, detail="loss 1")
        return number + 1

    async def flow() -> int:
        time_stages()
        result = await work(2)
        assert set(stage_times()) == {"train"}
        return result

    with reporting_to(recorder):
        assert asyncio.run(flow()) == 3
    assert threads[0] is not threading.main_thread()
    assert recorder.events == [
        ("started", "train"),
        ("advanced", "train", 2, 4, "loss 1"),
        ("finished", "train", True, "it is 3"),
    ]


def test_a_run_that_was_asked_to_stop_ends_at_its_next_step() -> None:
    recorder, steps = Recorder(), []
    with reporting_to(recorder) as stop:

        def train() -> None:
            report = advance("train", 10)
            for step in range(10):
                report(step)
                steps.append(step)
                if step == 3:
                    stop.set()

        with pytest.raises(Interrupted):
            asyncio.run(in_stage("train", train))
        with pytest.raises(Interrupted):
            asyncio.run(in_stage("next", lambda: steps.append(99)))
    assert steps == [0, 1, 2, 3]


@pytest.mark.parametrize("told", [lambda: reporting_to(Recorder()), nullcontext], ids=["command", "worker"])
def test_a_cancelled_flow_ends_the_thread_of_its_stage(told: Callable[[], AbstractContextManager[object]]) -> None:
    began, ended, steps = threading.Event(), threading.Event(), list[int]()

    def train() -> None:
        report = advance("train")
        began.set()
        try:
            for _ in range(500):
                report(1)
                time.sleep(0.01)
            steps.append(500)
        finally:
            ended.set()

    async def flow() -> None:
        stage = asyncio.create_task(in_stage("train", train))
        await asyncio.to_thread(began.wait)
        stage.cancel()
        with pytest.raises(asyncio.CancelledError):
            await stage
        assert ended.is_set(), "until then the thread uses what the flow holds"

    with told():
        asyncio.run(flow())
    assert not steps, "it ended before its last step"


def test_the_time_of_a_stage_is_that_of_all_its_tries_since_the_run_began() -> None:
    def fail() -> None:
        time.sleep(0.05)
        raise ValueError

    async def flow() -> float:
        time_stages()
        with pytest.raises(ValueError):  # noqa: PT011 - which error does not matter
            await in_stage("repeat", fail)
        await in_stage("repeat", time.sleep, 0.0)
        seconds = stage_times()["repeat"]
        time_stages()
        assert stage_times() == {}, "another run of the same process begins"
        return seconds

    assert asyncio.run(flow()) >= 0.05


def test_a_callback_belongs_to_the_run_that_made_it() -> None:
    with reporting_to(Recorder()) as stop:
        report = advance("train")
        stop.set()
    raise_if_stopped()  # the run that is over does not stop others
    with pytest.raises(Interrupted):
        report(1)


@pytest.mark.usefixtures("no_server")
def test_one_run_per_lineage_at_a_time() -> None:
    events: list[str] = []
    recorder = Recorder()

    async def hold(name: str, lineage: str, entered: asyncio.Event, leave: asyncio.Event) -> None:
        async with lock_lineage(lineage):
            events.append(f"{name} in")
            entered.set()
            await leave.wait()
            events.append(f"{name} out")

    async def flow() -> None:
        first, second, other = asyncio.Event(), asyncio.Event(), asyncio.Event()
        leave = asyncio.Event()
        runs = [asyncio.create_task(hold("first", "l", first, leave))]
        await first.wait()
        runs.append(asyncio.create_task(hold("second", "l", second, leave)))
        runs.append(asyncio.create_task(hold("other", "m", other, leave)))
        await other.wait()
        assert not second.is_set()
        leave.set()
        await asyncio.gather(*runs)

    with reporting_to(recorder):
        asyncio.run(flow())
    assert events.index("first out") < events.index("second in")
    assert [event for event in recorder.events if event[0] == "said"], "whoever waits says so"


@pytest.mark.usefixtures("no_server")
def test_a_lineage_is_free_again_after_a_failure() -> None:
    async def fail() -> None:
        async with lock_lineage("l"):
            raise RuntimeError

    async def hold() -> None:
        async with lock_lineage("l"):
            pass

    with pytest.raises(RuntimeError):
        asyncio.run(fail())
    asyncio.run(asyncio.wait_for(hold(), timeout=30))


@pytest.mark.parametrize("error", [httpx.ConnectError("refused"), httpx.ReadTimeout("slow")])
def test_a_server_that_comes_back_is_waited_for(error: Exception) -> None:
    answers = [error, error, None]

    def ask() -> str:
        if (answer := answers.pop(0)) is not None:
            raise answer
        return "here"

    assert patient(ask).retry_with(**AT_ONCE)() == "here"


def test_an_error_that_will_not_pass_is_raised_at_once() -> None:
    calls = []

    async def ask() -> None:
        calls.append(1)
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        asyncio.run(patient(ask).retry_with(**AT_ONCE)())
    assert len(calls) == 1


def test_patience_ends_with_the_servers_own_error() -> None:
    def ask() -> None:
        raise httpx.ConnectError("refused")

    with pytest.raises(httpx.ConnectError, match="refused"):
        patient(ask).retry_with(**AT_ONCE, stop=tenacity.stop_after_attempt(3))()


def test_a_call_that_is_cancelled_again_and_again_is_waited_for() -> None:
    """Prefect cancels by a scope of anyio, which cancels every wait until the scope ends."""
    ended = threading.Event()

    def work() -> None:
        time.sleep(0.3)
        ended.set()

    async def cancel() -> None:
        with CancelScope() as scope:
            asyncio.get_running_loop().call_later(0.05, scope.cancel)
            await to_the_end(work)
        assert ended.is_set()

    with reporting_to(Recorder()):  # a run of its own: a request to stop is for the run
        asyncio.run(cancel())
