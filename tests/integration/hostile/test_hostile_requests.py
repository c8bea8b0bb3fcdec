"""Hostile requests to a server whose model really answers: each is answered or refused, and never with a traceback."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from deal_core.base_model.load import load_base
from deal_core.data.prompts import encode_prompt
from deal_core.data.schema import TaskSchema
from deal_core.evaluation import answerer as answerer_module
from deal_core.evaluation.answerer import Answerer
from deal_core.evaluation.answering import ServedTask, ServedVersion
from infra.serving import run
from infra.serving.champion import Champion
from infra.serving.rollout import Rollout
from infra.serving.server import make_app
from infra.store.local import FileStore
from tests.conftest import MakeOnce

WAIT_SECONDS = 120
LONG_CHAT = [{"role": "user" if n % 2 == 0 else "assistant", "content": f"message {n}"} for n in range(9_999)]
"""The longest chat that is taken, and asks something."""
SHORT_CHAT = [{"role": "user", "content": "Hello"}]


def write_adapter(folder: Path, tiny_base: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(model, config).save_pretrained(folder / "adapter")


class Server:
    """`deal serve` in a thread, with an untrained version of a task of labels and a task of chats."""

    def __init__(self, folder: Path, tiny_base: Path, log: Path) -> None:
        base = load_base(str(tiny_base), folder / "cache", precision="fp32")
        schemas = (TaskSchema(name="bank", labels=("a", "b")), TaskSchema(name="talk", format="chat"))
        served = ServedVersion(
            lineage="l",
            base_source=str(tiny_base),
            base_name=base.name,
            base_sha256=base.sha256,
            tasks=tuple(ServedTask(schema=schema, max_prompt_tokens=128, max_new_tokens=4) for schema in schemas),
            newest_task="bank",
        )
        self.answerer = Answerer(served, base, folder / "adapter", "1")
        store = FileStore(folder / "store")
        self.champion = Champion(store, "l", print)
        self.champion._answerer = self.answerer
        self.champion.rollout = Rollout(store, self.answerer, None, print)
        self.log = log

    @contextmanager
    def running(self) -> Iterator[tuple[str, uvicorn.Server, threading.Thread]]:
        """Serve on a loopback port: the address, the server and its thread."""
        listener = socket.create_server(("127.0.0.1", 0))
        server = run.make_server(make_app(self.champion), self.champion.drain)

        def serve() -> None:
            with run._logged_to(self.log):
                server.run([listener])

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}", server, thread
        finally:
            server.should_exit = True
            thread.join(WAIT_SECONDS)
            listener.close()
            assert not thread.is_alive()


@pytest.fixture
def server(made_once: MakeOnce, tiny_base: Path, tmp_path: Path) -> Server:
    return Server(made_once("untrained", lambda folder: write_adapter(folder, tiny_base)), tiny_base, tmp_path / "log")


def chat(messages: Any) -> dict[str, Any]:
    return {"model": "l/talk", "messages": messages}


def rows(*inputs: Any, task: Any = "talk") -> dict[str, Any]:
    return {"dataframe_records": [{"input": text, "task": task} for text in inputs]}


def said(content: Any, role: Any = "user") -> list[dict[str, Any]]:
    return [{"role": role, "content": content}]


CHATS: dict[str, tuple[Any, str]] = {
    "one message too many": ([*LONG_CHAT, *SHORT_CHAT * 2], "10,001 messages; give the latest 10,000"),
    "half a million messages": ([{}] * 500_000, "500,000 messages; give the latest 10,000"),
    "long texts": (said("a" * 400_000) * 3, "characters; give at most 1,000,000"),
    "unknown role": (said("Hello", "robot"), "the role 'robot'; the roles are system, user, assistant, tool"),
    "empty role": (said("Hello", ""), "the role ''; the roles are system, user, assistant, tool"),
    "role is a list": (said("Hello", ["user"]), "role is no text"),
    "content is a number": (said(5), "content is no text"),
    "messages nested deeply": (said(json.loads("[" * 900 + "]" * 900)), "content is no text"),
}
INVOCATIONS: dict[str, tuple[Any, str]] = {
    "lone surrogate in a chat": (rows('[{"role": "user", "content": "\\ud800"}]'), "half of a surrogate pair"),
    "lone surrogate as a role": (rows('[{"role": "\\udfff", "content": "a"}]'), "has a message of the role"),
    "lone surrogate in a tool": (
        rows('[{"role": "user", "content": "a", "tools": [{"\\ud800": 1}]}]'),
        "half of a surrogate pair",
    ),
    "chat nested deeply": (rows("[" * 100_000), "input is a JSON list of messages"),
    "unknown role": (rows(json.dumps(said("Hello", "robot"))), "the role 'robot'"),
    "too many messages": (rows(json.dumps([*LONG_CHAT, *SHORT_CHAT * 2])), "10,001 messages"),
    "text too long": (rows("a" * 1_000_001, task="bank"), "1,000,001 characters; give at most 1,000,000"),
    "one bad row of many": (rows(*["a"] * 50, " ", task="bank"), "Row 51 has an empty input"),
    "task is a number": (rows("a", task=5), "Row 1 names the task 5, which is no text"),
    "task is a list": (rows("a", task=["bank"]), "Row 1 names the task ['bank'], which is no text"),
    "task is empty": (rows("a", task=""), "Row 1 names the task ''; this version knows bank, talk"),
    "task of another kind": ({"instances": [{"input": "a", "task": 5}]}, "Row 1 names the task '5'"),
    "task beside the rows": ({**rows("a", task=None), "task": "talk"}, "task stands beside the rows"),
}


def test_a_hostile_request_costs_one_sentence(server: Server) -> None:
    with server.running() as (url, _, _), httpx.Client(base_url=url, timeout=WAIT_SECONDS) as client:
        for name, (messages, sentence) in CHATS.items():
            refused = client.post("/v1/chat/completions", json=chat(messages))
            assert refused.status_code == 400 and sentence in refused.json()["error"]["message"], (name, refused.text)
        for name, (body, sentence) in INVOCATIONS.items():
            refused = client.post("/invocations", json=body)
            assert refused.status_code == 400 and sentence in refused.json()["error"], (name, refused.text)
            assert len(refused.text) < 500 and "Traceback" not in refused.text
        answered = client.post("/v1/chat/completions", json=chat(SHORT_CHAT))
        assert answered.is_success, "it serves on"
    assert not server.log.exists(), server.log.read_text()


def test_a_chat_of_ten_thousand_messages_is_answered_like_its_end(server: Server) -> None:
    """What is left of it is some turns, so a chat of only the latest turns has the same answer."""
    with server.running() as (url, _, _), httpx.Client(base_url=url, timeout=WAIT_SECONDS) as client:
        found = [client.post("/v1/chat/completions", json=chat(each)) for each in (LONG_CHAT, LONG_CHAT[-41:])]
        found.append(client.post("/invocations", json=rows(json.dumps(LONG_CHAT))))
    assert [each.status_code for each in found] == [200] * 3
    whole, end = (each.json()["choices"][0]["message"]["content"] for each in found[:2])
    assert whole == end == found[2].json()["predictions"][0]["output"]


class HeldPrompt:
    """`encode_prompt` that waits in the preparation of a chat until the test lets it continue."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.is_inside, self.may_go_on = threading.Event(), threading.Event()
        monkeypatch.setattr(answerer_module, "encode_prompt", self._encode)

    def _encode(self, tokenizer: Any, task: TaskSchema, text: str, max_prompt_tokens: int) -> list[int]:
        if task.format == "chat":
            self.is_inside.set()
            assert self.may_go_on.wait(WAIT_SECONDS)
        return encode_prompt(tokenizer, task, text, max_prompt_tokens)


def test_others_are_answered_while_a_long_chat_is_prepared_and_the_end_of_the_server_gives_it_up(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order of events: eight clients get their answers, the server is told to end, and the long chat is refused.

    The server ends then, and the model has not seen the chat.
    """
    held = HeldPrompt(monkeypatch)
    with server.running() as (url, uvicorn_server, thread), ThreadPoolExecutor(9) as pool:

        def ask(path: str, body: Any) -> httpx.Response:
            return httpx.post(f"{url}{path}", json=body, timeout=WAIT_SECONDS)

        long = pool.submit(ask, "/v1/chat/completions", chat(LONG_CHAT))
        assert held.is_inside.wait(WAIT_SECONDS)
        others = [pool.submit(ask, "/invocations", rows("a text", task="bank")) for _ in range(8)]
        assert all(other.result(WAIT_SECONDS).is_success for other in others) and not long.done()
        uvicorn_server.should_exit = True
        while not server.answerer._is_ending:
            assert thread.is_alive()
        assert not long.done()
        held.may_go_on.set()
        refused = long.result(WAIT_SECONDS)
        assert refused.status_code == 503 and "stopping" in refused.text and refused.headers["Retry-After"]
        thread.join(WAIT_SECONDS)
        assert not thread.is_alive()


def test_a_client_that_leaves_is_heeded_while_its_rows_are_prepared(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = HeldPrompt(monkeypatch)
    with server.running() as (url, _, _):
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as connection:
            body = json.dumps(rows(*[json.dumps(SHORT_CHAT)] * 100)).encode()
            head = "POST /invocations HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            assert held.is_inside.wait(WAIT_SECONDS)
        while "deal_requests_in_flight 0.0" not in httpx.get(f"{url}/metrics", timeout=WAIT_SECONDS).text:
            assert server.answerer._waiting == []
        held.may_go_on.set()
        answered = httpx.post(f"{url}/invocations", json=rows("a text", task="bank"), timeout=WAIT_SECONDS)
        assert answered.is_success and server.answerer._waiting == []
