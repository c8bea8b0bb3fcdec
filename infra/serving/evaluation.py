"""Test rows that a vLLM server answers in the place of this process (DEAL_EVALUATE_ENGINE)."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from deal_core.adapter.files import PEFT_FILES, digests_of, sha256_together
from deal_core.base_model.load import BaseModel
from deal_core.errors import ConfigError
from deal_core.evaluation.answerer import Sampling
from deal_core.evaluation.answering import ServedTask, ServedVersion
from deal_core.evaluation.generation import GivenAnswer, OnProgress
from infra.fingerprints import Fingerprint, keep_fingerprint
from infra.serving.engines import Completion, OnEngine, adapter_folder, copy_adapter, require_base
from infra.serving.vllm import EngineClient
from infra.settings import EngineSettings, EvaluationSettings
from infra.store.base import ObjectStore

MAX_ATTEMPTS = 5
NUM_REQUESTS = 4
"""Requests of 64 rows that an engine answers at once."""

AnswerRows = Callable[[ServedTask, Sequence[str], OnProgress | None], list[GivenAnswer]]
"""A task, its inputs and who hears of the progress → the answers, in order."""


def evaluating_engine() -> str | None:
    """Return what answers test rows, as stored answers name it: "vllm" and its version; None: this process does.

    Raises:
        ConfigError: The address is none, or has a password.
        EngineError: The engine does not answer, or is no vLLM server.
    """
    url = EvaluationSettings().evaluate_engine
    if url is not None and "@" in urlsplit(url).netloc:
        raise ConfigError("DEAL_EVALUATE_ENGINE has a user or a password; give DEAL_ENGINE_API_KEY instead.")
    return None if url is None else f"vllm {_client(url).version()}"


@contextmanager
def answering(store: ObjectStore, base: BaseModel, adapter: Path | None) -> Iterator[AnswerRows]:
    """Load an adapter into the engine of DEAL_EVALUATE_ENGINE, under a name of its own, for the time of the block.

    Args:
        store: Where the base model's fingerprint is kept.
        base: The base model, which the engine must have too.
        adapter: Folder of the adapter; None: the base model itself answers.

    Raises:
        ConfigError: The engine has another base model, or serves no adapters on such a one.
        EngineError: It does not answer, or refuses the adapter.
    """
    url, settings = EvaluationSettings().evaluate_engine, EngineSettings()
    assert url is not None, "the caller has asked `evaluating_engine`"
    fingerprint = keep_fingerprint(store, base)
    if fingerprint is None:
        problem = (
            f"DEAL_EVALUATE_ENGINE: {base.name} is an encoder-decoder, which vLLM serves no adapters on; unset it."
        )
        raise ConfigError(problem)
    client = _client(url)
    model = client.base_model()
    require_base(client, model, fingerprint, base.name)
    if adapter is None:
        yield _answers_of(client, base, model, fingerprint)
        return
    # A name never stands for two adapters, and two evaluations of one adapter must not unload it for each other.
    name = f"evaluate-{sha256_together(digests_of(adapter, PEFT_FILES))[:12]}-{uuid.uuid4().hex[:8]}"
    folder = adapter_folder(settings) / name
    copy_adapter(adapter, folder)
    try:
        client.load(name, f"{settings.server_adapter_dir or folder.parent}/{name}")
        try:
            yield _answers_of(client, base, name, fingerprint)
        finally:
            client.unload(name)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _client(url: str) -> EngineClient:
    return EngineClient(url, EngineSettings(), max_attempts=MAX_ATTEMPTS)


def _answers_of(client: EngineClient, base: BaseModel, name: str, fingerprint: Fingerprint) -> AnswerRows:
    def answer(task: ServedTask, inputs: Sequence[str], on_progress: OnProgress | None = None) -> list[GivenAnswer]:
        served = ServedVersion(
            lineage="",
            base_source=base.name,
            base_name=base.name,
            base_sha256=base.sha256,
            tasks=(task,),
            newest_task=task.schema.name,
        )
        version = OnEngine(
            served=served, number="", name=name, copy=Path(), path="", tokenizer=base.tokenizer, fingerprint=fingerprint
        )
        completion = Completion(version, [(task, text) for text in inputs], Sampling())

        def take(places: Sequence[int]) -> int:
            completion.take(client, places)
            return len(places)

        with ThreadPoolExecutor(NUM_REQUESTS) as pool:
            for num_rows in pool.map(take, completion.batches()):
                if on_progress is not None:
                    on_progress(num_rows)
        answered = completion.finished()
        return [*map(GivenAnswer, answered.answers, answered.confidences, answered.is_cut)]

    return answer
