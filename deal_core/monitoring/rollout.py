"""Judge a rollout: is the candidate worse than the champion on live traffic, and when is that decided?

Every figure is a share of good rows: right, not failed, an answer that is a label, not said to be wrong by a user. A
difference is the candidate's share minus the champion's, in points (0.01), with an interval. Where one of the two has
no such rows, there is no figure.

    shadow: both have answered the same rows, so the rows are paired (`PairedDrop`)
    canary: each has answered other rows, so two shares are compared (Agresti and Caffo, 2000, The American Statistician
            54(4): one right and one wrong row are added to each side)

A rollout is looked at when the candidate has 1/8, 1/4, 1/2 and 1 of the wanted rows, then whenever they have doubled.
Between two looks nothing new is counted. Look k = 0, 1, … may be wrong with (1 − confidence) / ((k + 1)(k + 2)),
divided by the number of figures that the kind of rollout can have. So the sum over all looks and figures is at most
1 − confidence, however often they are asked for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import pandas as pd
from scipy.special import ndtri

from deal_core.data.schema import label_key
from deal_core.evaluation.significance import PairedDrop
from deal_core.judging_config import RolloutKind, RolloutTerms
from deal_core.shown import Shown

FIRST_LOOK = 3
"""The first look has the wanted rows / 2^FIRST_LOOK."""
NUM_FIGURES: dict[RolloutKind, int] = {"shadow": 3, "canary": 4}
"""Most figures that a rollout can have. A number that grows with the first feedback would break the bound, since the
looks before had a greater part of the error."""
Verdict = Literal["goes on", "abort", "finish"]
Figure = Literal["accuracy", "not said to be wrong", "answered", "answers that are labels"]


@dataclass(frozen=True, kw_only=True)
class Arm:
    """What one of the two versions has done since the rollout began."""

    version: Annotated[str, Shown()]
    num_rows: Annotated[int, Shown("rows")]
    """Rows that it was asked."""
    num_failed: Annotated[int, Shown("failed")]
    """Rows on which it failed."""
    num_judged: Annotated[int, Shown("with feedback")]
    """Answers with feedback that says whether they were right."""
    num_right: Annotated[int, Shown("right", unit="%", of="share_right")]
    """Right ones of these."""
    share_no_label: Annotated[float | None, Shown("no label", unit="%")]
    """Share of its answers that are no label; None: no task has labels."""
    confidence: Annotated[float | None, Shown("mean confidence", format=".2f")]
    """Mean confidence of its answers; None: it has none."""
    seconds: Annotated[float | None, Shown("median seconds", format=".2f")]
    """Median seconds of a request. A shadow waits for all other requests."""

    @property
    def share_right(self) -> float | None:
        """Share of the answers with feedback that were right; None: there are none."""
        return self.num_right / self.num_judged if self.num_judged else None


@dataclass(frozen=True, kw_only=True)
class ShareDifference:
    """Candidate minus champion at the last look, in points. Negative is worse."""

    figure: Annotated[Figure, Shown("new version minus champion")]
    points: Annotated[float, Shown(format="+.1f")]
    low: Annotated[float, Shown("from", format="+.1f")]
    """Lower end of the interval around `points`."""
    high: Annotated[float, Shown("to", format="+.1f")]
    num_rows: Annotated[int, Shown("rows")]
    """Rows of the candidate."""
    is_paired: bool
    """Whether both answered the same rows."""
    is_worse: Annotated[bool, Shown("it is", words={True: "worse", False: ""}, is_state=True)]
    """Whether the whole interval is below 0."""


@dataclass(frozen=True, kw_only=True)
class RolloutReport:
    """A rollout so far, and what has to be done."""

    kind: RolloutKind
    champion: Arm
    candidate: Arm
    num_pairs: int
    """Rows that both have answered."""
    agreement: float | None
    """Share of these with the same answer; None: not known."""
    num_counted: int
    """Rows of the candidate that count at the last look; 0: there was no look yet."""
    num_wanted: int
    """Rows of the candidate that have to count."""
    by_feedback: bool
    """Whether these are rows with feedback."""
    differences: tuple[ShareDifference, ...]
    verdict: Verdict
    reasons: tuple[str, ...]


class Look(NamedTuple):
    """A look at the first rows of the candidate."""

    number: int
    """It counts from 0."""
    num_rows: int


def last_look(num_rows: int, wanted: int) -> Look | None:
    """Return the last look that is due with so many rows of the candidate; None: none is.

    Example:
        >>> last_look(120, 200)
        Look(number=2, num_rows=100)
    """
    look, number = None, 0
    while (size := math.ceil(wanted * 2.0 ** (number - FIRST_LOOK))) <= num_rows:
        look, number = Look(number, size), number + 1
    return look


def judge(
    rows: pd.DataFrame, feedback: pd.DataFrame, terms: RolloutTerms, *, champion: str, candidate: str
) -> RolloutReport:
    """Judge a rollout of the version `candidate` while the version `champion` serves.

    `rows` are those of the prediction log since it began, with those of the rollout. `feedback` is as `read_feedback`
    returns it, with the columns id, time, label, is_right, source, is_random and reviewer.
    """
    rows = rows[rows["version"].isin([champion, candidate])].sort_values("time", kind="stable")
    of_shadow = rows["shadow_of"].notna()
    candidate_rows = rows[(rows["version"] == candidate) & (of_shadow == (terms.kind == "shadow"))]
    champion_rows = rows[(rows["version"] == champion) & ~of_shadow]
    by_answer = _by_answer(feedback)
    num_pairs, agree = 0, pd.Series(dtype=bool)
    if terms.kind == "shadow":
        pairs = _pairs(champion_rows, candidate_rows, by_answer)
        judged = pairs[pairs["judged_at"].notna()].sort_values("judged_at")
        num_pairs, agree = len(pairs), pairs["agree"].dropna()
        differences = _of_shadow(pairs, judged, terms)
    else:
        judged = _judged(candidate_rows, by_answer).sort_values("judged_at")
        differences = _of_canary(champion_rows, candidate_rows, _judged(champion_rows, by_answer), judged, terms)
    by_feedback = not judged.empty
    look = last_look(len(judged) if by_feedback else len(candidate_rows), terms.num_rows)
    verdict, reasons = _decide(differences, look, by_feedback, terms)
    return RolloutReport(
        kind=terms.kind,
        champion=_arm(champion, champion_rows, by_answer),
        candidate=_arm(candidate, candidate_rows, by_answer, judged),
        num_pairs=num_pairs,
        agreement=None if agree.empty else float(agree.mean()),
        num_counted=look.num_rows if look else 0,
        num_wanted=terms.num_rows,
        by_feedback=by_feedback,
        differences=tuple(differences),
        verdict=verdict,
        reasons=reasons,
    )


def _decide(
    differences: Sequence[ShareDifference], look: Look | None, by_feedback: bool, terms: RolloutTerms
) -> tuple[Verdict, tuple[str, ...]]:
    worse = tuple(_in_words(difference) for difference in differences if difference.is_worse)
    if worse:
        return "abort", worse
    of_figure = {difference.figure: difference for difference in differences}
    needed: Figure = "accuracy" if by_feedback else "answered"
    if look is None or look.num_rows < terms.num_rows or needed not in of_figure:
        return "goes on", ()
    accuracy = of_figure.get("accuracy")
    if accuracy is not None and -accuracy.points > terms.max_drop_points:
        return "abort", (f"{_in_words(accuracy)}; a loss of {terms.max_drop_points:g} points is allowed",)
    if accuracy is None or not by_feedback:
        return "finish", (
            f"{look.num_rows} answers without feedback: neither more failures nor more answers that are no label",
        )
    return "finish", (_in_words(accuracy),)


def _in_words(difference: ShareDifference) -> str:
    interval = f"({difference.low:+.1f} to {difference.high:+.1f})"
    rows = f"{difference.num_rows} {'paired rows' if difference.is_paired else 'rows'}"
    return f"{difference.figure}: {difference.points:+.1f} points {interval} in {rows}"


def _arm(version: str, rows: pd.DataFrame, by_answer: pd.DataFrame, judged: pd.DataFrame | None = None) -> Arm:
    answered = rows[rows["is_failed"].isna()]
    labelled = answered["is_label"].dropna().astype(bool)
    judged = _judged(rows, by_answer) if judged is None else judged
    return Arm(
        version=version,
        num_rows=len(rows),
        num_failed=len(rows) - len(answered),
        num_judged=len(judged),
        num_right=int(judged["right"].sum()),
        share_no_label=None if labelled.empty else float(1 - labelled.mean()),
        confidence=None if answered.empty else float(answered["confidence"].mean()),
        seconds=None if answered.empty else float(answered["seconds"].median()),
    )


def _by_answer(feedback: pd.DataFrame) -> pd.DataFrame:
    """Feedback by the id of its answer: time, label, is_right and `complaint`.

    A complaint says that the answer was wrong, and nobody asked for it. Whoever reviews answers, or draws some at
    random, chooses how many of each version, so their number says nothing.
    """
    newest = feedback.drop_duplicates("id", keep="last").set_index("id")
    is_asked_for = newest["is_random"].eq(True) | newest["reviewer"].notna() | newest["source"].eq("command")
    return newest[["time", "label", "is_right"]].assign(complaint=newest["is_right"].eq(False) & ~is_asked_for)


def _judged(rows: pd.DataFrame, by_answer: pd.DataFrame) -> pd.DataFrame:
    """Answers with feedback: `judged_at`, the time of the feedback, `right` and `complaint`."""
    names = {"time": "judged_at", "is_right": "right", "complaint": "complaint"}
    judged = rows[["id", "time"]].merge(by_answer[[*names]].rename(columns=names), left_on="id", right_index=True)
    judged = judged[judged["right"].notna()]
    return judged.assign(right=judged["right"].astype(bool))


def _pairs(champion_rows: pd.DataFrame, candidate_rows: pd.DataFrame, by_answer: pd.DataFrame) -> pd.DataFrame:
    """Rows that both have answered, or on which the shadow failed.

    `judged_at` is the time of feedback with a label, on either answer; `before` and `right` tell whether champion and
    candidate had that label. Whether an answer was right says nothing about a different one, so it does not count.
    """
    both = candidate_rows.merge(champion_rows, left_on="shadow_of", right_on="id", suffixes=("", "_before"))
    pairs, entry_of = [], by_answer.to_dict("index")
    for row in both.to_dict("records"):
        entries = [entry_of[name] for name in (row["id_before"], row["id"]) if name in entry_of]
        labelled = next((entry for entry in entries if pd.notna(entry["label"])), None)
        knows = labelled is not None and row["is_label_before"] is not None
        pairs.append(
            {
                "failed": row["is_failed"] is True,
                "agree": _agree(row),
                "is_label": row["is_label"],
                "is_label_before": row["is_label_before"],
                "judged_at": labelled["time"] if labelled is not None and knows else math.nan,
                "right": labelled is not None and _is(row["label"], labelled["label"]),
                "before": labelled is not None and _is(row["label_before"], labelled["label"]),
            }
        )
    columns = ["failed", "agree", "is_label", "is_label_before", "judged_at", "right", "before"]
    return pd.DataFrame(pairs, columns=columns).astype({"judged_at": float, "right": bool, "before": bool})


def _is(label: str | None, right: str) -> bool:
    return label is not None and label_key(label) == label_key(right)


def _agree(row: dict[str, object]) -> bool | None:
    """Whether both gave the same answer; None: not known, since the log keeps no texts."""
    if row["is_failed"] is True:
        return False
    if row["label"] is not None or row["label_before"] is not None:
        return row["label"] == row["label_before"]
    is_known = row["output"] is not None and row["output_before"] is not None
    return row["output"] == row["output_before"] if is_known else None


def _of_shadow(pairs: pd.DataFrame, judged: pd.DataFrame, terms: RolloutTerms) -> list[ShareDifference]:
    differences: list[ShareDifference] = []
    if look := last_look(len(judged), terms.num_rows):
        rows = judged.head(look.num_rows)
        differences.append(_paired("accuracy", rows["before"], rows["right"], _level(look, terms)))
    if look := last_look(len(pairs), terms.num_rows):
        rows, level = pairs.head(look.num_rows), _level(look, terms)
        answered = ~rows["failed"].astype(bool)
        differences.append(_paired("answered", answered | True, answered, level))
        labelled = rows.dropna(subset=["is_label", "is_label_before"])
        if len(labelled):
            differences.append(
                _paired("answers that are labels", labelled["is_label_before"], labelled["is_label"], level)
            )
    return differences


def _of_canary(
    champion_rows: pd.DataFrame,
    candidate_rows: pd.DataFrame,
    champion_judged: pd.DataFrame,
    judged: pd.DataFrame,
    terms: RolloutTerms,
) -> list[ShareDifference]:
    compared: list[tuple[Figure, pd.Series, pd.Series, float]] = []
    if look := last_look(len(judged), terms.num_rows):
        level, rows = _level(look, terms), judged.head(look.num_rows)
        until = rows["judged_at"].max()
        others = champion_judged[champion_judged["judged_at"] <= until]
        compared.append(("accuracy", others["right"], rows["right"], level))
        before, now = _not_wrong(champion_rows, others, until), _not_wrong(candidate_rows, rows, until)
        compared.append(("not said to be wrong", before, now, level))
    if look := last_look(len(candidate_rows), terms.num_rows):
        level, rows = _level(look, terms), candidate_rows.head(look.num_rows)
        others = champion_rows[champion_rows["time"] <= rows["time"].max()]
        compared.append(("answered", others["is_failed"].isna(), rows["is_failed"].isna(), level))
        before, now = (side["is_label"].dropna().astype(bool) for side in (others, rows))
        compared.append(("answers that are labels", before, now, level))
    return [
        _unpaired(figure, before, now, level) for figure, before, now, level in compared if len(before) and len(now)
    ]


def _not_wrong(rows: pd.DataFrame, judged: pd.DataFrame, until: float) -> pd.Series:
    """Which answers up to a time no complaint says to be wrong."""
    return ~rows.loc[rows["time"] <= until, "id"].isin(judged.loc[judged["complaint"], "id"])


def _level(look: Look, terms: RolloutTerms) -> float:
    return 1 - (1 - terms.confidence) / ((look.number + 1) * (look.number + 2) * NUM_FIGURES[terms.kind])


def _paired(figure: Figure, before: pd.Series, now: pd.Series, level: float) -> ShareDifference:
    drop = PairedDrop.of(before.astype(float).tolist(), now.astype(float).tolist())
    middle = -100 * drop.total / (drop.num_rows + 2)
    return _difference(figure, 0.0 - drop.points, middle, drop.noise(level), drop.num_rows, is_paired=True)


def _unpaired(figure: Figure, before: pd.Series, now: pd.Series, level: float) -> ShareDifference:
    """Compare two shares of good rows, by the interval of Agresti and Caffo. Both sides have rows."""
    sides = [(int(side.sum()), len(side)) for side in (before, now)]
    (first, first_rows), (second, second_rows) = (((good + 1) / (number + 2), number + 2) for good, number in sides)
    deviation = math.sqrt(first * (1 - first) / first_rows + second * (1 - second) / second_rows)
    middle, noise = 100 * (second - first), 100 * float(ndtri(level)) * deviation
    raw = [good / number for good, number in sides]
    return _difference(figure, 100 * (raw[1] - raw[0]), middle, noise, sides[1][1], is_paired=False)


def _difference(
    figure: Figure, points: float, middle: float, noise: float, num_rows: int, *, is_paired: bool
) -> ShareDifference:
    return ShareDifference(
        figure=figure,
        points=points,
        low=middle - noise,
        high=middle + noise,
        num_rows=num_rows,
        is_paired=is_paired,
        is_worse=middle + noise < 0,
    )
