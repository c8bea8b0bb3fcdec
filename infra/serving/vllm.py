"""A vLLM server's adapters, through its documented endpoints: load, list, ask, unload.

vLLM takes adapters while it runs when it was started with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True and --enable-lora
(https://docs.vllm.ai, LoRA Adapters, "Dynamically serving LoRA Adapters").
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import httpx
from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_exponential

from deal_core.errors import ConfigError, DealError
from deal_core.masking import without_secrets
from infra.settings import VllmSettings

ANSWER_SECONDS = 120.0
FIRST_PAUSE_SECONDS = 0.5
AWAY = frozenset({429, 502, 503, 504})
"""Answers of a server, or of what stands before it, that is starting or too busy."""


class VllmError(DealError):
    """The vLLM server refused what was asked."""


class VllmAwayError(VllmError):
    """The vLLM server does not answer."""


@dataclass(frozen=True)
class LoadedModel:
    """An entry of the server's list."""

    name: str
    root: str
    """Where the server read it."""
    parent: str | None
    """The base model of an adapter; None: it is the base model."""


class VllmClient:
    """One server."""

    def __init__(self, settings: VllmSettings) -> None:
        if not settings.url:
            raise ConfigError("No vLLM server is named; give --url, or set DEAL_VLLM_URL.")
        self.url = settings.url.rstrip("/").removesuffix("/v1")
        key = settings.api_key
        headers = {"Authorization": f"Bearer {key.get_secret_value()}"} if key else {}
        self._client = httpx.Client(base_url=self.url, headers=headers, timeout=ANSWER_SECONDS)
        self._max_attempts = settings.max_attempts

    def models(self) -> dict[str, LoadedModel]:
        """What the server has, by name: its base model and the adapters."""
        answer = self._send("list its models", "GET", "/v1/models")
        return {
            entry["id"]: LoadedModel(entry["id"], str(entry.get("root") or ""), entry.get("parent"))
            for entry in answer.json()["data"]
        }

    def load(self, name: str, path: str) -> None:
        """Load an adapter from a path that the server sees.

        Raises:
            VllmError: the server refuses it.
            VllmAwayError: the server does not answer.
        """
        try:
            self._send(f"load {path}", "POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": path})
        except VllmError:
            known = self.models().get(name)
            if known is None or known.root != path:  # else an attempt whose answer got lost had loaded it
                raise

    def unload(self, name: str) -> None:
        """Unload an adapter; one that is not there is none to unload."""
        try:
            self._send(f"unload {name}", "POST", "/v1/unload_lora_adapter", {"lora_name": name})
        except VllmError:
            if name in self.models():
                raise

    def complete(self, model: str, prompt: str, max_tokens: int) -> str:
        """A greedy completion by one model.

        Raises:
            VllmError: there is none, or another model answered.
        """
        body = {"model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
        answer = self._send(f"ask {model}", "POST", "/v1/completions", body).json()
        if answer.get("model") != model or not answer.get("choices"):
            raise VllmError(f"The vLLM server at {self._where()} gave no completion by {model!r}.")
        return str(answer["choices"][0]["text"])

    def _send(self, doing: str, method: str, path: str, body: Mapping[str, Any] | None = None) -> httpx.Response:
        """Send a request, again while the server is away."""
        retrying = Retrying(
            stop=stop_after_attempt(self._max_attempts), wait=wait_exponential(FIRST_PAUSE_SECONDS, max=10),
            retry=retry_if_exception(lambda error: isinstance(error, VllmAwayError)), reraise=True,
        )  # fmt: skip
        for attempt in retrying:
            with attempt:
                return self._send_once(doing, method, path, body)
        raise AssertionError("unreachable")

    def _send_once(self, doing: str, method: str, path: str, body: Mapping[str, Any] | None) -> httpx.Response:
        try:
            answer = self._client.request(method, path, json=body)
        except httpx.TransportError as error:
            raise VllmAwayError(
                f"The vLLM server at {self._where()} is away ({type(error).__name__}: {error}); start it, then run "
                "this again."
            ) from None
        if answer.status_code in AWAY:
            raise VllmAwayError(
                f"The vLLM server at {self._where()} is not ready ({answer.status_code}); run this again when "
                "it is."
            )
        if answer.is_success:
            return answer
        raise VllmError(f"The vLLM server at {self._where()} did not {doing}: {_reason(answer, path)}")

    def _where(self) -> str:
        return without_secrets(self.url)


def _reason(answer: httpx.Response, path: str) -> str:
    """What the server says; releases differ in whether its error lies one level down."""
    if answer.status_code == 401:
        return "it wants an API key; set DEAL_VLLM_API_KEY."
    try:
        said = answer.json()
    except ValueError:
        said = {}
    error = said.get("error", said) if isinstance(said, dict) else {}
    message = error.get("message") if isinstance(error, dict) else None
    if message:
        return re.sub(r"\s+", " ", str(message))[:500]
    if answer.status_code in (404, 405) and path.endswith("_lora_adapter"):
        return (
            "it takes no adapters while it runs; start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True and --enable-lora."
        )
    return f"it answered {answer.status_code}."
