"""How likely a model finds given answers, without generating anything.

Shapes: B rows of a batch, K tokens of the longest answer, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from datasets import Dataset
from peft import PeftModel
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerBase

from deal_core.config import EvaluateConfig
from deal_core.data.collate import IGNORED, AnswerCollator, answer_logits
from deal_core.data.prompts import encode_answer, encode_prompt
from deal_core.data.schema import REJECTED, TaskSchema
from deal_core.evaluation.generation import MAX_LOGIT_BYTES, LanguageModel, OnProgress, batches_by_length, device_of

READS_OF_PREFERENCE = 4
"""Two answers of each row are read by two models."""


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
    found = answer_losses(
        model, tokenizer, task, inputs, references, config,
        max_prompt_tokens=max_prompt_tokens, on_progress=on_progress,
    )  # fmt: skip
    shares = [math.exp(-loss / num_tokens) for loss, num_tokens in found]
    return [0.0 if math.isnan(share) else min(1.0, share) for share in shares]


def preferred(
    model: LanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    task: TaskSchema,
    rows: Dataset,
    config: EvaluateConfig,
    *,
    max_prompt_tokens: int,
    on_progress: OnProgress | None = None,
) -> list[float]:
    """Return for every row whether the model prefers the better answer (output) to the worse one (rejected).

    It does so if log p(better) − log p(worse) is larger than the untouched base model's: 1, else 0; 0.5 if both are
    equal. This is the accuracy of DPO's implicit reward (arXiv 2305.18290) with the base model as the reference, so a
    version is compared with any other one, and the base model itself has 0.5.

    Args:
        model: The base model, with or without an adapter.
        tokenizer: The base model's tokenizer.
        task: How a row becomes a prompt.
        rows: The rows, columns input, output and rejected.
        config: Limits of batches and answers. A longer answer is cut.
        max_prompt_tokens: Limit of prompts.
        on_progress: Called with the number of rows just judged.
    """
    answers, num_read = [*rows["output"], *rows[REJECTED.name]], 0

    def report(num_answers: int) -> None:
        nonlocal num_read
        before, num_read = num_read // READS_OF_PREFERENCE, num_read + num_answers
        if on_progress is not None:
            on_progress(num_read // READS_OF_PREFERENCE - before)

    def margins() -> list[float]:
        losses = answer_losses(
            model, tokenizer, task, [*rows["input"]] * 2, answers, config,
            max_prompt_tokens=max_prompt_tokens, on_progress=report,
        )  # fmt: skip
        return [worse - better for (better, _), (worse, _) in zip(losses, losses[len(rows) :], strict=False)]

    if not isinstance(model, PeftModel):
        report(READS_OF_PREFERENCE * len(rows))
        return [0.5] * len(rows)
    of_version = margins()
    with model.disable_adapter():
        of_base = margins()
    return [0.5 if each == base else float(each > base) for each, base in zip(of_version, of_base, strict=True)]


@torch.inference_mode()
def answer_losses(
    model: LanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    task: TaskSchema,
    inputs: Sequence[str],
    answers: Sequence[str],
    config: EvaluateConfig,
    *,
    max_prompt_tokens: int,
    on_progress: OnProgress | None = None,
) -> list[tuple[float, int]]:
    """Return the negative log-likelihood of every row's answer, in nats, and the number of its tokens.

    The end token counts. An answer beyond `config.max_new_tokens` is cut.
    """
    model.eval()
    collate = AnswerCollator(tokenizer, is_seq2seq=bool(model.config.is_encoder_decoder))
    rows = [
        {
            "prompt_ids": encode_prompt(tokenizer, task, text, max_prompt_tokens),
            "answer_ids": encode_answer(tokenizer, task, answer, config.max_new_tokens + 1),
        }
        for text, answer in zip(inputs, answers, strict=True)
    ]
    found = [(0.0, 0)] * len(rows)
    lengths = [len(row["prompt_ids"]) + len(row["answer_ids"]) for row in rows]
    longest = max((len(row["answer_ids"]) for row in rows), default=1)
    max_rows = max(1, MAX_LOGIT_BYTES // (12 * longest * model.config.vocab_size))  # the logits, and two copies in fp32
    for batch in batches_by_length(lengths, config.max_batch_tokens, max_rows):
        features = {name: value.to(device_of(model)) for name, value in collate([rows[i] for i in batch]).items()}
        labels_BK, logits_BKV = features["labels"], answer_logits(model, features)
        losses_BK = cross_entropy(logits_BKV.float().mT, labels_BK, ignore_index=IGNORED, reduction="none")
        counts_B = (labels_BK != IGNORED).sum(1)
        for i, loss, num_tokens in zip(batch, losses_BK.sum(1).tolist(), counts_B.tolist(), strict=True):
            found[i] = (loss, num_tokens)
        if on_progress is not None:
            on_progress(len(batch))
    return found
