"""The loss of a training batch: cross-entropy of answers, or preference of one answer over another (DPO).

Shapes: B rows of a batch, K tokens of the longest answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid
from transformers import PreTrainedTokenizerBase

from deal_core.base_model.language_model import LanguageModel
from deal_core.config import TrainConfig
from deal_core.data.collate import (
    IGNORED,
    REFERENCE_MARGINS,
    REJECTED_IDS,
    AnswerCollator,
    summed_loss,
)
from deal_core.data.prompts import encode_answer
from deal_core.data.schema import REJECTED, TaskSchema
from deal_core.evaluation.likelihood import measure


@dataclass(frozen=True)
class AnswerLoss:
    """Cross-entropy of the answers' tokens."""

    def loss_sum(self, logits_BKV: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        """The sum over a collated batch, from a model's logits for its labels."""
        return summed_loss(logits_BKV, inputs["labels"])

    def weight(self, batches: Sequence[Mapping[str, Tensor]]) -> Tensor:
        """Number of the answers' tokens in collated batches."""
        return torch.stack([batch["labels"].ne(IGNORED).sum() for batch in batches]).sum()


@dataclass(frozen=True)
class PreferenceLoss:
    """−log σ(β·(m − m_parent)), summed over rows; m = log p(better answer) − log p(worse answer).

    This is direct preference optimisation (DPO, arXiv 2305.18290) with the parent version as the reference; before a
    lineage's first arrival it is the base model. p is the probability of a whole answer with its end token.
    """

    beta: float

    def loss_sum(self, logits_CKV: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        """The sum over a collated batch, from a model's logits for its labels. A row without answers counts 0."""
        gain_B = margins(logits_CKV, inputs["labels"]) - inputs[REFERENCE_MARGINS].to(inputs["labels"].device)
        return -(logsigmoid(self.beta * gain_B) * _are_pairs(inputs)).sum()

    def weight(self, batches: Sequence[Mapping[str, Tensor]]) -> Tensor:
        """Number of rows with answers in collated batches."""
        return torch.stack([_are_pairs(batch).sum() for batch in batches]).sum()


Objective = AnswerLoss | PreferenceLoss
"""A loss that is a sum over the batch, divided by the weight of all batches of a step; the weight may be 0."""


class PairCollator:
    """Pads a batch of preferences: first the rows with their better answers, then the same rows with the worse ones."""

    def __init__(self, collate: AnswerCollator) -> None:
        self._collate = collate

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return what `AnswerCollator` returns for 2B rows, and REFERENCE_MARGINS (B)."""
        worse = [{**row, "answer_ids": row[REJECTED_IDS]} for row in rows]
        batch = self._collate([*rows, *worse])
        margins_B = torch.tensor([row[REFERENCE_MARGINS] for row in rows], dtype=torch.float32)
        return {**batch, REFERENCE_MARGINS: margins_B}


def margins(logits_CKV: Tensor, labels_CK: Tensor) -> Tensor:
    """Return log p(better answer) − log p(worse answer) for a batch of `PairCollator`, in nats, shape (B,); C = 2B."""
    losses_C = cross_entropy(logits_CKV.float().mT, labels_CK, ignore_index=IGNORED, reduction="none").sum(1)
    better_B, worse_B = losses_C.chunk(2)
    return worse_B - better_B


def add_preferences(
    encoded: Dataset,
    rows: Dataset,
    model: LanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    task: TaskSchema,
    train: TrainConfig,
) -> Dataset:
    """Add to encoded rows the tokens of the worse answers, and the margins of a model as it is now.

    The model reads both answers of `rows` once. `length` then counts the worse answer too.
    """
    worse = [encode_answer(tokenizer, task, text, train.answer_tokens(task.labels)) for text in rows[REJECTED.name]]
    lengths = [length + len(ids) for length, ids in zip(encoded["length"], worse, strict=True)]
    worse_rows = rows.select_columns(["input", REJECTED.name]).rename_column(REJECTED.name, "output")
    better_N, worse_N = (
        measure(
            model,
            tokenizer,
            task,
            answers,
            max_prompt_tokens=train.max_prompt_tokens,
            max_answer_tokens=train.answer_tokens(task.labels),
        ).loss_N
        for answers in (rows, worse_rows)
    )
    encoded = encoded.remove_columns("length").add_column("length", lengths).add_column(REJECTED_IDS, worse)
    return encoded.add_column(REFERENCE_MARGINS, (worse_N - better_N).tolist())


def describe_preferences(encoded: Dataset) -> str:
    """A note about the preferences of an arrival."""
    num_right = sum(margin > 0 for margin in encoded[REFERENCE_MARGINS])
    note = f"preferences (DPO): before, the better answer was the likelier one in {num_right} of {len(encoded)} rows"
    same = sum(better == worse for better, worse in zip(encoded["answer_ids"], encoded[REJECTED_IDS], strict=True))
    if same:
        note += f"; in {same} rows both are the same up to train.max_answer_tokens, so these teach nothing"
    return note


def _are_pairs(inputs: Mapping[str, Tensor]) -> Tensor:
    """Which rows (B) have answers: a row that fills up a batch has none."""
    return inputs["labels"].ne(IGNORED).any(1).chunk(2)[0]
