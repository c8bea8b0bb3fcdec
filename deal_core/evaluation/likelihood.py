"""How likely a model finds given answers, without generating anything: one teacher-forced pass over the rows.

Shapes: N rows, B rows of a batch, K tokens of the longest answer, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div
from transformers import PreTrainedTokenizerBase

from deal_core.base_model.language_model import LanguageModel, device_of
from deal_core.data.collate import IGNORED, answer_collator, answer_logits, encode_row
from deal_core.data.schema import REJECTED, TaskSchema
from deal_core.evaluation.answering import ServedTask
from deal_core.evaluation.batches import in_batches, rows_with_logits
from deal_core.evaluation.generation import OnProgress

CHUNK_ROWS = 512
"""Rows whose tokens are in memory at once. Batches of similar length are made within a chunk."""
READS_OF_PREFERENCE = 4
"""Two answers of each row are read by two models."""
DIVERGENCE_ROWS = 32
"""Rows on which a version is compared with its base model: a few seconds on two cores with the built-in model."""


@dataclass(frozen=True, kw_only=True)
class MeasuredAnswers:
    """What a model makes of every row's answer; float64 on the CPU."""

    loss_N: Tensor
    """-log of the answer's probability, summed over its tokens, in nats."""
    num_tokens_N: Tensor
    """Tokens of the answer, the end token included."""
    num_hits_N: Tensor
    """Answer tokens that are the likeliest ones."""
    gradient_N: Tensor
    """Norm of the gradient of the summed loss with respect to the logits."""

    @property
    def mean_loss(self) -> Tensor:
        """Loss per answer token, shape (N,)."""
        return self.loss_N / self.num_tokens_N


def measure(
    model: LanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    task: TaskSchema,
    rows: Dataset,
    *,
    max_prompt_tokens: int,
    max_answer_tokens: int,
    on_progress: OnProgress | None = None,
) -> MeasuredAnswers:
    """Read every row (columns input and output) once and measure its answer. Rows are tokenised and cut as in training.

    The memory does not depend on the number of rows, except for four numbers a row. A row's figures depend on the
    other rows by rounding only: the batches of a chunk are made of rows of similar length. `max_answer_tokens` includes
    the end token.
    """
    limits = {"max_prompt_tokens": max_prompt_tokens, "max_answer_tokens": max_answer_tokens}
    figures_N4 = torch.zeros(len(rows), 4, dtype=torch.float64)
    for places, figures_B4 in _read_rows(
        model, tokenizer, task, rows, partial(_figures, model), num_bytes=12, **limits
    ):
        figures_N4[places] = figures_B4.cpu()
        if on_progress is not None:
            on_progress(len(places))
    loss_N, num_tokens_N, num_hits_N, squares_N = figures_N4.unbind(1)
    return MeasuredAnswers(
        loss_N=loss_N, num_tokens_N=num_tokens_N.clamp(min=1), num_hits_N=num_hits_N, gradient_N=squares_N.sqrt()
    )


def _read_rows(
    model: LanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    task: TaskSchema,
    rows: Dataset,
    read: Callable[[Mapping[str, Tensor]], Tensor],
    *,
    num_bytes: int,
    **limits: int,
) -> Iterator[tuple[list[int], Tensor]]:
    """Yield the places of rows of similar length, and what is read of them. A logit takes `num_bytes` in all."""
    model.eval()
    collate = answer_collator(model, tokenizer, reads_whole_rows=False)

    def read_batch(batch: list[int]) -> Tensor:
        collated = collate([encoded[i] for i in batch])
        return read({name: value.to(device_of(model)) for name, value in collated.items()})

    for start in range(0, len(rows), CHUNK_ROWS):
        chunk = rows[start : start + CHUNK_ROWS]
        encoded = [
            encode_row({"input": text, "output": answer}, tokenizer, task, **limits)
            for text, answer in zip(chunk["input"], chunk["output"], strict=True)
        ]
        longest = max(len(row["answer_ids"]) for row in encoded)
        max_rows = rows_with_logits(model, longest, num_bytes=num_bytes)
        lengths = [row["length"] for row in encoded]
        for batch, result in in_batches(model, lengths, read_batch, max_rows=max_rows):
            yield [start + i for i in batch], result


@torch.inference_mode()
def _figures(model: LanguageModel, features: Mapping[str, Tensor]) -> Tensor:
    """Loss, tokens, hits and squared gradient of every row of a batch, B×4, float64. A loss is computed in fp32."""
    logits_BKV, labels_BK = answer_logits(model, features).float(), features["labels"]
    is_token_BK = labels_BK != IGNORED
    losses_BK = cross_entropy(logits_BKV.mT, labels_BK, ignore_index=IGNORED, reduction="none").double()
    hits_BK = (logits_BKV.argmax(-1) == labels_BK) & is_token_BK
    # ‖softmax(logits) − onehot(token)‖² = Σ p² over the vocabulary − 2 p(token) + 1
    sums_BK = torch.linalg.vector_norm(logits_BKV.softmax(-1), dim=-1).square()
    squares_BK = (sums_BK - 2 * (-losses_BK).exp() + 1).clamp(min=0) * is_token_BK
    figures = (losses_BK, is_token_BK.double(), hits_BK.double(), squares_BK)
    return torch.stack([figure_BK.sum(1) for figure_BK in figures], 1)


def divergence_from_base(
    model: LanguageModel, tokenizer: PreTrainedTokenizerBase, task: ServedTask, rows: Dataset
) -> float | None:
    """Return KL(base ‖ version) of the next token, in nats, as the mean over the answers' tokens of some rows.

    This distance on the task that was learned predicts how much else is forgotten (RL's Razor, arXiv 2509.04259). The
    paper draws the answers from a model. Here they are the first right answers of the first DIVERGENCE_ROWS test rows,
    read once with the adapter and once without, so that nothing is generated. The base model itself has 0. None: the
    figure is not finite.
    """
    if not isinstance(model, PeftModel):
        return 0.0
    limits = {"max_prompt_tokens": task.max_prompt_tokens, "max_answer_tokens": task.max_new_tokens + 1}  # with the end
    first = rows.select(range(min(len(rows), DIVERGENCE_ROWS)))
    tokens = [
        divergence_K
        for _, divergence_K in _read_rows(
            model, tokenizer, task.schema, first, partial(_divergences, model), num_bytes=24, **limits
        )
    ]
    mean = float(torch.cat(tokens).mean()) if tokens else 0.0
    return mean if math.isfinite(mean) else None


@torch.inference_mode()
def _divergences(model: PeftModel, features: Mapping[str, Tensor]) -> Tensor:
    """KL(base ‖ version) at each answer token of a batch, in nats, fp32."""
    is_token_BK = features["labels"] != IGNORED
    own_KV = answer_logits(model, features)[is_token_BK].float().log_softmax(-1)
    with model.disable_adapter():
        base_KV = answer_logits(model, features)[is_token_BK].float().log_softmax(-1)
    return kl_div(own_KV, base_KV, reduction="none", log_target=True).sum(-1)


def token_probabilities(
    model: LanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    task: ServedTask,
    inputs: Sequence[str],
    references: Sequence[str],
    on_progress: OnProgress | None = None,
) -> list[float]:
    """Return exp(−L) for every row, L the mean negative log-likelihood of the reference's tokens and its end token.

    This is the geometric mean of the tokens' probabilities, 0 to 1. A reference beyond `task.max_new_tokens` is cut.
    """
    rows = Dataset.from_dict({"input": list(inputs), "output": list(references)})
    measured = _measure_served(model, tokenizer, task, rows, on_progress)
    shares: list[float] = (-measured.mean_loss).exp().nan_to_num(nan=0.0).clamp(max=1.0).tolist()
    return shares


def preferred(
    model: LanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    task: ServedTask,
    rows: Dataset,
    on_progress: OnProgress | None = None,
) -> list[float]:
    """Return for every row whether the model prefers the better answer (output) to the worse one (rejected).

    It does so if log p(better) − log p(worse) is larger than the untouched base model's: 1, else 0; 0.5 if both are
    equal. This is the accuracy of DPO's implicit reward (arXiv 2305.18290) with the base model as the reference, so a
    version is compared with any other one, and the base model itself has 0.5. Answers beyond `task.max_new_tokens` are
    cut.
    """
    both = Dataset.from_dict({"input": [*rows["input"]] * 2, "output": [*rows["output"], *rows[REJECTED.name]]})
    num_read = 0

    def report(num_answers: int) -> None:
        nonlocal num_read
        before, num_read = num_read // READS_OF_PREFERENCE, num_read + num_answers
        if on_progress is not None:
            on_progress(num_read // READS_OF_PREFERENCE - before)

    def margins() -> list[float]:
        better_N, worse_N = _measure_served(model, tokenizer, task, both, report).loss_N.view(2, -1)
        margins_N: list[float] = (worse_N - better_N).tolist()
        return margins_N

    if not isinstance(model, PeftModel):
        report(READS_OF_PREFERENCE * len(rows))
        return [0.5] * len(rows)
    of_version = margins()
    with model.disable_adapter():
        of_base = margins()
    return [0.5 if own == base else float(own > base) for own, base in zip(of_version, of_base, strict=True)]


def _measure_served(
    model: LanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    task: ServedTask,
    rows: Dataset,
    on_progress: OnProgress | None,
) -> MeasuredAnswers:
    return measure(
        model,
        tokenizer,
        task.schema,
        rows,
        max_prompt_tokens=task.max_prompt_tokens,
        max_answer_tokens=task.max_new_tokens + 1,  # with the end token
        on_progress=on_progress,
    )
