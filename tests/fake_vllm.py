"""A stand-in for a vLLM server that computes: the tests' base model with PEFT adapters, behind vLLM's endpoints.

Bodies and answers are those of vLLM 0.32. The answers are greedy. What it cannot show is whether a real engine gives an
adapter's answers.
"""

from __future__ import annotations

import asyncio
import copy
import json
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import uvicorn
from peft import PeftModel
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.loopback import free_port

BASE = "base"
RELEASE = "0.32.0"
"""What it says it is."""
NOTHING = Path()
WAIT_SECONDS = 60
TOKEN = "token_id:"


class FakeVllm:
    """One server. Attributes without an underscore are switches, and what it holds and was asked."""

    def __init__(self, base: Path, *, max_lora_rank: int = 16, api_key: str | None = None) -> None:
        self.max_lora_rank, self.api_key = max_lora_rank, api_key
        self.adapters: dict[str, str] = {}
        """Adapters and their paths. A test clears them as a restart does."""
        self.calls: list[tuple[str, str]] = []
        """("load", "unload", "ask" or "score", model)."""
        self.bodies: list[dict[str, Any]] = []
        """Bodies of completions."""
        self.failing: list[int] = []
        """Statuses that the next completions are answered with, one each."""
        self.is_full = False
        """Whether every completion is answered with 503."""
        self.broken: dict[str, int] = {}
        """Model → number of tokens after which its completions fail."""
        self.pace: dict[str, threading.Event] = {}
        """Model → an event, before which only the first token of a completion is made."""
        self.slow_seconds = 0.0
        """How long the load of an adapter takes, and the look at a prompt's probabilities."""
        self.end_after: int | None = None
        """Number of tokens after which an answer ends, by the tokenizer's end token."""
        self.num_left = 0
        """Completions whose clients went away."""
        self.applies: Path | None = None
        """What it applies instead of each adapter that it loads: another adapter, or nothing (`NOTHING`)."""
        self._models: dict[str, Any] = {BASE: AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()}
        self._tokenizer = AutoTokenizer.from_pretrained(base)
        self._lock = threading.Lock()
        self._server: uvicorn.Server | None = None
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"

    def start(self, **tls: Any) -> None:
        """Listen. `tls` are uvicorn's ssl_keyfile and ssl_certfile."""
        config = uvicorn.Config(self._app(), host="127.0.0.1", port=self.port, log_config=None, lifespan="off", **tls)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        self.wait_until(lambda: self._server is not None and self._server.started)

    def stop(self) -> None:
        """End at once, as a killed server does: connections break, and adapters are lost."""
        if self._server is not None:
            for connection in [*self._server.server_state.connections]:
                self._server.servers[0].get_loop().call_soon_threadsafe(connection.transport.abort)
            self._server.should_exit = self._server.force_exit = True
            self._thread.join(WAIT_SECONDS)
            self._server = None
            self.adapters.clear()

    def wait_until(self, check: Any) -> None:
        """Wait for something to become true."""
        deadline = time.monotonic() + WAIT_SECONDS
        while not check():
            assert time.monotonic() < deadline
            time.sleep(0.005)

    def _app(self) -> Starlette:
        ways = {"completions": self._complete, "load_lora_adapter": self._load, "unload_lora_adapter": self._unload}
        posts = [Route(f"/v1/{name}", way, methods=["POST"]) for name, way in ways.items()]
        return Starlette(routes=[Route("/v1/models", self._list), Route("/version", self._version), *posts])

    async def _version(self, request: Request) -> Response:
        return JSONResponse({"version": RELEASE})

    def _refusal(self, request: Request) -> Response | None:
        if self.api_key and request.headers.get("authorization") != f"Bearer {self.api_key}":
            return JSONResponse({"error": "Unauthorized"}, 401)
        return None

    async def _list(self, request: Request) -> Response:
        if refused := self._refusal(request):
            return refused
        cards = [{"id": BASE, "object": "model", "root": "/models/base", "parent": None}]
        cards += [{"id": name, "object": "model", "root": path, "parent": BASE} for name, path in self.adapters.items()]
        return JSONResponse({"object": "list", "data": cards})

    async def _load(self, request: Request) -> Response:
        body = await request.json()
        name, path = body["lora_name"], body["lora_path"]
        self.calls.append(("load", name))
        if refused := self._refusal(request):
            return refused
        if name in self.adapters:
            return _error(400, f"The lora adapter '{name}' has already been loaded.")
        config = Path(path) / "adapter_config.json"
        if not config.is_file():
            return _error(404, f"Loading lora {name} failed: No adapter found for {path}")
        rank = json.loads(config.read_text())["r"]
        if rank > self.max_lora_rank:
            return _error(500, f"LoRA rank {rank} is greater than max_lora_rank {self.max_lora_rank}.")
        await asyncio.sleep(self.slow_seconds)
        base = copy.deepcopy(self._models[BASE])
        nothing = self.applies == NOTHING
        self._models[name] = base if nothing else PeftModel.from_pretrained(base, self.applies or path).eval()
        self.adapters[name] = path
        return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")

    async def _unload(self, request: Request) -> Response:
        name = (await request.json())["lora_name"]
        self.calls.append(("unload", name))
        if refused := self._refusal(request):
            return refused
        if self.adapters.pop(name, None) is None:
            return _error(404, f"The lora adapter '{name}' cannot be found.")
        return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")

    async def _complete(self, request: Request) -> Response:
        body = await request.json()
        name = body["model"]
        self.calls.append(("score" if body.get("allowed_token_ids") else "ask", name))
        self.bodies.append(body)
        if refused := self._refusal(request):
            return refused
        if self.failing or self.is_full:
            return _error(self.failing.pop(0) if self.failing else 503, "too many requests")
        if name != BASE and name not in self.adapters:
            return _error(404, f"The model `{name}` does not exist.")
        if not 0 <= body.get("temperature", 1) <= 2:
            return _error(400, "temperature must be in [0, 2].")
        if body.get("n", 1) > 1 and not body.get("temperature", 1):
            return _error(400, "n must be 1 when using greedy sampling.")
        prompts = body["prompt"] if isinstance(body["prompt"][0], list) else [body["prompt"]]
        size = self._models[BASE].config.vocab_size
        if unknown := [token for prompt in prompts for token in prompt if token >= size]:
            return _error(400, f"Token id {unknown[0]} is out of vocabulary")
        if body.get("stream"):
            return StreamingResponse(self._events(name, body, prompts), media_type="text/event-stream")
        if body.get("allowed_token_ids"):
            await asyncio.sleep(self.slow_seconds)
        return await self._whole(request, name, body, prompts)

    async def _whole(self, request: Request, name: str, body: dict[str, Any], prompts: list[list[int]]) -> Response:
        """The answers of a request without `stream`, each in one piece."""
        pieces, whole, num_made = self._pieces(name, body, prompts), dict[int, dict[str, Any]](), 0
        leaving = asyncio.ensure_future(request.receive())  # after the body only a disconnect can come
        try:
            while (piece := await run_in_threadpool(next, pieces, None)) is not None:
                if self.broken.get(name) == num_made:
                    return _error(500, "the engine broke")
                num_made += 1
                while not leaving.done() and name in self.pace and not self.pace[name].is_set():
                    await asyncio.sleep(0.002)
                if leaving.done():
                    self.num_left += 1
                    return Response()
                so_far = whole.setdefault(piece["index"], piece)
                if so_far is not piece:
                    so_far |= {"text": so_far["text"] + piece["text"], "finish_reason": piece["finish_reason"]}
                    for kind, values in (piece["logprobs"] or {}).items():
                        so_far["logprobs"][kind] += values
        finally:
            leaving.cancel()
        used = {"prompt_tokens": sum(map(len, prompts)), "completion_tokens": num_made}
        return JSONResponse({"object": "text_completion", "model": name, "choices": [*whole.values()], "usage": used})

    async def _events(self, name: str, body: dict[str, Any], prompts: list[list[int]]) -> AsyncIterator[str]:
        pieces, num_sent, is_done = self._pieces(name, body, prompts), 0, False
        try:
            while (piece := await run_in_threadpool(next, pieces, None)) is not None:
                if self.broken.get(name) == num_sent:
                    yield f"data: {json.dumps({'error': {'message': 'the engine broke', 'code': 500}})}\n\n"
                    break
                yield f"data: {json.dumps({'model': name, 'choices': [piece]})}\n\n"
                num_sent += 1
                while name in self.pace and not self.pace[name].is_set():
                    await asyncio.sleep(0.002)
            else:
                used = {"prompt_tokens": sum(map(len, prompts)), "completion_tokens": num_sent}
                yield f"data: {json.dumps({'model': name, 'choices': [], 'usage': used})}\n\n"
            yield "data: [DONE]\n\n"
            is_done = True
        finally:
            self.num_left += not is_done

    def _pieces(self, name: str, body: dict[str, Any], prompts: list[list[int]]) -> Iterator[dict[str, Any]]:
        """Every token is a piece. The stop token is one without a text."""
        num, stops, strings = body.get("n", 1), body.get("stop_token_ids", ()), body.get("stop") or []
        strings = [strings] if isinstance(strings, str) else strings
        for place in range(len(prompts) * num):
            tokens, sent = list[int](), ""
            for log_probs in self._steps(name, prompts[place // num], tokens):
                if len(tokens) == self.end_after:
                    log_probs = torch.full_like(log_probs, -100.0)
                    log_probs[self._tokenizer.eos_token_id] = 0.0
                (own,) = body.get("allowed_token_ids") or [int(log_probs.argmax())]
                tokens.append(own)
                text = self._tokenizer.decode(tokens, skip_special_tokens=True)
                cuts = [text.index(string) for string in strings if string in text]
                finish = "stop" if own in stops or cuts else None
                if finish is None and len(tokens) == body["max_tokens"]:
                    finish = "length"
                if cuts:
                    text = text[: min(cuts)]
                elif finish is None and text.endswith("\ufffd"):  # the rest of a character may come
                    text = sent
                piece = {"index": place, "text": text.removeprefix(sent), "finish_reason": finish}
                yield {**piece, "logprobs": _logged(log_probs, own, body)}
                sent = text
                if finish:
                    break

    def _steps(self, name: str, prompt: list[int], tokens: list[int]) -> Iterator[torch.Tensor]:
        """The log-probabilities of each next token; the caller appends the one that it takes."""
        with self._lock:
            model = self._models[name]  # an unloaded adapter answers what it has begun
        while True:
            with self._lock, torch.inference_mode():
                logits = model(input_ids=torch.tensor([prompt + tokens])).logits[0, -1]
            yield logits.float().log_softmax(-1)


def _logged(log_probs: torch.Tensor, own: int, body: dict[str, Any]) -> dict[str, Any] | None:
    if body.get("logprobs") is None:
        return None
    shown = body.get("logprob_token_ids") or log_probs.topk(body["logprobs"]).indices.tolist()
    named = {token: f"{TOKEN}{token}" for token in (own, *shown)}
    assert body["return_tokens_as_token_ids"]
    return {
        "tokens": [named[own]],
        "token_logprobs": [log_probs[own].item()],
        "top_logprobs": [{text: log_probs[token].item() for token, text in named.items()}],
    }


def _error(status: int, message: str) -> Response:
    return JSONResponse({"error": {"message": message, "type": "Error", "param": None, "code": status}}, status)


@contextmanager
def running(*fakes: FakeVllm) -> Iterator[None]:
    """The servers, listening while the block runs."""
    try:
        for fake in fakes:
            fake.start()
        yield
    finally:
        for fake in fakes:
            fake.stop()
