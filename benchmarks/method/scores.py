"""Scores after papers, by which `selection.score` chooses rows. `benchmarks/entry_points.txt` lists them.

Shapes: N candidate rows. p is the probability of a row's whole answer under the parent, its tokens given one after
another (teacher forcing). -log p is the sum over the K tokens of the answer, the end token included.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from deal_core.evaluation.likelihood import MeasuredAnswers
from deal_core.limits import Positive, Share, require, settings
from deal_core.selection.score import Candidates, RowScore

UNDECIDED = (0.1, 0.9)
"""A row whose difficulty lies outside is answered rightly, or wrongly, almost always."""


def measured_of(candidates: Candidates) -> MeasuredAnswers:
    """What the parent makes of the rows."""
    assert candidates.measured is not None, "a score that reads the model gets what was measured"
    return candidates.measured


@settings("selection.score_options")
class PickOptions:
    """Options of every score here: which of its numbers are taken."""

    pick: Literal["high", "low", "band", "weighted"] = "high"
    """high, low: the largest or smallest. band: those between the quantiles of `band`, at random. weighted: at random,
    with probabilities in proportion to exp(score / temperature)."""
    band: tuple[Share, Share] = (0.25, 0.75)
    """Smallest and largest quantile of `pick: band`."""
    temperature: Positive = 1.0
    """τ of `pick: weighted`. A small one takes the rows with the largest scores."""

    def __post_init__(self) -> None:
        require(
            self.band[0] < self.band[1],
            f"selection.score_options.band is {self.band}; give the smaller quantile first.",
        )


class PickedScore(RowScore):
    """A score whose rows are taken by `pick`. Quantiles are those of the rows of a label."""

    Options: ClassVar[type[Any] | None] = PickOptions

    def score(self, candidates: Candidates) -> Tensor:
        """Return numbers of which the largest are those that `pick` takes."""
        numbers_N, options = self.numbers(candidates).double(), self.options
        generator = torch.Generator().manual_seed(candidates.seed)
        if options.pick == "low":
            return -numbers_N
        if options.pick == "weighted":  # the largest of these sums are a sample without replacement (Gumbel top-k)
            uniform_N = torch.rand(len(numbers_N), generator=generator, dtype=torch.float64).clamp_min(1e-300)
            return numbers_N / options.temperature - torch.log(-torch.log(uniform_N))
        if options.pick == "band":
            labels = candidates.rows["output"] if candidates.task.labels else [""] * len(numbers_N)
            return band_scores(numbers_N, labels, options.band, generator)
        return numbers_N

    def numbers(self, candidates: Candidates) -> Tensor:
        """Return the score's own numbers, shape (N,)."""
        raise NotImplementedError


def failure_rate(measured: MeasuredAnswers) -> Tensor:
    """1 - the answer's probability, shape (N,)."""
    return -torch.expm1(-measured.loss_N)


def band_scores(
    numbers_N: Tensor, labels: Sequence[Any], band: tuple[float, float], generator: torch.Generator
) -> Tensor:
    """Return minus each row's distance to the band of quantiles of its label; in the band a random number above 0."""
    scores_N = torch.rand(len(numbers_N), generator=generator, dtype=torch.float64)
    low, high = band
    for label in set(labels):
        places = torch.tensor([place for place, other in enumerate(labels) if other == label])
        rank_n = numbers_N[places].argsort(stable=True).argsort()
        quantile_n = (rank_n.double() + 0.5) / len(places)
        distance_n = (low - quantile_n).clamp(min=0) + (quantile_n - high).clamp(min=0)
        scores_N[places] = torch.where(distance_n > 0, -distance_n, scores_N[places])
    return scores_N


class LengthScore(PickedScore):
    """The number of characters of the answer, after InfiAlign (arXiv 2508.05496); for labels, of the input."""

    name = "length"

    def numbers(self, candidates: Candidates) -> Tensor:
        """Return whole numbers."""
        texts = candidates.rows["input" if candidates.task.labels else "output"]
        return torch.tensor([len(text) for text in texts], dtype=torch.float64)


class LossScore(PickedScore):
    """The mean loss per answer token, -log p / K."""

    name = "loss"
    reads_model: ClassVar[bool] = True

    def numbers(self, candidates: Candidates) -> Tensor:
        """Return numbers of at least 0."""
        return measured_of(candidates).mean_loss


@settings("selection.score_options")
class DifficultyOptions(PickOptions):
    """Options of `difficulty`."""

    target: Share = 0.5
    """Share of wrong answers that is preferred."""


class DifficultyScore(PickedScore):
    """-|d - target|, d = 1 - p, after DOTS (arXiv 2506.05316).

    d is the expected share of wrong answers among answers that are sampled at temperature 1, if only the exact answer
    counts. DOTS chooses the d near 0.5 because the gradient of its reinforcement learning is largest there. The
    gradient of cross-entropy grows with d, so 0.5 is a rule of thumb here.
    """

    name = "difficulty"
    reads_model: ClassVar[bool] = True
    Options = DifficultyOptions

    def numbers(self, candidates: Candidates) -> Tensor:
        """Return numbers of [-1, 0]; 0 is a row as difficult as the target."""
        return -(failure_rate(measured_of(candidates)) - self.options.target).abs()

    def notes(self, candidates: Candidates) -> Sequence[str]:
        """Return how many rows are answered now rightly, now wrongly."""
        failure_N, (low, high) = failure_rate(measured_of(candidates)), UNDECIDED
        num_undecided = int(((failure_N > low) & (failure_N < high)).sum())
        return (
            f"{num_undecided:,} rows that were read have a difficulty between {low} and {high}; the others are "
            "answered the same almost always",
        )


class GradientScore(PickedScore):
    """The norm of the gradient of the mean loss per answer token with respect to the logits, ‖∂(−log p / K)/∂z‖.

    This is EL2N (arXiv 2107.07075), after GrADS (arXiv 2511.08620), which reads the gradients of the embeddings and the
    output layer, in a density that its text does not fix: `pick: band` leaves out both ends. Of one token the
    norm is ‖softmax(z) − onehot‖, from 0 to √2, so it tells less than the loss about tokens that are very improbable.
    """

    name = "gradient"
    reads_model: ClassVar[bool] = True

    def numbers(self, candidates: Candidates) -> Tensor:
        """Return numbers of [0, √2]."""
        measured = measured_of(candidates)
        return measured.gradient_N / measured.num_tokens_N


class ErrorScore(PickedScore):
    """Wrong answers first, after DEED (arXiv 2403.00046).

    A greedy answer is right if, and only if, every answer token is the likeliest one after the tokens before it.
    Labels: (is wrong) + 1 - p, so wrong answers come first, and within the wrong and the right ones the least likely.
    Texts: the share of answer tokens that are not the likeliest.
    """

    name = "errors"
    reads_model: ClassVar[bool] = True

    def numbers(self, candidates: Candidates) -> Tensor:
        """Return numbers of [0, 2]."""
        measured = measured_of(candidates)
        missed_N = 1 - measured.num_hits_N / measured.num_tokens_N
        return (missed_N > 0) + failure_rate(measured) if candidates.task.labels else missed_N
