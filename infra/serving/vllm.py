"""A client of vLLM's documented endpoints for adapters: load, list, complete, unload.

A running vLLM server loads adapters if it was started with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True and --enable-lora
(https://docs.vllm.ai, LoRA Adapters, "Dynamically serving LoRA Adapters").
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import httpx
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential

from deal_core.errors import ConfigError, DealError
from deal_core.safe_text import without_secrets
from infra.settings import VllmSettings, host_of

ANSWER_SECONDS = 120.0
FIRST_PAUSE_SECONDS = 0.5
AWAY = frozenset({429, 502, 503, 504})
"""Status codes of a server or proxy that is starting or too busy."""
NO_ANSWER = (ValueError, KeyError, IndexError, TypeError)
"""Errors in reading an answer that no vLLM server gave."""


class VllmError(DealError):
    """The vLLM server refused a request."""


class VllmAwayError(VllmError):
    """The vLLM server does not answer."""


class VllmClient:
    """A client of one server.

    Raises:
        VllmAwayError: In every method: the server does not answer.
        VllmError: In every method: the server refuses, or gives something else.
    """

    def __init__(self, settings: VllmSettings) -> None:
        if not settings.url:
            raise ConfigError("No vLLM server is named; give --url, or set DEAL_VLLM_URL.")
        host_of(settings.url, "The vLLM server's address (--url, DEAL_VLLM_URL)")
        self.url = settings.url.rstrip("/").removesuffix("/v1")
        key = settings.api_key
        headers = {"Authorization": f"Bearer {key.get_secret_value()}"} if key else {}
        self._client = httpx.Client(base_url=self.url, headers=headers, timeout=ANSWER_SECONDS)
        self._max_attempts = settings.max_attempts
        self._shown = without_secrets(self.url)

    def models(self) -> dict[str, str]:
        """Return the names of the base model and of the adapters, each with the path from which it was loaded."""
        answer = self._send("list its models", "GET", "/v1/models")
        try:
            return {entry["id"]: str(entry.get("root") or "") for entry in answer.json()["data"]}
        except NO_ANSWER:
            raise VllmError(f"{self._shown} lists no models as vLLM does; give the address of a vLLM server.") from None

    def load(self, name: str, path: str) -> None:
        """Load an adapter from a path on the server."""
        try:
            self._send(f"load {path}", "POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": path})
        except VllmError:
            if self.models().get(name) != path:  # otherwise an earlier attempt loaded it, and its answer got lost
                raise

    def unload(self, name: str) -> None:
        """Unload an adapter, if it is loaded."""
        try:
            self._send(f"unload {name}", "POST", "/v1/unload_lora_adapter", {"lora_name": name})
        except VllmError:
            if name in self.models():
                raise

    def complete(self, model: str, prompt: str, max_tokens: int) -> str:
        """Return a greedy completion by a model."""
        body = {"model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
        try:
            answer = self._send(f"ask {model}", "POST", "/v1/completions", body).json()
            if answer["model"] != model:
                raise ValueError
            return str(answer["choices"][0]["text"])
        except NO_ANSWER:
            raise VllmError(f"The vLLM server at {self._shown} gave no completion by {model!r}.") from None

    def _send(self, action: str, method: str, path: str, body: Mapping[str, Any] | None = None) -> httpx.Response:
        """Send a request; repeat it while the server does not answer."""
        for attempt in Retrying(
            stop=stop_after_attempt(self._max_attempts),
            wait=wait_exponential(FIRST_PAUSE_SECONDS, max=10),
            retry=retry_if_exception_type(VllmAwayError),
            reraise=True,
        ):
            with attempt:
                try:
                    answer = self._client.request(method, path, json=body)
                except httpx.TransportError as error:
                    raise VllmAwayError(
                        f"The vLLM server at {self._shown} is away ({type(error).__name__}: {error}); start it, then "
                        "run this again."
                    ) from None
                if answer.status_code in AWAY:
                    raise VllmAwayError(
                        f"The vLLM server at {self._shown} is not ready ({answer.status_code}); run this again when it "
                        "is."
                    )
        if answer.is_success:
            return answer
        message = None
        with suppress(ValueError, AttributeError):  # no JSON, or no object
            values = answer.json()
            message = values.get("error", values).get("message")  # in some releases it is at the top level
        if answer.status_code == 401:
            reason = "it wants an API key; set DEAL_VLLM_API_KEY."
        elif message:
            reason = re.sub(r"\s+", " ", str(message))[:500]
        elif answer.status_code in (404, 405) and path.endswith("_lora_adapter"):
            reason = (
                "it takes no adapters while it runs; start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True and "
                "--enable-lora."
            )
        else:
            reason = f"it answered {answer.status_code}."
        raise VllmError(f"The vLLM server at {self._shown} did not {action}: {reason}")
