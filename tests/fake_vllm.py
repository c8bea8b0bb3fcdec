"""A stand-in for a vLLM server, as none runs without its engine: the endpoints that vLLM publishes, and no model.

It follows the documentation (docs.vllm.ai, LoRA Adapters) and what the OpenAI-compatible server of release 0.11 and
later answers: names already loaded are refused with 400, unknown ones with 404, an adapter that cannot be loaded with
500, errors under "error". What it cannot show is whether a real engine gives the adapter's answers.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

BASE = "base"


@dataclass
class FakeVllm:
    """What the server holds, and what it was asked."""

    max_lora_rank: int = 16
    api_key: str | None = None
    allows_updates: bool = True
    adapters: dict[str, str] = field(default_factory=dict)
    calls: list[tuple[str, str]] = field(default_factory=list)
    failing: list[int] = field(default_factory=list)
    """Statuses that the next requests are answered with, one each."""
    mute: bool = False
    """Whether completions by an adapter come back without an answer."""
    url: str = ""

    def app(self) -> Starlette:
        routes = [
            Route("/v1/models", self._models),
            Route("/v1/completions", self._complete, methods=["POST"]),
        ]
        if self.allows_updates:
            routes += [
                Route("/v1/load_lora_adapter", self._load, methods=["POST"]),
                Route("/v1/unload_lora_adapter", self._unload, methods=["POST"]),
            ]
        return Starlette(routes=routes)

    async def _models(self, request: Request) -> Response:
        if refused := self._refuse(request):
            return refused
        cards = [{"id": BASE, "object": "model", "root": "/models/base", "parent": None}]
        cards += [{"id": name, "object": "model", "root": root, "parent": BASE} for name, root in self.adapters.items()]
        return JSONResponse({"object": "list", "data": cards})

    async def _complete(self, request: Request) -> Response:
        if refused := self._refuse(request):
            return refused
        body = await request.json()
        self.calls.append(("ask", body["model"]))
        if body["model"] not in {BASE, *self.adapters}:
            return _error(404, f"The model `{body['model']}` does not exist.", "NotFoundError")
        choices: list[dict[str, Any]] = [] if self.mute else [{"index": 0, "text": " an answer"}]
        return JSONResponse({"object": "text_completion", "model": body["model"], "choices": choices})

    async def _load(self, request: Request) -> Response:
        if refused := self._refuse(request):
            return refused
        body = await request.json()
        name, path = body["lora_name"], body["lora_path"]
        self.calls.append(("load", name))
        if name in self.adapters:
            return _error(400, f"The lora adapter '{name}' has already been loaded.", "InvalidUserInput")
        config = Path(path) / "adapter_config.json"
        if not config.is_file():
            return _error(404, f"Loading lora {name} failed: No adapter found for {path}", "NotFoundError")
        rank = json.loads(config.read_text())["r"]
        if rank > self.max_lora_rank:
            problem = f"LoRA rank {rank} is greater than max_lora_rank {self.max_lora_rank}."
            return _error(500, problem, "InternalServerError")
        self.adapters[name] = path
        return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")

    async def _unload(self, request: Request) -> Response:
        if refused := self._refuse(request):
            return refused
        name = (await request.json())["lora_name"]
        self.calls.append(("unload", name))
        if name not in self.adapters:
            return _error(404, f"The lora adapter '{name}' cannot be found.", "NotFoundError")
        del self.adapters[name]
        return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")

    def _refuse(self, request: Request) -> Response | None:
        if self.failing:
            return _error(self.failing.pop(0), "starting", "ServiceUnavailable")
        if self.api_key and request.headers.get("authorization") != f"Bearer {self.api_key}":
            return JSONResponse({"error": "Unauthorized"}, 401)
        return None


def _error(status: int, message: str, kind: str) -> Response:
    return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": status}}, status)


@contextmanager
def running(fake: FakeVllm, port: int) -> Iterator[FakeVllm]:
    """The fake behind a real socket."""
    server = uvicorn.Server(uvicorn.Config(fake.app(), host="127.0.0.1", port=port, log_level="error", lifespan="off"))
    started = threading.Event()
    startup = server.startup

    async def announce(*arguments: Any, **named: Any) -> None:
        await startup(*arguments, **named)
        started.set()

    server.startup = announce  # type: ignore[method-assign]
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    assert started.wait(30)
    fake.url = f"http://127.0.0.1:{port}"
    try:
        yield fake
    finally:
        server.should_exit = True
        thread.join()
