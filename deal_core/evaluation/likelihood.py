"""How likely a model finds the reference answers, without generating anything.

Shapes: B rows of a batch, K tokens of the longest answer, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerBase

from deal_core.config import EvaluateConfig
from deal_core.data.collate import IGNORED, AnswerCollator, answer_logits
from deal_core.data.prompts import encode_answer, encode_prompt
from deal_core.data.schema import TaskSchema
from deal_core.evaluation.generation import MAX_LOGIT_BYTES, LanguageModel, OnProgress, batches_by_length, device_of


@torch.inference_mode()
def token_probabilities(
    model: LanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    task: TaskSchema,
    inputs: Sequence[str],
    references: Sequence[str],
    config: EvaluateConfig,
    *,
    max_prompt_tokens: int,
    on_progress: OnProgress | None = None,
) -> list[float]:
    """Return exp(−L) for every row, L the mean negative log-likelihood of the reference's tokens and its end token.

    A reference beyond `config.max_new_tokens` is cut.

    Returns:
        The geometric means of the tokens' probabilities, 0 to 1, in the rows' order.
    """
    model.eval()
    collate = AnswerCollator(tokenizer, is_seq2seq=bool(model.config.is_encoder_decoder))
    rows = [
        {
            "prompt_ids": encode_prompt(tokenizer, task, text, max_prompt_tokens),
            "answer_ids": encode_answer(tokenizer, task, reference, config.max_new_tokens + 1),
        }
        for text, reference in zip(inputs, references, strict=True)
    ]
    found = [0.0] * len(rows)
    lengths = [len(row["prompt_ids"]) + len(row["answer_ids"]) for row in rows]
    longest = max((len(row["answer_ids"]) for row in rows), default=1)
    max_rows = max(1, MAX_LOGIT_BYTES // (12 * longest * model.config.vocab_size))  # the logits, and two copies in fp32
    for batch in batches_by_length(lengths, config.max_batch_tokens, max_rows):
        features = {name: value.to(device_of(model)) for name, value in collate([rows[i] for i in batch]).items()}
        labels_BK, logits_BKV = features["labels"], answer_logits(model, features)
        losses_BK = cross_entropy(logits_BKV.float().mT, labels_BK, ignore_index=IGNORED, reduction="none")
        shares_B = (-losses_BK.sum(1) / (labels_BK != IGNORED).sum(1)).exp()
        for i, share in zip(batch, shares_B.tolist(), strict=True):
            found[i] = 0.0 if math.isnan(share) else min(1.0, share)
        if on_progress is not None:
            on_progress(len(batch))
    return found
