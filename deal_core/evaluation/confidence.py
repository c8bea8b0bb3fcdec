"""How sure a model was of an answer, recorded while it generates. The answer does not change.

Shapes: B rows of a batch, V vocabulary, U distinct first tokens of the labels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedTokenizerBase

from deal_core.data.prompts import encode_answer
from deal_core.data.schema import TaskSchema, label_key


class Confidence(NamedTuple):
    """How sure a model was of one answer, 0 to 1. The numbers are not calibrated."""

    confidence: float
    """Task with labels: the share of the answer's label among the labels' first tokens, at the first answer token. An
    answer that is no label has the largest share. Labels with the same first token share one number. Free text: the
    mean probability of the answer's tokens, with its end token."""
    label_mass: float | None
    """Probability of all labels' first tokens together, at the first answer token; None: the task has no labels."""


class ConfidenceRecorder(LogitsProcessor):
    """Looks at the scores of each new token in greedy generation, and returns them unchanged.

    It has to be the last processor, so that the largest score is that of the chosen token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, task: TaskSchema) -> None:
        # the first token of an answer does not depend on the limit, which must only leave room for the end token
        first = [encode_answer(tokenizer, task, label, 2)[0] for label in task.labels]
        self._tokens = sorted(set(first))
        self._place = {label_key(label): self._tokens.index(token)
                       for label, token in zip(task.labels, first, strict=True)}  # fmt: skip
        self._end = tokenizer.eos_token_id
        self.begin()

    def begin(self) -> None:
        """Forget the batch before."""
        self._log_probs_BU: Tensor | None = None
        self._chosen_B: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Record one step; scores has shape (B, V)."""
        del input_ids
        if not self._tokens:
            self._chosen_B.append((scores.amax(-1).float() - scores.float().logsumexp(-1)).exp())
        elif self._log_probs_BU is None:
            tokens = torch.tensor(self._tokens, device=scores.device)
            self._log_probs_BU = scores[:, tokens].float() - scores.float().logsumexp(-1, keepdim=True)
        return scores

    def confidences(self, tokens: Sequence[Sequence[int]], answers: Sequence[str]) -> list[Confidence]:
        """Return the confidence of every row of the batch, from its new tokens and its answer as text."""
        if not self._tokens:
            chosen = torch.stack(self._chosen_B, 1).tolist()
            return [self._of_text(shares, new) for shares, new in zip(chosen, tokens, strict=True)]
        assert self._log_probs_BU is not None
        shares = self._log_probs_BU.softmax(-1).tolist()
        masses = self._log_probs_BU.exp().sum(-1).tolist()
        return [
            Confidence(_share(row[self._place[key]] if (key := label_key(answer)) in self._place else max(row)),
                       _share(mass))
            for row, mass, answer in zip(shares, masses, answers, strict=True)
        ]  # fmt: skip

    def _of_text(self, shares: Sequence[float], new: Sequence[int]) -> Confidence:
        ends = [place for place, token in enumerate(new) if token == self._end]
        own = shares[: ends[0] + 1] if ends else shares[: len(new)]
        return Confidence(_share(math.fsum(own) / len(own)), None)


def _share(value: float) -> float:
    """A number from 0 to 1. A damaged model's NaN is 0."""
    return 0.0 if math.isnan(value) else min(1.0, max(0.0, value))
