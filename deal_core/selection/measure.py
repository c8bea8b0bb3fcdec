"""One teacher-forced pass of a model over rows: how likely it finds each row's answer.

Shapes: N rows, B rows of a batch, K tokens of the longest answer, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerBase

from deal_core.config import EvaluateConfig, TrainConfig
from deal_core.data.collate import IGNORED, answer_collator, answer_logits, encode_row
from deal_core.data.schema import TaskSchema
from deal_core.evaluation.generation import MAX_LOGIT_BYTES, LanguageModel, batches_by_length, device_of

CHUNK_ROWS = 512
"""Rows whose tokens are in memory at once. Batches of similar length are made within a chunk."""


@dataclass(frozen=True, kw_only=True)
class MeasuredAnswers:
    """What a model makes of every row's answer; float64 on the CPU.

    Attributes:
        loss_N: -log of the answer's probability, summed over its tokens, in nats.
        num_tokens_N: Tokens of the answer, the end token included.
        num_hits_N: Answer tokens that are the likeliest ones.
        gradient_N: Norm of the gradient of the summed loss with respect to the logits.
    """

    loss_N: Tensor
    num_tokens_N: Tensor
    num_hits_N: Tensor
    gradient_N: Tensor

    @property
    def mean_loss(self) -> Tensor:
        """Loss per answer token, shape (N,)."""
        return self.loss_N / self.num_tokens_N

    @property
    def failure_rate(self) -> Tensor:
        """1 - the answer's probability, shape (N,)."""
        return -torch.expm1(-self.loss_N)


@dataclass(frozen=True, kw_only=True)
class ReadBatch:
    """What a model makes of every answer token of a batch; on the model's device.

    Attributes:
        rows: Numbers of the batch's rows.
        losses_BK: -log of a token's probability, in nats, float64; computed from logits in fp32.
        hits_BK: Whether a token is the likeliest one.
        squares_BK: ‖softmax(logits) − onehot(token)‖², float64: the squared gradient of its loss in the logits.
        is_token_BK: Whether there is a token. The tokens of a row have their order.
    """

    rows: list[int]
    losses_BK: Tensor
    hits_BK: Tensor
    squares_BK: Tensor
    is_token_BK: Tensor


def measure(
    model: LanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    task: TaskSchema,
    rows: Dataset,
    train: TrainConfig,
    on_progress: Callable[[int], None] | None = None,
) -> MeasuredAnswers:
    """Read every row once and measure its answer. Rows are tokenised, cut and padded as in training.

    The memory does not depend on the number of rows, except for four numbers a row. A row's figures depend on the
    other rows by rounding only: the batches of a chunk are made of rows of similar length.

    Args:
        model: The base model, with or without an adapter.
        tokenizer: The base model's tokenizer.
        task: How a row becomes a prompt.
        rows: The rows, columns input and output.
        train: Limits of prompts and answers.
        on_progress: Called with the number of rows just read.
    """
    found_N4 = torch.zeros(len(rows), 4, dtype=torch.float64)
    for read in read_answers(model, tokenizer, task, rows, train, on_progress):
        figures = (read.losses_BK, read.is_token_BK.double(), read.hits_BK.double(), read.squares_BK)
        found_N4[read.rows] = torch.stack([each_BK.sum(1) for each_BK in figures], 1).cpu()
    loss_N, num_tokens_N, num_hits_N, squares_N = found_N4.unbind(1)
    return MeasuredAnswers(
        loss_N=loss_N, num_tokens_N=num_tokens_N.clamp(min=1), num_hits_N=num_hits_N, gradient_N=squares_N.sqrt()
    )


@torch.inference_mode()
def read_answers(
    model: LanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    task: TaskSchema,
    rows: Dataset,
    train: TrainConfig,
    on_progress: Callable[[int], None] | None = None,
) -> Iterator[ReadBatch]:
    """Read every row once, with its answer given. See `measure` for the arguments."""
    model.eval()
    collate = answer_collator(model, tokenizer, is_recomputed=False)
    for start in range(0, len(rows), CHUNK_ROWS):
        chunk = rows[start : start + CHUNK_ROWS]
        encoded = [
            encode_row(
                {"input": text, "output": answer}, tokenizer, task,
                max_prompt_tokens=train.max_prompt_tokens, max_answer_tokens=train.max_answer_tokens,
            )
            for text, answer in zip(chunk["input"], chunk["output"], strict=True)
        ]  # fmt: skip
        longest = max(len(row["answer_ids"]) for row in encoded)
        max_rows = max(1, MAX_LOGIT_BYTES // (12 * longest * model.config.vocab_size))
        lengths = [row["length"] for row in encoded]
        for batch in batches_by_length(lengths, EvaluateConfig().max_batch_tokens, max_rows):
            features = {
                name: value.to(device_of(model)) for name, value in collate([encoded[i] for i in batch]).items()
            }
            labels_BK, logits_BKV = features["labels"], answer_logits(model, features).float()
            losses_BK = cross_entropy(logits_BKV.mT, labels_BK, ignore_index=IGNORED, reduction="none").double()
            is_token_BK = labels_BK != IGNORED
            sums_BK = torch.linalg.vector_norm(logits_BKV.softmax(-1), dim=-1).square()  # Σ p² over the vocabulary
            squares_BK = (sums_BK - 2 * (-losses_BK).exp() + 1).clamp(min=0) * is_token_BK
            hits_BK = (logits_BKV.argmax(-1) == labels_BK) & is_token_BK
            yield ReadBatch(
                rows=[start + i for i in batch], losses_BK=losses_BK, hits_BK=hits_BK, squares_BK=squares_BK,
                is_token_BK=is_token_BK,
            )  # fmt: skip
            if on_progress is not None:
                on_progress(len(batch))
