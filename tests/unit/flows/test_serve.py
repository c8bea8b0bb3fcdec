"""`deal serve` before a registry that is away and servers that die; both are stand-ins."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest

import flows.serve
from deal_core.errors import RegistryError
from flows.serve import Follower


class Registry:
    """Says which version is champion, or that it is away, and then not before it is let."""

    def __init__(self) -> None:
        self.version = "1"
        self.facts = {"accepted": True, "reasons": (), "approval": None, "promoted": None}
        self.is_away = False
        self.was_asked = threading.Event()
        self.may_answer = threading.Event()

    def champion(self, lineage: str) -> SimpleNamespace:
        if self.is_away:
            self.was_asked.set()
            self.may_answer.wait(20)
            raise RegistryError("MLflow is away.")
        return SimpleNamespace(lineage=lineage, version=self.version, **self.facts)

    def download(self, lineage: str, version: str, folder: Path) -> None:
        folder.mkdir()


class Server:
    """A model server that is ready at once."""

    def __init__(self, version: str, folder: Path, log: Path, environment: Mapping[str, str]) -> None:
        self.version, self.log, self.url, self.num_in_flight, self.alive = version, log, "http://behind:1", 0, True

    def is_alive(self) -> bool:
        return self.alive

    async def is_ready(self, client: httpx.AsyncClient) -> bool:
        return True

    def stop(self) -> None:
        self.alive = False


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[Registry]:
    registry = Registry()
    monkeypatch.setattr(flows.serve, "open_registry", lambda: registry)
    monkeypatch.setattr(flows.serve, "ModelServer", Server)
    monkeypatch.setattr(flows.serve, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(flows.serve, "TICK_SECONDS", 0.01)
    yield registry
    registry.may_answer.set()


def run(home: Path, scenario: Callable[[Follower], Awaitable[None]]) -> list[str]:
    """Run a scenario while a follower follows; what the follower said."""
    said: list[str] = []

    async def start() -> None:
        follower = Follower("l", home, said.append)
        await follower.begin()
        following = asyncio.create_task(follower.follow())
        try:
            await asyncio.wait_for(scenario(follower), 60)
        finally:
            following.cancel()
            await follower.close()

    asyncio.run(start())
    return said


async def wait_for(check: Callable[[], object], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


def test_a_server_that_dies_is_started_again_though_mlflow_keeps_silent(tmp_path: Path, registry: Registry) -> None:
    async def scenario(follower: Follower) -> None:
        registry.is_away = True
        await wait_for(registry.was_asked.is_set)
        victim = follower.backends.current
        assert isinstance(victim, Server)
        victim.alive = False
        await wait_for(lambda: follower.backends.current not in (None, victim), 5)
        assert (follower.state()["version"], follower.problem) == ("1", None)
        registry.may_answer.set()
        await wait_for(lambda: follower.problem)

    said = run(tmp_path, scenario)
    assert "The server of version 1 died; it is started again." in said
    assert said[-1] == "MLflow is away. What serves goes on."


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"accepted": False, "reasons": ("bank lost 12 points.",)}, "did not pass its gate (bank lost 12 points.)"),
        ({"approval": "refused", "promoted": "1"}, "was rejected by a person"),
        ({"approval": "awaiting"}, "waits for a person's approval"),
    ],
)
def test_an_alias_that_was_moved_past_the_gate_moves_nothing_and_is_said_once(
    tmp_path: Path, registry: Registry, facts: dict[str, object], reason: str
) -> None:
    async def scenario(follower: Follower) -> None:
        passed, registry.facts, registry.version = registry.facts, {**registry.facts, **facts}, "2"
        await wait_for(lambda: follower.problem or follower.state()["version"] == "2")
        assert reason in str(follower.problem) and "Version 2 of 'l'" in str(follower.problem)
        await asyncio.sleep(0.2)
        assert (follower.state()["version"], follower.state()["champion"]) == ("1", "1")
        registry.facts = {**passed, "approval": "awaiting", "promoted": "7"}
        await wait_for(lambda: follower.state()["version"] == "2")
        assert follower.problem is None

    said = run(tmp_path, scenario)
    assert [reason in line and "What serves goes on." in line for line in said].count(True) == 1


def test_nothing_is_served_where_the_champion_did_not_pass_its_gate(tmp_path: Path, registry: Registry) -> None:
    async def scenario(follower: Follower) -> None:
        pytest.fail("it serves")

    registry.facts["accepted"] = False
    with pytest.raises(RegistryError, match="did not pass its gate: it is not served"):
        run(tmp_path, scenario)
