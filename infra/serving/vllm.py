"""A client of one vLLM server: its models, its adapters, completions and the probabilities of tokens.

A running vLLM server loads adapters if it was started with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True and --enable-lora
(https://docs.vllm.ai, LoRA Adapters, "Dynamically serving LoRA Adapters").
"""

from __future__ import annotations

import asyncio
import json
import re
import ssl
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager, suppress
from functools import cached_property
from typing import Any, NamedTuple, NoReturn, Self
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp
from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt, wait_exponential

from deal_core.errors import ConfigError, DealError
from deal_core.safe_text import without_secrets
from infra.settings import EngineSettings, host_of

CONNECT_SECONDS = 5.0
BUFFER_BYTES = 2**20
"""Half of the longest event of a stream."""
ANSWER_SECONDS = 300.0
"""Longest wait for the next piece of an answer. A full engine lets requests wait."""
WHOLE_SECONDS = 3600.0
"""Longest wait for whole answers, to as many rows as an evaluation asks for at once. The front gives up earlier."""
KEEP_ALIVE_SECONDS = 3.0
"""Time for which an idle connection is used again. A vLLM server closes it after 5 s."""
FIRST_PAUSE_SECONDS = 0.5
MAX_SCORED = 8
"""Requests at a time that ask for the probability of a token."""
AWAY = frozenset({429, 502, 503, 504})
"""Status codes of a server or proxy that is starting or too busy."""
NO_ANSWER = (ValueError, KeyError, IndexError, TypeError, AttributeError)
"""Errors in reading an answer that no vLLM server gave."""
TOKEN = "token_id:"
"""How vLLM writes a token's number in the place of its text, if `return_tokens_as_token_ids` is set."""


class EngineError(DealError):
    """The engine refused a request. `status` is the HTTP status of its answer; 0: it gave something else."""

    code = "engine"

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


class EngineAwayError(EngineError):
    """The engine does not answer, or is too busy to."""

    code = "engine-away"


class Piece(NamedTuple):
    """The next piece of an answer."""

    place: int
    """Number of the prompt, times the answers per prompt, plus the number of the answer."""
    text: str
    tokens: Sequence[int]
    """Ids of the new tokens."""
    log_probs: Sequence[float]
    """Log-probability of each new token, in nats."""
    tops: Sequence[Mapping[int, float]]
    """For each new token, log-probabilities by token: of the likeliest ones, or of the requested ones."""
    finish_reason: str | None
    """None: the answer goes on. "length": it has reached its longest length."""


class EngineClient:
    """A client of one server, for one event loop. `async with` closes its connections.

    It is aiohttp's. httpx looks at each of its connections before a request, which took half of the front's time.

    Raises:
        EngineAwayError: In every method: the server does not answer.
        EngineError: In every method: the server refuses, or gives something else.
    """

    def __init__(self, url: str, settings: EngineSettings, *, max_attempts: int = 1) -> None:
        host_of(url, "The engine's address (--engine, DEAL_ENGINE_URL)")
        url = url.rstrip("/").removesuffix("/v1")
        self.shown = without_secrets(url)
        """The address without passwords."""
        try:
            self._ssl = ssl.create_default_context(cafile=settings.ca_file) if settings.ca_file else True
        except (OSError, ssl.SSLError) as error:
            problem = f"DEAL_ENGINE_CA_FILE: {settings.ca_file} holds no certificates ({error}); give a PEM file."
            raise ConfigError(problem) from None
        key, self._url, address = settings.api_key, url, urlsplit(url)
        is_sent = address.username is None  # else the address has the credentials
        self._headers = {"Authorization": f"Bearer {key.get_secret_value()}"} if key and is_sent else {}
        # found once: with trust_env aiohttp would read the environment and ~/.netrc again at each request
        self._proxy = None if proxy_bypass(address.hostname or "") else getproxies().get(address.scheme)
        self._max_attempts = max_attempts

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @cached_property
    def _session(self) -> aiohttp.ClientSession:
        """The connections. They belong to the event loop that runs at the first request."""
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_SECONDS, ssl=self._ssl),
            headers=self._headers,
            read_bufsize=BUFFER_BYTES,
            proxy=self._proxy,
        )

    async def close(self) -> None:
        """Close the connections."""
        if "_session" in vars(self):
            await self._session.close()

    async def models(self, *, seconds: float = ANSWER_SECONDS) -> dict[str, tuple[str, bool]]:
        """Return the name of each model, with the path that it was loaded from, and whether it is an adapter."""
        answer = await self._send("list its models", "GET", "/v1/models", seconds=seconds)
        try:
            return {
                entry["id"]: (str(entry.get("root") or ""), entry.get("parent") is not None)
                for entry in json.loads(answer)["data"]
            }
        except NO_ANSWER:
            raise EngineError(
                f"{self.shown} lists no models as vLLM does; give the address of a vLLM server."
            ) from None

    def base_of(self, models: Mapping[str, tuple[str, bool]]) -> str:
        """Return the name of the base model among its models."""
        bases = [name for name, (_, is_adapter) in models.items() if not is_adapter]
        if not bases:
            raise EngineError(f"The engine at {self.shown} has no base model.")
        return bases[0]

    async def version(self) -> str:
        """Return the release of vLLM, such as 0.32.0."""
        try:
            return str(json.loads(await self._send("tell its release", "GET", "/version"))["version"])
        except NO_ANSWER:
            raise EngineError(f"{self.shown} tells no release as vLLM does.") from None

    async def load(self, name: str, path: str) -> None:
        """Load an adapter from a path on the server, if it is not loaded yet."""
        try:
            await self._send(f"load {path}", "POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": path})
        except EngineError:
            if (await self.models()).get(name) != (
                path,
                True,
            ):  # else another front, or an attempt before, has loaded it
                raise

    async def unload(self, name: str) -> None:
        """Unload an adapter, if it is loaded."""
        try:
            await self._send(f"unload {name}", "POST", "/v1/unload_lora_adapter", {"lora_name": name})
        except EngineError:
            if name in await self.models():
                raise

    async def complete(self, body: Mapping[str, Any]) -> list[Piece | Mapping[str, int]]:
        """Return the answers to a body of /v1/completions, a piece each, then the numbers of tokens.

        Cancelling the task ends the connection; the engine then gives the request up.
        """
        asked = {**body, "return_tokens_as_token_ids": True}
        with self._connected():
            content = await self._ask(f"ask {body['model']}", "POST", "/v1/completions", asked, seconds=WHOLE_SECONDS)
        return self._read_event(content)

    async def stream(self, body: Mapping[str, Any]) -> AsyncGenerator[Piece | Mapping[str, int], None]:
        """Yield the pieces of the answers to a body of /v1/completions as they come, then the numbers of tokens.

        Closing the generator, or cancelling the task, ends the connection; the engine then gives the request up. Each
        event of the engine costs processor time here, so `complete` is for who needs no pieces.
        """
        more = {"stream": True, "stream_options": {"include_usage": True}, "return_tokens_as_token_ids": True}
        with self._connected():
            async with self._answer("POST", "/v1/completions", {**body, **more}) as answer:
                if answer.status >= 300:
                    self._refuse(answer.status, await answer.read(), f"ask {body['model']}", "/v1/completions")
                async for line in answer.content:
                    data = line.removeprefix(b"data: ").strip()
                    if line.startswith(b"data: ") and data != b"[DONE]":
                        for part in self._read_event(data):
                            yield part

    def _read_event(self, data: bytes) -> list[Piece | Mapping[str, int]]:
        """Return the pieces of a whole answer or of one event of a stream, and the numbers of tokens if it has them."""
        try:
            event = json.loads(data)
            if "error" in event:
                reason = _one_line(event["error"].get("message"))
                raise EngineError(f"The engine at {self.shown} failed: {reason}", 500)
            return [*map(_piece, event["choices"]), *([usage] if (usage := event.get("usage")) else [])]
        except NO_ANSWER:
            raise EngineError(f"{self.shown} gave no completion as vLLM does.") from None

    async def log_probs(self, model: str, asked: Sequence[tuple[Sequence[int], int]]) -> list[float]:
        """Return the log-probability of each token after the tokens before it, in nats.

        Each is a request that allows one token alone: the engine answers it, with its probability among all tokens.
        `prompt_logprobs` would need one request a text. But vLLM 0.32 with LoRA on a CPU ends on it ("einsum():
        subscript b has size …") if another request is in the same batch, and its users lose their answers.

        Args:
            model: Name of the base model or of an adapter.
            asked: Pairs of the tokens before and the token.
        """
        few = asyncio.Semaphore(MAX_SCORED)  # the engine answers its users meanwhile

        async def log_prob(before: Sequence[int], token: int) -> float:
            only = {"allowed_token_ids": [token], "ignore_eos": True, "max_tokens": 1, "temperature": 0, "logprobs": 0}
            more = {"return_tokens_as_token_ids": True}
            body = {"model": model, "prompt": list(before), **only, **more}
            async with few:
                answer = await self._send(f"ask {model}", "POST", "/v1/completions", body)
            try:
                piece = _piece(json.loads(answer)["choices"][0])
                if [*piece.tokens] != [token]:
                    raise ValueError(piece.tokens)
                return float(piece.log_probs[0])
            except NO_ANSWER:
                raise EngineError(f"{self.shown} gave no logprobs of a token as vLLM does.") from None

        scoring = [asyncio.create_task(log_prob(*pair)) for pair in asked]
        try:
            return await asyncio.gather(*scoring)
        finally:
            for task in scoring:  # of one that failed, the others are not needed
                task.cancel()

    async def _send(
        self,
        action: str,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        seconds: float = ANSWER_SECONDS,
    ) -> bytes:
        """Return the answer to a request; repeat it while the server does not answer."""
        async for attempt in AsyncRetrying(
            stop=stop_after_attempt(self._max_attempts),
            wait=wait_exponential(FIRST_PAUSE_SECONDS, max=10),
            retry=retry_if_exception_type(EngineAwayError),
            reraise=True,
        ):
            with attempt, self._connected():
                return await self._ask(action, method, path, body, seconds=seconds)
        raise AssertionError("the last attempt raises its error")

    async def _ask(
        self, action: str, method: str, path: str, body: Mapping[str, Any] | None, *, seconds: float
    ) -> bytes:
        """Return the whole answer to a request."""
        async with self._answer(method, path, body, seconds=seconds) as answer:
            content = await answer.read()
            if answer.status >= 300:
                self._refuse(answer.status, content, action, path)
            return content

    def _answer(
        self, method: str, path: str, body: Mapping[str, Any] | None, *, seconds: float = ANSWER_SECONDS
    ) -> AbstractAsyncContextManager[aiohttp.ClientResponse]:
        """Begin a request. `seconds` is the longest wait for the next bytes of its answer."""
        timeout = aiohttp.ClientTimeout(sock_connect=min(seconds, CONNECT_SECONDS), sock_read=seconds)
        return self._session.request(method, self._url + path, json=body, timeout=timeout, allow_redirects=False)

    @contextmanager
    def _connected(self) -> Iterator[None]:
        try:
            yield
        except (aiohttp.ClientError, TimeoutError) as error:
            reason = f"{type(error).__name__}: {error}".rstrip(": ")
            raise EngineAwayError(f"The engine at {self.shown} does not answer ({reason}).") from None

    def _refuse(self, status: int, content: bytes, action: str, path: str) -> NoReturn:
        """Raise what an answer that is no success means."""
        if status in AWAY:
            problem = f"The engine at {self.shown} is starting or too busy ({status})."
            raise EngineAwayError(problem, status)
        message: object = None
        with suppress(ValueError, AttributeError):  # no JSON, or no object
            values = json.loads(content)
            message = values.get("error", values).get("message")  # in some releases it is at the top level
        if status == 401:
            reason = "it wants an API key; set DEAL_ENGINE_API_KEY."
        elif message:
            reason = _one_line(message)
        elif status in (404, 405) and path.endswith("_lora_adapter"):
            reason = (
                "it takes no adapters while it runs; start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True and "
                "--enable-lora."
            )
        else:
            reason = f"it answered {status}."
        raise EngineError(f"The engine at {self.shown} did not {action}: {reason}", status)


def _one_line(message: object) -> str:
    return re.sub(r"\s+", " ", str(message))[:500]


def _piece(choice: Mapping[str, Any]) -> Piece:
    logged = choice.get("logprobs") or {}

    def number(token: str) -> int:
        return int(token.removeprefix(TOKEN))

    return Piece(
        place=choice["index"],
        text=choice["text"],
        tokens=[number(token) for token in logged.get("tokens", ())],
        log_probs=[float(value) for value in logged.get("token_logprobs", ())],
        tops=[
            {number(token): float(value) for token, value in (top or {}).items()}
            for top in logged.get("top_logprobs") or ()
        ],
        finish_reason=choice.get("finish_reason"),
    )
