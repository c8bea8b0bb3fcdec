"""The accuracy of answers without right answers, from how sure a model was of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class AboveThreshold(NamedTuple):
    """Rows with a confidence at or above a threshold."""

    num_reference: int
    num_live: int


def above_threshold(reference: Sequence[float], num_right: int, live: Sequence[float]) -> AboveThreshold:
    """Count the rows whose confidence speaks for a right answer: Average Thresholded Confidence (arXiv 2201.04234).

    The threshold is chosen so that the share of reference rows below it is the error rate there. The estimate of the
    live accuracy is the reference's accuracy minus the drop in the share of rows at or above the threshold. Without
    ties this is the share itself, which is ATC.

    Limits: it sees only errors that lower the confidence. A model that is confidently wrong on new inputs, or labels
    whose meaning has changed, leave it unchanged. If all confidences fall alike, it falls further than the accuracy. No
    estimate of this kind is right for every shift.

    Args:
        reference: The confidences of the reference rows.
        num_right: Number of right answers among them, at least one.
        live: The confidences of the rows without right answers.
    """
    threshold = sorted(reference)[len(reference) - num_right]
    return AboveThreshold(*(sum(confidence >= threshold for confidence in side) for side in (reference, live)))
