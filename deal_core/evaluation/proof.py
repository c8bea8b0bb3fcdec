"""What tells a server that applies an adapter from one that does not: log-probabilities of a few fixed texts.

An engine that does not know an adapter's layers, or has another adapter under its name, answers without an error.

    at evaluation   for up to four tasks: the prompt of a fixed text, and the labels → log-probabilities with and
                    without the adapter; the tokens with the largest |Δ| are stored, Δ = adapter − base
    on an engine    the same texts, asked with the adapter and without it → Δe at these tokens
    judged by       ‖Δe − Δ‖ / ‖Δ‖: 0.00 for the right adapter in fp32, 0.03 in bf16, 1.13 for another lineage's, 1.00
                    for none (measured on vLLM). The slope ⟨Δe, Δ⟩ / ⟨Δ, Δ⟩ lets another adapter pass with 0.54.

Both differences are of one model in one precision, so most of what the precision changes cancels.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from peft import PeftModel

from deal_core.adapter.files import PROOF_FILE
from deal_core.base_model.fingerprint import TEXT, token_log_probs
from deal_core.data.prompts import encode_answer, encode_prompt
from deal_core.errors import AdapterStateError
from deal_core.evaluation.answering import ServedTask
from deal_core.schema_version import VersionedJson

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_TASKS = 4
NUM_PLACES = 64
"""Tokens that are kept."""
MAX_RESIDUAL = 0.4
"""Largest ‖Δe − Δ‖ / ‖Δ‖ of an engine that applies the adapter."""
MIN_SLOPE = 0.2
"""An engine with a smaller slope applies nothing."""
LEAST_NOISE = 0.01
"""The noise of an engine is at least this, in nats: rounding may be the same in two requests."""

Verdict = Literal["proven", "ignored", "otherwise", "too small"]
"""The engine applies the adapter; it ignores it; it applies something else; the adapter changes too little to tell."""


@dataclass(frozen=True, kw_only=True)
class Proof(VersionedJson, what=PROOF_FILE, error=AdapterStateError, version=1):
    """The content of `proof.json`. It has no row of a user."""

    texts: tuple[tuple[int, ...], ...]
    """The token ids of each text."""
    places: tuple[tuple[int, int], ...]
    """The tokens with the largest |Δ|: number of the text, and place among its log-probabilities, which begin with the
    second token's."""
    adapter: tuple[float, ...]
    """Log-probabilities of these tokens with the adapter, in nats."""
    base: tuple[float, ...]
    """The same without it."""

    @property
    def asked(self) -> list[tuple[tuple[int, ...], int]]:
        """The tokens with the largest |Δ|, each with those before it."""
        return [(self.texts[text][: place + 1], self.texts[text][place + 1]) for text, place in self.places]

    def judge(
        self, adapter: Sequence[float], base: Sequence[float], base_again: Sequence[float]
    ) -> tuple[Verdict, float]:
        """Say what an engine makes of the adapter, with the residual ‖Δe − Δ‖ / ‖Δ‖.

        Args:
            adapter: Log-probabilities of the tokens `asked`, under the adapter's name.
            base: The same under the base model's name.
            base_again: The same once more, which shows the engine's noise.
        """
        on_adapter, on_base, noisy = map(np.array, (adapter, base, base_again))
        delta, on_engine = np.subtract(self.adapter, self.base), on_adapter - on_base
        size = float(np.linalg.norm(delta))
        noise = max(LEAST_NOISE, float(np.sqrt(np.mean((noisy - on_base) ** 2))))
        residual = float(np.linalg.norm(on_engine - delta)) / max(size, 1e-12)
        if size / np.sqrt(len(delta)) < 3 * noise:
            return "too small", residual
        if residual <= MAX_RESIDUAL:
            return "proven", residual
        slope = float(on_engine @ delta) / size**2
        return ("ignored" if slope < MIN_SLOPE else "otherwise"), residual  # NaN is no proof


@torch.inference_mode()
def make_proof(model: PeftModel, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[ServedTask]) -> Proof | None:
    """Compute the proof of the adapter that is on a model, from the first tasks; None: no log-probability is finite."""
    model.eval()
    texts = [text_of(tokenizer, task) for task in tasks[:MAX_TASKS]]
    on_adapter = [token_log_probs(model, text) for text in texts]
    with model.disable_adapter():
        on_base = [token_log_probs(model, text) for text in texts]
    distance = {
        (text, place): abs(own - other)
        for text, pair in enumerate(zip(on_adapter, on_base, strict=True))
        for place, (own, other) in enumerate(zip(*pair, strict=True))
        if math.isfinite(own) and math.isfinite(other)
    }
    places = sorted(sorted(distance, key=distance.__getitem__, reverse=True)[:NUM_PLACES])
    if not places:
        return None
    return Proof(
        texts=tuple(map(tuple, texts)),
        places=tuple(places),
        adapter=tuple(on_adapter[text][place] for text, place in places),
        base=tuple(on_base[text][place] for text, place in places),
    )


def text_of(tokenizer: PreTrainedTokenizerBase, task: ServedTask) -> list[int]:
    """Return the prompt of a fixed text for a task, and its labels as answers one after another, as token ids.

    It is as long as a prompt and its answer at most, which every engine of the lineage takes.
    """
    is_chat = task.schema.format == "chat"
    text = json.dumps([{"role": "user", "content": TEXT}]) if is_chat else TEXT
    prompt = encode_prompt(tokenizer, task.schema, text, task.max_prompt_tokens)
    answers = [encode_answer(tokenizer, task.schema, label, task.max_new_tokens + 1) for label in task.schema.labels]
    return [*prompt, *chain.from_iterable(answers)][: task.max_prompt_tokens + task.max_new_tokens - 1]


def read_proof(folder: Path) -> Proof | None:
    """Read the proof of the adapter in a folder; None: it has none.

    Raises:
        AdapterStateError: The proof is of another schema version.
        ValueError: It is damaged.
    """
    path = folder / PROOF_FILE
    return Proof.from_json(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None
