"""Rows that look wrong although nothing is wrong with each of them: they are named, and learned all the same."""

from __future__ import annotations

import string
import unicodedata
from array import array
from collections import defaultdict
from collections.abc import Collection, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from deal_core.data.reading.batches import RowBatch
from deal_core.data.schema import Doubt, Format, RowsInDoubt, Split, TaskSchema, seen_key

MAX_NAMED = 10
"""Rows of a kind that are named; all are counted."""
_LOWER = bytes.maketrans(string.ascii_uppercase.encode(), string.ascii_lowercase.encode())
_WHITE = string.whitespace.encode()


def likeness(kind: Format, inputs: pa.Array) -> list[int]:
    """A number of 64 bits for each input as a dataset stores it.

    Inputs that differ only by case, white space or final dots have the same number, and others have the same number by
    chance alone, seldom. The numbers hold in this process.
    """
    end = b'"}]' if kind == "chat" else b""
    return [hash(_bare(text).removesuffix(end).rstrip(b".")) for text in inputs.cast(pa.binary()).to_pylist()]


def _bare(text: bytes) -> bytes:
    """The text without case and white space. Ingest is noticeably slower if ASCII takes the second way too."""
    if text.isascii():
        return text.translate(_LOWER, _WHITE)
    normal = unicodedata.normalize("NFC", text.decode("utf-8", "surrogatepass"))
    return "".join(normal.casefold().split()).encode("utf-8", "surrogatepass")


def labels_alike(labels: Sequence[str]) -> list[tuple[str, ...]]:
    """Groups of labels that look the same, each in the order of the labels."""
    groups: dict[str, list[str]] = defaultdict(list)
    for label in labels:
        groups[seen_key(label)].append(label)
    return [tuple(group) for group in groups.values() if len(group) > 1]


class DoubtFinder:
    """Finds such rows while the rows of an arrival stream by.

    A new test row is compared with all training rows, and a training row with the lineage's test rows. A training row
    costs 8 bytes in memory, a new test row 24.

    Args:
        task: The task with its format and labels.
        frozen: The `likeness` of the lineage's test rows.
        brings_tests: Whether the arrival's test rows are new.
    """

    def __init__(self, task: TaskSchema, frozen: Collection[int], *, brings_tests: bool) -> None:
        assert task.format != "auto", "the format is known when rows are checked"
        self._format, self._brings_tests = task.format, brings_tests
        self._frozen = np.array(sorted(frozen), np.int64)
        # of labels that look the same, the first one is right
        doubtful = [label for group in labels_alike(task.labels) for label in group[1:]]
        self._doubtful = pa.array(doubtful, pa.string()) if doubtful else None
        self._files: list[str] = []
        self._train, self._tests = array("q"), array("q")
        self._test_rows, self._test_files = array("q"), array("l")
        self._counts: dict[Doubt, int] = defaultdict(int)
        self._named: dict[Doubt, list[tuple[str, int]]] = defaultdict(list)

    def read(self, file: str, batch: RowBatch, good: pa.RecordBatch) -> None:
        """Look at the next rows of a file, and at the good ones among them."""
        if not self._files or self._files[-1] != file:
            self._files.append(file)
        for place, doubt in batch.doubts.items():
            self._name(doubt, batch, [place])
        if self._doubtful is not None:
            is_doubtful = pc.is_in(good.column("output"), self._doubtful)
            self._name("labels alike", batch, good.column("place").filter(is_doubtful).to_pylist())

    def keep(self, batch: RowBatch, kept: pa.RecordBatch, split: Split) -> None:
        """Look at rows of the last batch that are kept."""
        if split == "test" and not self._brings_tests:
            return
        numbers = array("q", likeness(self._format, kept.column("input")))
        if split == "train":
            if self._brings_tests:
                self._train.extend(numbers)
            if len(self._frozen):
                is_alike = _is_among(np.frombuffer(numbers, np.int64), self._frozen)
                self._name("tests alike", batch, kept.column("place").filter(pa.array(is_alike)).to_pylist())
        else:
            rows = batch.numbers(kept.column("place").to_pylist())
            self._tests.extend(numbers)
            self._test_rows.extend(rows)
            self._test_files.extend([len(self._files) - 1] * len(rows))

    def found(self) -> tuple[RowsInDoubt, ...]:
        """All rows that look wrong, by kind. It is asked once, after the last row."""
        train = np.frombuffer(self._train, np.int64)
        train.sort()
        for place in np.flatnonzero(_is_among(np.frombuffer(self._tests, np.int64), train)).tolist():
            self._count("tests alike", self._files[self._test_files[place]], [self._test_rows[place]])
        return tuple(
            RowsInDoubt(kind=kind, num_rows=count, rows=tuple(self._named[kind]))
            for kind, count in sorted(self._counts.items())
        )

    def _name(self, doubt: Doubt, batch: RowBatch, places: Sequence[int]) -> None:
        if places:
            self._count(doubt, self._files[-1], batch.numbers(places))

    def _count(self, doubt: Doubt, file: str, rows: Sequence[int]) -> None:
        self._counts[doubt] += len(rows)
        self._named[doubt] += [(file, row) for row in rows[: MAX_NAMED - len(self._named[doubt])]]


def _is_among(numbers: npt.NDArray[np.int64], ordered: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Which of the numbers are among others, which are in order."""
    if not len(ordered):
        return np.zeros(len(numbers), np.bool_)
    places = np.searchsorted(ordered, numbers)
    return np.equal(ordered[np.minimum(places, len(ordered) - 1)], numbers)
