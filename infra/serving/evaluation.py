"""Test rows that a vLLM server answers in the place of this process (DEAL_EVALUATE_ENGINE)."""

from __future__ import annotations

import asyncio
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from anyio.from_thread import BlockingPortal, start_blocking_portal

from deal_core.base_model.load import BaseModel
from deal_core.errors import ConfigError
from deal_core.evaluation.answerer import Sampling
from deal_core.evaluation.answering import ServedTask, ServedVersion
from deal_core.evaluation.evaluate import AnswerInputs
from deal_core.evaluation.generation import GivenAnswer, OnProgress
from deal_core.safe_text import holds_secret
from infra.fingerprints import keep_fingerprint
from infra.serving.engines import Completion, OnEngine, adapter_digest, adapter_folder, copy_adapter, require_base
from infra.serving.vllm import EngineClient
from infra.settings import EngineSettings, EvaluationSettings
from infra.store.base import ObjectStore

MAX_ATTEMPTS = 5
NUM_REQUESTS = 4
"""Requests of 64 rows that an engine answers at once."""


class EvaluationEngine:
    """The vLLM server of an evaluation, whose base model is the evaluation's.

    Raises:
        ConfigError: The engine has another base model, or serves no adapters on such a one.
        EngineError: It does not answer, or is no vLLM server.
    """

    def __init__(self, url: str, store: ObjectStore, base: BaseModel) -> None:
        self._url, self._base = url, base
        with connected(url) as (portal, client):
            self.name = f"vllm {portal.call(client.version)}"
            """What answers, as stored answers name it."""
            fingerprint = keep_fingerprint(store, base.sha256, base.quantize, lambda: base)
            if fingerprint is None:
                reason = f"{base.name} is an encoder-decoder, which vLLM serves no adapters on"
                raise ConfigError(f"DEAL_EVALUATE_ENGINE: {reason}; unset it.")
            self._fingerprint = fingerprint
            self._base_name = client.base_of(portal.call(client.models))
            portal.call(require_base, client, self._base_name, fingerprint, base.name)

    @contextmanager
    def answering(self, adapter: Path | None) -> Iterator[AnswerInputs]:
        """Load an adapter, under a name of its own, for the time of the block. None: the base model itself answers.

        Raises:
            EngineError: The engine does not answer, or refuses the adapter.
        """
        with connected(self._url) as (portal, client):
            if adapter is None:
                yield self._answers_of(self._base_name, portal, client)
                return
            # A name never stands for two adapters. Two evaluations of one adapter must not unload it for each other.
            settings, name = EngineSettings(), f"evaluate-{adapter_digest(adapter)}-{uuid.uuid4().hex[:8]}"
            folder = adapter_folder(settings) / name
            copy_adapter(adapter, folder)
            try:
                portal.call(client.load, name, f"{settings.server_adapter_dir or folder.parent}/{name}")
                try:
                    yield self._answers_of(name, portal, client)
                finally:
                    portal.call(client.unload, name)
            finally:
                shutil.rmtree(folder, ignore_errors=True)

    def _answers_of(self, name: str, portal: BlockingPortal, client: EngineClient) -> AnswerInputs:
        base = self._base

        def answer(task: ServedTask, inputs: Sequence[str], on_progress: OnProgress | None = None) -> list[GivenAnswer]:
            served = ServedVersion(
                lineage="",
                base_source=base.name,
                base_name=base.name,
                base_sha256=base.sha256,
                tasks=(task,),
                newest_task=task.schema.name,
                quantize=base.quantize,
            )
            version = OnEngine(
                served=served,
                number="",
                name=name,
                copy=Path(),
                path="",
                tokenizer=base.tokenizer,
                fingerprint=self._fingerprint,
            )
            completion = Completion(version, [(task, text) for text in inputs], Sampling())
            places = asyncio.Semaphore(NUM_REQUESTS)

            async def take(rows: Sequence[int]) -> int:
                async with places:
                    await completion.take(client, rows)
                return len(rows)

            for taken in [portal.start_task_soon(take, rows) for rows in completion.batches()]:
                num_rows = taken.result()
                if on_progress is not None:
                    on_progress(num_rows)
            answered = completion.finished()
            return [*map(GivenAnswer, answered.answers, answered.confidences, answered.is_cut)]

        return answer


@contextmanager
def connected(url: str) -> Iterator[tuple[BlockingPortal, EngineClient]]:
    """Give a client, and an event loop in a thread that calls its methods: an evaluation itself is no coroutine."""
    client = EngineClient(url, EngineSettings(), max_attempts=MAX_ATTEMPTS)
    with start_blocking_portal() as portal:
        try:
            yield portal, client
        finally:
            portal.call(client.close)


def evaluation_engine(store: ObjectStore, load: Callable[[], BaseModel]) -> EvaluationEngine | None:
    """Return the engine of DEAL_EVALUATE_ENGINE; None: there is none. For further errors see the class.

    `load` returns the base model. It is called only if there is an engine.

    Raises:
        ConfigError: The address is none, or has a password.
    """
    url = EvaluationSettings().evaluate_engine
    if url is None:
        return None
    if holds_secret(url):
        raise ConfigError("DEAL_EVALUATE_ENGINE has a user or a password; give DEAL_ENGINE_API_KEY instead.")
    return EvaluationEngine(url, store, load())
