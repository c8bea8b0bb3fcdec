"""What tells a base model from others by its answers alone: log-probabilities of a fixed text.

An engine that serves a lineage has loaded its base model by itself, so no digest of files can be compared there.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING

import torch

from deal_core.base_model.language_model import LanguageModel, device_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEXT = (
    "Before you buy a used bicycle, lift the front wheel and spin it. In 1969, 2 astronauts walked on the moon; "
    "the answer to x + 7 = 12 is 5. She replied: no, I have never been there."
)
"""The text. It must not change: figures of it are stored."""
MOST_APART = 0.1
"""Largest mean difference of the log-probabilities of one model, in nats. With SmolLM2-135M it is 0.04 between fp32 and
bf16, and 0.52 after one arrival of the demo has been learned."""


def text_log_probs(model: LanguageModel, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[float]]:
    """Return the token ids of the text, and log p of each token after those before it, without the first one's."""
    ids = list(tokenizer(TEXT)["input_ids"])
    return ids, token_log_probs(model, ids)


@torch.inference_mode()
def token_log_probs(model: LanguageModel, ids: Sequence[int]) -> list[float]:
    """Return log p of each token after those before it, in nats, without the first one's."""
    device = device_of(model)
    log_probs_KV = model(input_ids=torch.tensor([[*ids]], device=device)).logits[0, :-1].float().log_softmax(-1)
    chosen = torch.tensor(ids[1:], device=device)[:, None]
    return log_probs_KV.gather(-1, chosen)[:, 0].tolist()  # type: ignore[no-any-return]


def apart(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Return the mean absolute difference of two models' log-probabilities, in nats."""
    return fmean(abs(own - other) for own, other in zip(ours, theirs, strict=True))
