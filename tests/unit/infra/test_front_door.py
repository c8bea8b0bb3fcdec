"""The front door before servers that come, go and die; the servers are simple functions."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import httpx
import pytest

from infra import front_door
from infra.front_door import Backends, make_app

Handler = Callable[[httpx.Request], Awaitable[httpx.Response]]


@dataclass
class Server:
    version: str
    url: str | None
    num_in_flight: int = 0


def run(scenario: Callable[[Backends, httpx.AsyncClient], Awaitable[None]], answer: Handler) -> None:
    """Run a scenario with clients at the door and `answer` behind it."""

    async def start() -> None:
        backends = Backends()
        async with httpx.AsyncClient(transport=httpx.MockTransport(answer)) as behind:
            app = make_app(backends, behind, "l", lambda: {"version": "?"})
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://door") as client:
                await scenario(backends, client)

    asyncio.run(asyncio.wait_for(start(), 60))


async def by_port(request: httpx.Request) -> httpx.Response:
    return httpx.Response(200, json={"by": request.url.port, "body": request.content.decode()})


def test_a_request_waits_until_there_is_a_server() -> None:
    async def scenario(backends: Backends, client: httpx.AsyncClient) -> None:
        assert (await client.get("/health")).status_code == 503
        asking = asyncio.create_task(client.post("/invocations", content=b"rows"))
        for _ in range(10):
            await asyncio.sleep(0)
        assert not asking.done()
        await backends.switch(Server("3", "http://behind:1"))
        answer = await asking
        assert answer.json() == {"by": 1, "body": "rows"}
        assert (answer.headers["X-Deal-Version"], answer.headers["X-Deal-Lineage"]) == ("3", "l")
        assert (await client.get("/health")).status_code == 200

    run(scenario, by_port)


def test_after_a_switch_the_old_server_gets_nothing_new_and_is_drained_last() -> None:
    old, new = Server("1", "http://behind:1"), Server("2", "http://behind:2")
    may_answer = asyncio.Event()

    async def answer(request: httpx.Request) -> httpx.Response:
        if request.url.port == 1:
            await may_answer.wait()
        return await by_port(request)

    async def scenario(backends: Backends, client: httpx.AsyncClient) -> None:
        await backends.switch(old)
        first = asyncio.create_task(client.post("/invocations", content=b""))
        while not old.num_in_flight:
            await asyncio.sleep(0)
        assert await backends.switch(new) is old
        drained = asyncio.create_task(backends.drained(old))
        assert (await client.post("/invocations", content=b"")).headers["X-Deal-Version"] == "2"
        for _ in range(10):
            await asyncio.sleep(0)
        assert not drained.done(), "it would be ended in the middle of an answer"
        may_answer.set()
        assert (await first).headers["X-Deal-Version"] == "1"
        await asyncio.wait_for(drained, 10)

    run(scenario, answer)


@pytest.fixture
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    sleep = asyncio.sleep
    monkeypatch.setattr(front_door.asyncio, "sleep", lambda _: sleep(0))


@pytest.mark.usefixtures("no_pause")
@pytest.mark.parametrize("num_deaths", [1, 2, 3])
def test_a_server_that_dies_is_asked_again_but_not_for_ever(num_deaths: int) -> None:
    tries = 0

    async def answer(request: httpx.Request) -> httpx.Response:
        nonlocal tries
        tries += 1
        if tries <= num_deaths:
            raise httpx.RemoteProtocolError("gone")
        return await by_port(request)

    async def scenario(backends: Backends, client: httpx.AsyncClient) -> None:
        server = Server("1", "http://behind:1")
        await backends.switch(server)
        found = await client.post("/invocations", content=b"x")
        assert found.status_code == (200 if num_deaths < 3 else 502)
        assert server.num_in_flight == 0

    run(scenario, answer)
    assert tries == min(num_deaths + 1, 3)


@pytest.mark.usefixtures("no_pause")
def test_a_server_that_has_died_already_is_waited_for_and_the_request_is_not_blamed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tries = 0

    async def answer(request: httpx.Request) -> httpx.Response:
        nonlocal tries
        if request.url.port == 2:
            return await by_port(request)
        tries += 1
        raise httpx.ConnectError("refused")

    async def scenario(backends: Backends, client: httpx.AsyncClient) -> None:
        dead = Server("1", "http://behind:1")
        await backends.switch(dead)
        asking = asyncio.create_task(client.post("/invocations", content=b"x"))
        while tries <= front_door.MAX_TRIES and not asking.done():
            await asyncio.sleep(0)
        await backends.switch(Server("1", "http://behind:2"))
        assert (await asking).json() == {"by": 2, "body": "x"}
        assert dead.num_in_flight == 0

        monkeypatch.setattr(front_door, "WAIT_SECONDS", 0.05)
        monkeypatch.setattr(front_door, "ANSWER_SECONDS", 0.0)
        await backends.switch(dead)
        late = await client.post("/invocations", content=b"x")
        assert late.status_code == 503 and "/version" in late.json()["error"]

    run(scenario, answer)


def test_a_refusal_is_passed_on_in_one_sentence_and_not_repeated() -> None:
    message = "Failed to predict data '   input\n0  a secret'. \nError: Row 1 names the task 'x'; it knows y."
    tries = 0

    async def answer(request: httpx.Request) -> httpx.Response:
        nonlocal tries
        tries += 1
        return httpx.Response(400, json={"error_code": "INVALID_PARAMETER_VALUE", "message": message})

    async def scenario(backends: Backends, client: httpx.AsyncClient) -> None:
        await backends.switch(Server("1", "http://behind:1"))
        found = await client.post("/invocations", content=b"x")
        assert (found.status_code, found.json()) == (400, {"error": "Row 1 names the task 'x'; it knows y."})
        assert found.headers["X-Deal-Version"] == "1"

    run(scenario, answer)
    assert tries == 1


def test_what_takes_too_long_and_what_is_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front_door, "WAIT_SECONDS", 0.05)
    monkeypatch.setattr(front_door, "ANSWER_SECONDS", 0.0)
    monkeypatch.setattr(front_door, "MAX_BODY_BYTES", 1 << 20)

    async def scenario(backends: Backends, client: httpx.AsyncClient) -> None:
        late = await client.post("/invocations", content=b"x")
        assert late.status_code == 503 and "/version" in late.json()["error"]
        large = await client.post("/invocations", content=b"x" * ((1 << 20) + 1))
        assert large.status_code == 413 and "1 MB" in large.json()["error"]

    run(scenario, by_port)
