"""Rows that look wrong although nothing is wrong with each of them: they are named, and learned all the same."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc

from deal_core.data.reading.batches import RowBatch
from deal_core.data.schema import Doubt, RowsInDoubt, TaskSchema, seen_key

MAX_NAMED = 10
"""Rows of a kind that are named; all are counted."""


def labels_alike(labels: Sequence[str]) -> list[tuple[str, ...]]:
    """Groups of labels that look the same, each in the order of the labels."""
    groups: dict[str, list[str]] = defaultdict(list)
    for label in labels:
        groups[seen_key(label)].append(label)
    return [tuple(group) for group in groups.values() if len(group) > 1]


class DoubtFinder:
    """Finds such rows while the rows of an arrival stream by."""

    def __init__(self, task: TaskSchema) -> None:
        # of labels that look the same, the first one is right
        doubtful = [label for group in labels_alike(task.labels) for label in group[1:]]
        self._doubtful = pa.array(doubtful, pa.string()) if doubtful else None
        self._counts: dict[Doubt, int] = defaultdict(int)
        self._named: dict[Doubt, list[tuple[str, int]]] = defaultdict(list)

    def read(self, file: str, batch: RowBatch, good: pa.RecordBatch) -> None:
        """Look at the next rows of a file, and at the good ones among them."""
        for place, doubt in batch.doubts.items():
            self._name(doubt, file, batch, [place])
        if self._doubtful is not None:
            is_doubtful = pc.is_in(good.column("output"), self._doubtful)
            self._name("labels alike", file, batch, good.column("place").filter(is_doubtful).to_pylist())

    def found(self) -> tuple[RowsInDoubt, ...]:
        """All rows that look wrong, by kind."""
        return tuple(
            RowsInDoubt(kind=kind, num_rows=count, rows=tuple(self._named[kind]))
            for kind, count in sorted(self._counts.items())
            if count
        )

    def _name(self, doubt: Doubt, file: str, batch: RowBatch, places: Sequence[int]) -> None:
        self._counts[doubt] += len(places)
        self._named[doubt] += [(file, row) for row in batch.numbers(places[: MAX_NAMED - len(self._named[doubt])])]
