"""The order of training rows: batches hold rows of similar length, and the labels in their shares."""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable, Iterator, Sequence

import torch
from torch.utils.data import Sampler

BATCHES_PER_BUCKET = 16


class BucketSampler(Sampler[int]):
    """Order of rows for an epoch: batches hold rows of similar length, batches come in random order.

    The order depends only on seed and epoch, so a resumed run sees the same order. transformers' LengthGroupedSampler
    draws from the global generator and does not have this property.

    A batch is the rows of an optimiser step, however many of them go through the model at once.

    `lengths` has every row's number of tokens. With `labels`, the rows' labels, every batch holds the labels in their
    shares. The row `blank` fills up the last batch; None: the last batch may be smaller.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int,
        seed: int,
        *,
        labels: Sequence[Hashable] | None = None,
        blank: int | None = None,
    ) -> None:
        self._lengths = list(lengths)
        self._batch_size = batch_size
        self._seed = seed
        self._labels = labels
        self._fill = [] if blank is None else [blank] * (-len(self._lengths) % batch_size)
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration; the data loader of the training calls it."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._lengths) + len(self._fill)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed * 100_003 + self._epoch)
        order = torch.randperm(len(self._lengths), generator=generator).tolist()
        bucket = self._batch_size * BATCHES_PER_BUCKET
        batches: list[list[int]] = []
        for start in range(0, len(order), bucket):
            members = sorted(order[start : start + bucket], key=self._lengths.__getitem__)
            members = self._balanced(members, generator)
            batches += [members[i : i + self._batch_size] for i in range(0, len(members), self._batch_size)]
        # a partial batch must come last; elsewhere it would shift the borders of later batches
        partial = [batch for batch in batches if len(batch) < self._batch_size]
        full = [batch for batch in batches if len(batch) == self._batch_size]
        shuffled = [full[i] for i in torch.randperm(len(full), generator=generator).tolist()]
        return iter([row for batch in shuffled + partial for row in batch] + self._fill)

    def _balanced(self, rows: list[int], generator: torch.Generator) -> list[int]:
        """Spread each label's rows evenly over the list; a label's rows keep their order."""
        if self._labels is None:
            return rows
        labels = [self._labels[row] for row in rows]
        return [rows[i] for i in spread(labels, lambda: float(torch.rand((), generator=generator)))]


def spread(labels: Sequence[Hashable], draw: Callable[[], float]) -> list[int]:
    """Return the places of a list in an order in which every part has the labels in their shares.

    The places of one label keep their order. `draw` gives random numbers of [0, 1).
    """
    by_label: dict[Hashable, list[int]] = {}
    for place, label in enumerate(labels):
        by_label.setdefault(label, []).append(place)
    ranked = sorted(
        ((number + draw()) / len(places), place) for places in by_label.values() for number, place in enumerate(places)
    )
    return [place for _, place in ranked]


def stratified_sample(labels: Sequence[Hashable], number: int, seed: int) -> list[int]:
    """Return the places of `number` rows, drawn at random with every label in its share, given all rows' labels."""
    generator = random.Random(seed)
    places = generator.sample(range(len(labels)), len(labels))
    return [places[i] for i in spread([labels[place] for place in places], generator.random)[:number]]
