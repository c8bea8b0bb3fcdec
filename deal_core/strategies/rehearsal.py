"""Rehearsal: while a new task is learned, every step also has a few rows of old tasks.

Shapes: B rows, K tokens of the longest answer, V vocabulary, N most likely tokens that a target keeps.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from deal_core.data.collate import IGNORED, AnswerCollator, answer_logits

NUM_KEPT = 64
"""Number of most likely tokens that a target keeps; the remaining probability counts as one more token."""
ROWS_PER_BATCH = 16
"""Rows that a model reads together for their targets."""
TINY = 1e-6


@dataclass(frozen=True)
class RehearsedRow:
    """A row of an old task: a prompt, an answer, and the target distribution at the answer's tokens.

    Attributes:
        prompt_ids: Tokens of the prompt.
        answer_ids: The K tokens of the answer.
        tokens_KN: The most likely tokens at each position of the answer; None: the answer alone is the target.
        shares_KN: The probabilities of `tokens_KN`.
    """

    prompt_ids: Sequence[int]
    answer_ids: Sequence[int]
    tokens_KN: Tensor | None = None
    shares_KN: Tensor | None = None

    def with_target(self, shares_KV: Tensor) -> RehearsedRow:
        """Return the row with a distribution over the vocabulary at each token of its answer as its target."""
        top = shares_KV.topk(min(NUM_KEPT, shares_KV.shape[-1]), dim=-1)
        return replace(self, tokens_KN=top.indices.cpu(), shares_KN=top.values.cpu())


class RehearsedShare(NamedTuple):
    """The rehearsed rows of a step that one process reads."""

    rows: Sequence[RehearsedRow]
    weight: float
    """Factor of their summed loss."""


class Rehearsal:
    """Chooses a few rows for every step and gives their loss.

    The old tasks take turns, so all get an equal share of the rows. The step's number alone decides its rows, so a
    resumed run has the same ones. When all rows of a task were used, the task starts again.

    Args:
        sets: One set of rows per old task. Empty sets are ignored.
        collate: Pads rows to a batch.
        num_rows: Rows per step.
        weight: Weight of the rows' loss.
        temperature: T: softens both distributions; the loss is multiplied by T².
        seed: Seed of the order.
    """

    def __init__(
        self,
        sets: Sequence[Sequence[RehearsedRow]],
        collate: AnswerCollator,
        *,
        num_rows: int,
        weight: float = 1.0,
        temperature: float = 1.0,
        seed: int,
    ) -> None:
        self.sets = shuffled(sets, random.Random(seed))
        self._collate = collate
        self._num_rows = num_rows
        self._weight = weight
        self._temperature = temperature

    def describe(self) -> str:
        """Return a note for people: the number of rows."""
        num_rows, num_tasks = sum(map(len, self.sets)), len(self.sets)
        tasks = "one old task" if num_tasks == 1 else f"{num_tasks} old tasks"
        return f"rehearsed {num_rows} rows of {tasks}, {self._num_rows} a step"

    def draw(self, step: int) -> list[RehearsedRow]:
        """Return the rows of a step, counted from 0."""
        if not self.sets:
            return []
        return [self.at(place) for place in range(step * self._num_rows, (step + 1) * self._num_rows)]

    def at(self, place: int) -> RehearsedRow:
        """Return the row at a place of the order that the steps go through."""
        again, task = divmod(place, len(self.sets))
        return self.sets[task][again % len(self.sets[task])]

    def loss(self, model: nn.Module, step: int, *, rank: int = 0, num_processes: int = 1) -> Tensor | None:
        """Return the loss of a step's rows, which the model reads by themselves; None if there are none."""
        share = self.share(step, rank=rank, num_processes=num_processes)
        return None if share is None else self.loss_of(share, read(model, self._collate, share.rows))

    def share(self, step: int, *, rank: int = 0, num_processes: int = 1) -> RehearsedShare | None:
        """Return the rows of a step that a process reads; None if there are none.

        Several processes divide the rows. The mean of their losses equals the loss of a single process.
        """
        drawn = self.draw(step)
        if not drawn:
            return None
        # every process must take part in a step: one without a row takes the first row with weight 0
        share = num_processes if rank < len(drawn) else 0
        num_tokens = sum(len(row.answer_ids) for row in drawn)
        return RehearsedShare(drawn[rank::num_processes] or drawn[:1], self._weight * share / num_tokens)

    def beside(self, inputs: Mapping[str, Tensor], rows: Sequence[RehearsedRow]) -> dict[str, Tensor]:
        """Return a collated batch with these rows after its own. It has no shared prefix."""
        batch, device = self._collate([vars(row) for row in rows]), inputs["labels"].device
        return self._collate.joined(inputs, {name: value.to(device) for name, value in batch.items()})

    def loss_of(self, share: RehearsedShare, logits: Iterable[tuple[RehearsedRow, Tensor, Tensor]]) -> Tensor:
        """Return weight·T²·KL(target ‖ model) per answer token, or cross-entropy if only an answer is known.

        Args:
            share: The rows.
            logits: Each row with a model's logits at its answer (K×V, fp32) and the answer's tokens (K).
        """
        losses = [self._row_loss(logits_KV, labels_K, row) for row, logits_KV, labels_K in logits]
        return share.weight * torch.stack(losses).sum()

    def _row_loss(self, logits_KV: Tensor, labels_K: Tensor, row: RehearsedRow) -> Tensor:
        if row.tokens_KN is None or row.shares_KN is None:
            return cross_entropy(logits_KV, labels_K, ignore_index=IGNORED, reduction="sum")
        tokens_KN, shares_KN = row.tokens_KN.to(logits_KV.device), row.shares_KN.to(logits_KV.device)
        log_model_KN = (logits_KV / self._temperature).log_softmax(-1).gather(-1, tokens_KN)
        rest_model_K = (1 - log_model_KN.exp().sum(-1)).clamp_min(TINY)
        rest_K = (1 - shares_KN.sum(-1)).clamp_min(TINY)
        kept = (shares_KN * (shares_KN.clamp_min(TINY).log() - log_model_KN)).sum()
        rest = (rest_K * (rest_K.log() - rest_model_K.log())).sum()
        return self._temperature**2 * (kept + rest)


def shuffled(sets: Sequence[Sequence[RehearsedRow]], generator: random.Random) -> list[list[RehearsedRow]]:
    """Return the sets in another order, and the rows of each; without empty sets."""
    result = [generator.sample(rows, len(rows)) for rows in sets if rows]
    generator.shuffle(result)
    return result


@torch.no_grad()
def with_model_targets(
    model: nn.Module,
    collate: AnswerCollator,
    rows: Sequence[RehearsedRow],
    target: Callable[[Tensor, Tensor], Tensor],
) -> list[RehearsedRow]:
    """Return the rows with targets that a model's logits give, in their order.

    Args:
        model: It reads the rows, some of them together.
        collate: Pads rows to a batch.
        rows: The rows, with their answers.
        target: The distribution (K×V) for the logits (K×V, fp32) and the tokens (K) of an answer.
    """
    model.eval()
    targets: dict[int, RehearsedRow] = {}
    for start in range(0, len(rows), ROWS_PER_BATCH):
        for row, logits_KV, labels_K in read(model, collate, rows[start : start + ROWS_PER_BATCH]):
            targets[id(row)] = row.with_target(target(logits_KV, labels_K))
    return [targets[id(row)] for row in rows]


def read(
    model: nn.Module, collate: AnswerCollator, rows: Sequence[RehearsedRow]
) -> Iterator[tuple[RehearsedRow, Tensor, Tensor]]:
    """Yield each row with the model's logits at its answer (K×V, fp32), and the answer's tokens (K) on the device."""
    device = next(model.parameters()).device
    for group in _sharing_prefix(rows, collate.min_prefix) if collate.shares_prefix else [rows]:
        inputs = {name: value.to(device) for name, value in collate([vars(row) for row in group]).items()}
        yield from at_answers(group, answer_logits(model, inputs), inputs)


def _sharing_prefix(rows: Sequence[RehearsedRow], min_prefix: int) -> list[list[RehearsedRow]]:
    """Split the rows of several tasks into batches that each share a prefix; rows that share none are one batch."""
    by_start: dict[tuple[int, ...], list[RehearsedRow]] = {}
    for row in rows:
        by_start.setdefault(tuple(row.prompt_ids[:min_prefix]), []).append(row)
    single = [row for group in by_start.values() if len(group) == 1 for row in group]
    return [*(group for group in by_start.values() if len(group) > 1), *([single] if single else [])]


def at_answers(
    rows: Sequence[RehearsedRow], logits_BKV: Tensor, inputs: Mapping[str, Tensor]
) -> Iterator[tuple[RehearsedRow, Tensor, Tensor]]:
    """Yield the last rows of a collated batch, each with the logits at its answer (fp32) and the answer's tokens."""
    is_right = "position_ids" in inputs  # answers of a decoder-only model end at the right edge
    own = slice(len(logits_BKV) - len(rows), None)
    for row, logits_KV, labels_K in zip(rows, logits_BKV[own].float(), inputs["labels"][own], strict=True):
        length = len(row.answer_ids)
        part = slice(-length, None) if is_right else slice(0, length)
        yield row, logits_KV[part], labels_K[part]
