"""A set of SHA-256 digests that takes about 50 bytes for each, where Python's own takes 130."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Digests = npt.NDArray[np.void]
"""Digests, 32 bytes each."""
DIGEST = np.dtype("V32")

_CHUNK = 2**16


class DigestSet:
    """Digests side by side in the order they came, and a table of places in it with open addressing."""

    def __init__(self) -> None:
        self._words = np.zeros((256, 4), np.uint64)
        self._table = np.zeros(1024, np.uint32)  # place + 1 in `_words`; 0: free
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def contains(self, digests: Digests) -> npt.NDArray[np.bool_]:
        """Which of the digests are in the set."""
        words = _words_of(digests)
        found = np.zeros(len(words), np.bool_)
        slots, open_ = self._slots(words), np.arange(len(words))
        while len(open_):
            places = self._table[slots[open_]]
            open_, places = open_[places > 0], places[places > 0]
            same = (self._words[places - 1] == words[open_]).all(axis=1)
            found[open_[same]] = True
            open_ = open_[~same]
            slots[open_] = self._next(slots[open_])
        return found

    def add(self, digests: Digests) -> npt.NDArray[np.bool_]:
        """Add the digests; return which of them were new: not in the set, nor earlier among these."""
        words = _words_of(digests)
        start, end = self._size, self._size + len(words)
        self._reserve(end)
        self._words[start:end] = words
        is_new, slots = self._claim(start, end)
        self._size = start + int(is_new.sum())
        self._words[start : self._size] = words[is_new]
        self._table[slots[is_new]] = np.arange(start, self._size, dtype=np.uint32) + 1
        return is_new

    def in_order(self) -> memoryview:
        """The digests in order, one after another. The set takes no more of them afterwards."""
        self._table = np.zeros(0, np.uint32)
        digests = self._words[: self._size].view("S32")  # of one length, so that a NUL at the end makes no difference
        digests.sort(axis=0)
        return digests.view(np.uint8).data

    def _claim(self, start: int, end: int) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.uint64]]:
        """Put these places of `_words` into the table unless an equal digest is there; return which, and the slots."""
        words = self._words[start:end]
        is_new = np.zeros(len(words), np.bool_)
        slots, open_ = self._slots(words), np.arange(len(words))
        while len(open_):
            free = open_[self._table[slots[open_]] == 0]
            self._table[slots[free[::-1]]] = start + free[::-1] + 1  # of several the last written stays: the first row
            places = self._table[slots[open_]].astype(np.int64) - 1
            own = places == start + open_
            is_new[open_[own]] = True
            open_, places = open_[~own], places[~own]
            open_ = open_[(self._words[places] != words[open_]).any(axis=1)]
            slots[open_] = self._next(slots[open_])
        return is_new, slots

    def _reserve(self, size: int) -> None:
        if size > len(self._words):
            self._words.resize((size + size // 8, 4), refcheck=False)
        if size > len(self._table) // 2:
            self._table = np.zeros(1 << int(3 * size).bit_length(), np.uint32)
            for start in range(0, self._size, _CHUNK):
                self._claim(start, min(start + _CHUNK, self._size))

    def _slots(self, words: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        return words[:, 1] & np.uint64(len(self._table) - 1)  # not the first word, which says the split

    def _next(self, slots: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        return (slots + np.uint64(1)) & np.uint64(len(self._table) - 1)


def merged(*ordered: memoryview) -> Iterator[bytes]:
    """Digests that several sets hold in order, in one common order; piece by piece, as memory is for them alone."""
    bounds = np.arange(1, 256, dtype=np.uint8).view("S1").astype("S32")
    sets = [np.frombuffer(each, "S32") for each in ordered]
    for pieces in zip(*(np.split(each, np.searchsorted(each, bounds)) for each in sets), strict=True):
        yield np.sort(np.concatenate(pieces), kind="stable").tobytes()


def as_digests(digests: bytes) -> Digests:
    """Digests one after another as an array of them."""
    return np.frombuffer(digests, DIGEST)


def first_words(digests: Digests) -> npt.NDArray[np.uint32]:
    """The first four bytes of each, as a number."""
    return np.ascontiguousarray(digests).view(">u4")[::8]


def hex_array(digests: Digests) -> pa.Array:
    """The digests as texts of 64 characters."""
    offsets = np.arange(len(digests) + 1, dtype=np.int32) * 64
    return pa.Array.from_buffers(
        pa.string(), len(digests), [None, pa.py_buffer(offsets), pa.py_buffer(digests.tobytes().hex().encode())]
    )


def _words_of(digests: Digests) -> npt.NDArray[np.uint64]:
    return np.ascontiguousarray(digests).view(np.uint64).reshape(-1, 4)
