"""Training rows that nearly equal a test row, found by runs of words in a row.

Texts are read by column, as bytes: a row of 100 characters takes about a microsecond. Shapes: N texts, B bytes,
W words, R runs.
"""

from __future__ import annotations

import string
from functools import cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

RUN = 5
"""Words in a row. A text of fewer words is one run."""
COMMON = 3
"""Runs that more test rows have, such as those of a signature or of a template, do not count."""
MAX_RUNS = 2**22
"""Runs of test rows in memory, 12 bytes each. Of more test rows a part is compared by runs, chosen by hash."""
_BETWEEN_WORDS = (string.whitespace + ".,;:!?\"'()[]{}").encode()
_LETTERS = bytes(range(256)).lower().translate(bytes.maketrans(_BETWEEN_WORDS, bytes(len(_BETWEEN_WORDS))))
"""A number for each byte: 0 between words, and the same for both cases of a letter."""
_BASE = 0x9E3779B97F4A7C15
"""Odd, so it has an inverse modulo 2**64."""
_CHUNK_BYTES = 2**16
_EVERY = 2**64 - 1

Hashes = npt.NDArray[np.uint64]
Mask = npt.NDArray[np.bool_]


class NearTests:
    """Test rows, and which training rows nearly equal one of them.

    A training row does so if its answer has the same words, and its text has the same words too, or most of its runs
    are runs of the test row, and most of the test row's are its own. Words are without case and sentence marks.

    A test row takes 8 bytes, and its runs see MAX_RUNS.
    """

    def __init__(self) -> None:
        self._keys: list[Hashes] = []
        """Of the words of each test row's text and answer."""
        self._parts: list[_Part] = []
        self._largest_key = _EVERY
        """Test rows with a larger one are not compared by runs."""
        self._index: _Index | None = None

    def copy(self) -> NearTests:
        """The same test rows, to which others can be added."""
        other = NearTests()
        other._keys, other._parts, other._largest_key = [*self._keys], [*self._parts], self._largest_key
        return other

    def __bool__(self) -> bool:
        return any(map(len, self._keys))

    def add(self, inputs: pa.Array, outputs: pa.Array) -> None:
        """Add test rows: their inputs and right answers as a dataset stores them."""
        texts, answers_N = _read(inputs), _read(outputs).whole_N
        part = _Part(_key(texts.whole_N, answers_N), answers_N, texts.num_runs_N, texts.runs_R)
        self._keys.append(part.keys_N[texts.num_runs_N > 0])
        self._parts.append(part.up_to(self._largest_key))
        # The largest key depends on the test rows and not on their order.
        while sum(len(part.runs_R) for part in self._parts) > MAX_RUNS:
            self._largest_key //= 2
            self._parts = [part.up_to(self._largest_key) for part in self._parts]
        self._index = None

    def find(self, inputs: pa.Array, outputs: pa.Array) -> Mask:
        """Which training rows nearly equal a test row."""
        if self._index is None:
            self._index = _Index(np.unique(np.concatenate(self._keys)), self._parts)
        return self._index.find(_read(inputs), _read(outputs).whole_N)


class _Texts(NamedTuple):
    """What texts are compared by."""

    whole_N: Hashes
    """Hash of all words; the one of no words is 0."""
    num_runs_N: npt.NDArray[np.int64]
    runs_R: Hashes
    """The texts' runs, one text after another."""


class _Part(NamedTuple):
    """Some test rows."""

    keys_N: Hashes
    answers_N: Hashes
    num_runs_N: npt.NDArray[np.int64]
    runs_R: Hashes

    def up_to(self, largest: int) -> _Part:
        return self.only(self.keys_N <= np.uint64(largest))

    def only(self, is_kept_N: Mask) -> _Part:
        runs_R = self.runs_R[np.repeat(is_kept_N, self.num_runs_N)]
        return _Part(self.keys_N[is_kept_N], self.answers_N[is_kept_N], self.num_runs_N[is_kept_N], runs_R)


class _Index:
    """Test rows, ordered by their runs."""

    def __init__(self, keys: Hashes, parts: list[_Part]) -> None:
        self._keys = keys
        part = _Part(*map(np.concatenate, zip(*parts, strict=True)))
        is_first_N = np.zeros(len(part.keys_N), np.bool_)  # equal test rows are one
        is_first_N[np.unique(part.keys_N, return_index=True)[1]] = True
        part = part.only(is_first_N)
        self._answers = part.answers_N
        runs, owners = part.runs_R, np.repeat(np.arange(len(part.keys_N), dtype=np.int32), part.num_runs_N)
        order = np.lexsort((owners, runs))
        runs, owners = runs[order], owners[order]
        is_new = np.ones(len(runs), np.bool_)
        is_new[1:] = (runs[1:] != runs[:-1]) | (owners[1:] != owners[:-1])
        runs, owners = runs[is_new], owners[is_new]
        # A run stands here once for each test row that has it, or once with -1 if they are too many.
        _, places, counts = np.unique(runs, return_index=True, return_counts=True)
        is_common = np.repeat(counts > COMMON, counts)
        self._num_counted = np.bincount(owners[~is_common], minlength=len(part.keys_N))
        owners[is_common] = -1
        is_kept = ~is_common
        is_kept[places] = True
        self._runs, self._owners = runs[is_kept], owners[is_kept]
        # Most runs of training rows are no test row's: one look at a small table says so.
        self._shift = np.uint64(64 - min(24, max(10, (8 * len(runs)).bit_length())))
        self._is_there = np.zeros(1 << (64 - int(self._shift)), np.bool_)
        self._is_there[self._runs >> self._shift] = True

    def find(self, texts: _Texts, answers_N: Hashes) -> Mask:
        """See `NearTests.find`."""
        is_near_N = (texts.num_runs_N > 0) & _is_among(_key(texts.whole_N, answers_N), self._keys)
        num_rows = len(is_near_N)
        rows_R = np.repeat(np.arange(num_rows), texts.num_runs_N)
        is_there_R = self._is_there[texts.runs_R >> self._shift]
        num_there_N = np.bincount(rows_R[is_there_R], minlength=num_rows)
        is_open_N = ~is_near_N & (2 * num_there_N > texts.num_runs_N)
        if not is_open_N.any():
            return is_near_N
        is_asked_R = is_there_R & is_open_N[rows_R]
        rows, runs = rows_R[is_asked_R], texts.runs_R[is_asked_R]
        places = np.searchsorted(self._runs, runs)
        pairs: list[npt.NDArray[np.int64]] = []  # row · number of test rows + test row
        num_counted_N = texts.num_runs_N.copy()
        for step in range(COMMON):
            at = np.minimum(places + step, len(self._runs) - 1)
            is_same = (self._runs[at] == runs) & (places + step < len(self._runs))
            owners, of_rows = self._owners[at[is_same]].astype(np.int64), rows[is_same]
            num_counted_N -= np.bincount(of_rows[owners < 0], minlength=num_rows)
            has_answer = (owners >= 0) & (self._answers[owners] == answers_N[of_rows])
            pairs.append(of_rows[has_answer] * len(self._answers) + owners[has_answer])
        codes, num_shared = np.unique(np.concatenate(pairs), return_counts=True)
        of_rows, owners = np.divmod(codes, len(self._answers))
        are_most = 2 * num_shared > np.maximum(num_counted_N[of_rows], self._num_counted[owners])
        is_near_N[of_rows[are_most]] = True
        return is_near_N


def _read(texts: pa.Array) -> _Texts:
    """Read texts, some at a time. Those that are not ASCII are first made lower-case."""
    is_other = pc.invert(pc.string_is_ascii(texts))
    if pc.any(is_other).as_py():
        texts = pc.replace_with_mask(texts, is_other, pc.utf8_lower(texts.filter(is_other)))
    pieces = [_Texts(np.zeros(0, np.uint64), np.zeros(0, np.int64), np.zeros(0, np.uint64))]
    if len(texts):
        _, offsets, content = texts.buffers()
        ends = np.frombuffer(offsets, np.int32)[texts.offset : texts.offset + len(texts) + 1].astype(np.int64)
        letters = np.frombuffer(content or b"", np.uint8)
        start = 0
        while start < len(texts):
            last = int(np.searchsorted(ends, ends[start] + _CHUNK_BYTES, "right")) - 1
            last = max(start + 1, min(last, len(texts)))
            pieces.append(_runs_of(letters[ends[start] : ends[last]], ends[start : last + 1] - ends[start]))
            start = last
    return _Texts(*map(np.concatenate, zip(*pieces, strict=True)))


def _runs_of(content_B: npt.NDArray[np.uint8], ends_N1: npt.NDArray[np.int64]) -> _Texts:
    """Read texts that stand one after another in `content_B`, between the places `ends_N1`."""
    letters_B = np.frombuffer(content_B.tobytes().translate(_LETTERS), np.uint8)
    is_letter_B = letters_B.astype(np.bool_)
    is_end_B1 = np.zeros(len(content_B) + 1, np.bool_)
    is_end_B1[ends_N1] = True
    begins_B, ends_B = is_letter_B.copy(), is_letter_B.copy()
    begins_B[1:] &= ~is_letter_B[:-1] | is_end_B1[1:-1]
    ends_B[:-1] &= ~is_letter_B[1:] | is_end_B1[1:-1]
    begins_W, ends_W = np.flatnonzero(begins_B), np.flatnonzero(ends_B) + 1
    words_W = _hashes(letters_B, begins_W, ends_W)
    first_N1 = np.searchsorted(begins_W, ends_N1)  # words before each text
    first_N, last_N = first_N1[:-1], first_N1[1:]
    num_words_N = last_N - first_N
    num_runs_N = np.where(num_words_N > 0, np.maximum(num_words_N - RUN + 1, 1), 0)
    begins_R = np.arange(num_runs_N.sum()) + np.repeat(first_N - (num_runs_N.cumsum() - num_runs_N), num_runs_N)
    ends_R = np.minimum(begins_R + RUN, np.repeat(last_N, num_runs_N))
    whole_and_runs = _hashes(words_W, np.concatenate([first_N, begins_R]), np.concatenate([last_N, ends_R]))
    whole_N, runs_R = np.split(whole_and_runs, [len(first_N)])
    return _Texts(whole_N, num_runs_N, runs_R)


def _hashes(
    values: npt.NDArray[np.unsignedinteger], begins: npt.NDArray[np.intp], ends: npt.NDArray[np.intp]
) -> Hashes:
    """A hash of each slice of `values`: of its polynomial in _BASE, modulo 2**64. That of an empty slice is 0."""
    powers, inverses = _powers(1 << len(values).bit_length())
    sums = np.zeros(len(values) + 1, np.uint64)
    np.cumsum(values * powers[: len(values)], out=sums[1:])
    return _mixed((sums[ends] - sums[begins]) * inverses[begins])


def _key(whole_N: Hashes, answers_N: Hashes) -> Hashes:
    return _mixed(whole_N * np.uint64(_BASE) + answers_N)


def _mixed(numbers: Hashes) -> Hashes:
    """Numbers whose bits all depend on all bits (the finaliser of SplitMix64, doi 10.1145/2714064.2660195)."""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))


@cache
def _powers(number: int) -> tuple[Hashes, Hashes]:
    """The first powers of _BASE from 1 on, and their inverses, modulo 2**64."""
    bases = np.array([[_BASE], [pow(_BASE, -1, 2**64)]], np.uint64).repeat(number + 1, axis=1)
    powers, inverses = bases.cumprod(axis=1, dtype=np.uint64)
    return powers, inverses


def _is_among(numbers: Hashes, ordered: Hashes) -> Mask:
    """Which of the numbers are among others, which are in order."""
    if not len(ordered):
        return np.zeros(len(numbers), np.bool_)
    places = np.minimum(np.searchsorted(ordered, numbers), len(ordered) - 1)
    return np.equal(ordered[places], numbers)
