"""Answers and label scores of a cell, packed for its file. From them a cell's figures can be derived in other ways.

Shapes: N test rows, L labels.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from deal_core.evaluation.metrics import number_labels, plain_answer


@dataclass(frozen=True, kw_only=True)
class LabelledAnswers:
    """The answers of one version to one labelled task.

    Attributes:
        labels: The task's labels.
        targets_N: Number of each row's right label.
        answers: Each row's answer: the number of a label, or another text.
        log_probs_NL: log p(label | prompt).
    """

    labels: tuple[str, ...]
    targets_N: NDArray[np.int64]
    answers: tuple[int | str, ...]
    log_probs_NL: NDArray[np.float64]

    def texts(self) -> list[str]:
        """The answers as texts."""
        return [self.labels[answer] if isinstance(answer, int) else answer for answer in self.answers]


def pack_answers(
    answers: Sequence[str], references: Sequence[str], labels: Sequence[str], log_probs_NL: Tensor
) -> dict[str, Any]:
    """Return JSON values. Log-probabilities are half-precision floats in base64, row by row: three digits are kept."""
    numbers = number_labels(labels)
    half_NL = log_probs_NL.clamp(min=-6e4).numpy().astype("<f2")
    return {
        "labels": list(labels),
        "targets": [numbers[plain_answer(reference)] for reference in references],
        "answers": [numbers.get(plain_answer(answer), answer) for answer in answers],
        "log_probs": base64.b64encode(half_NL.tobytes()).decode(),
    }


def unpack_answers(score: Mapping[str, Any]) -> LabelledAnswers | None:
    """Read back what `pack_answers` wrote; None if a cell has no such values, as an open task or an old cell."""
    if "log_probs" not in score:
        return None
    flat = np.frombuffer(base64.b64decode(score["log_probs"]), "<f2").astype(np.float64)
    return LabelledAnswers(
        labels=tuple(score["labels"]),
        targets_N=np.array(score["targets"], dtype=np.int64),
        answers=tuple(score["answers"]),
        log_probs_NL=flat.reshape(len(score["targets"]), len(score["labels"])),
    )
