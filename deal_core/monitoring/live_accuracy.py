"""The accuracy of live answers: estimated from confidences, or measured by feedback."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd

from deal_core.monitoring.report import LiveAccuracy
from deal_core.monitoring.two_samples import share_grew, wilson


class Hits(NamedTuple):
    """Right answers among rows."""

    num_right: int
    num_rows: int


def hits(scores: pd.Series) -> Hits | None:
    """Count the right answers; None: there are no scores, or some are neither 0 nor 1."""
    known = scores.dropna()
    if known.empty or not known.isin([0.0, 1.0]).all():
        return None
    return Hits(int(known.sum()), len(known))


def estimated_accuracy(reference: pd.DataFrame, live: pd.DataFrame) -> LiveAccuracy | None:
    """Estimate the accuracy of live rows without labels, by Average Thresholded Confidence (ATC, arXiv 2201.04234).

    A threshold is chosen so that the share of reference rows with a lower confidence is the error rate there. The
    estimate is the reference's accuracy minus the drop in the share of rows at or above the threshold. Without ties
    this is the share itself, which is ATC.

    Limits: it sees only errors that lower the confidence. A model that is confidently wrong on new inputs, or labels
    whose meaning has changed, leave it unchanged. If all confidences fall alike, it falls further than the accuracy. No
    estimate of this kind is right for every shift.

    None: the scores are graded, no reference answer is right, or a confidence is missing on one side.
    """
    known = reference.dropna(subset=["confidence", "score"])
    right, confidences = hits(known["score"]), live["confidence"].dropna()
    if right is None or not right.num_right or confidences.empty:
        return None
    threshold = known["confidence"].sort_values().iloc[right.num_rows - right.num_right]
    above = Hits(int((known["confidence"] >= threshold).sum()), right.num_rows)
    live_above = Hits(int((confidences >= threshold).sum()), len(confidences))
    shift = right.num_right / right.num_rows - above.num_right / above.num_rows
    return _against(live_above, above, shift)


def measured_accuracy(reference: pd.DataFrame, live: pd.DataFrame, feedback: pd.DataFrame, num_rows: int
                      ) -> LiveAccuracy | None:  # fmt: skip
    """Measure the accuracy of live rows by feedback on rows that were chosen at random.

    Other feedback does not count: people report errors more often than right answers. An answer's newest feedback
    counts, and the newest `num_rows` answers with feedback. None: there is no such feedback.
    """
    chosen = feedback[feedback["is_random"].fillna(False).astype(bool) & feedback["is_right"].notna()]
    newest = chosen.sort_values("time", kind="stable").drop_duplicates("id", keep="last")
    judged = newest.merge(live[["id"]].drop_duplicates(), on="id").tail(num_rows)
    if judged.empty:
        return None
    return _against(Hits(int(judged["is_right"].astype(bool).sum()), len(judged)), hits(reference["score"]), 0.0)


def _against(live: Hits, reference: Hits | None, shift: float) -> LiveAccuracy:
    """Compare two shares; `shift` is added to both, and to the ends of the interval."""
    ends = (live.num_right / live.num_rows, *wilson(live.num_right, live.num_rows))
    accuracy, low, high = (float(np.clip(end + shift, 0.0, 1.0)) for end in ends)
    if reference is None:
        return LiveAccuracy(accuracy=accuracy, low=low, high=high, num_rows=live.num_rows)
    wrong = reference.num_rows - reference.num_right
    grew = share_grew(wrong, reference.num_rows, live.num_rows - live.num_right, live.num_rows)
    return LiveAccuracy(
        accuracy=accuracy, low=low, high=high, num_rows=live.num_rows,
        reference=reference.num_right / reference.num_rows + shift, drop_points=100 * grew.effect, p_value=grew.p_value,
    )  # fmt: skip
