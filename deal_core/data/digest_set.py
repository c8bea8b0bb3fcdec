"""A set of digests that takes little memory, and the digests of several sets in one order."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import numpy as np
import numpy.typing as npt

Digests = npt.NDArray[np.void]
"""Array of digests of 32 bytes each."""
_CHUNK = 2**16


class DigestSet:
    """A set of SHA-256 digests in about 50 bytes each; a Python set takes 130.

    It is an array in order of arrival, and a hash table of places in the array with open addressing.
    """

    def __init__(self, digests: Digests | Collection[bytes] = ()) -> None:
        self._words = np.zeros((256, 4), np.uint64)
        self._table = np.zeros(1024, np.uint32)  # place + 1 in `_words`; 0: free
        self._size = 0
        self.add(digests)

    def __len__(self) -> int:
        return self._size

    def contains(self, digests: Digests | Collection[bytes]) -> npt.NDArray[np.bool_]:
        """Which of the digests are in the set."""
        words = _words_of(digests)
        is_there = np.zeros(len(words), np.bool_)
        slots, open_ = self._slots(words), np.arange(len(words))
        while len(open_):
            places = self._table[slots[open_]]
            open_, places = open_[places > 0], places[places > 0]
            same = (self._words[places - 1] == words[open_]).all(axis=1)
            is_there[open_[same]] = True
            open_ = open_[~same]
            slots[open_] = self._next(slots[open_])
        return is_there

    def add(self, digests: Digests | Collection[bytes]) -> npt.NDArray[np.bool_]:
        """Add the digests; return which are new, that is neither in the set nor earlier in `digests`."""
        words = _words_of(digests)
        start, end = self._size, self._size + len(words)
        self._reserve(end)
        self._words[start:end] = words
        is_new, slots = self._claim(start, end)
        self._size = start + int(is_new.sum())
        self._words[start : self._size] = words[is_new]
        self._table[slots[is_new]] = np.arange(start, self._size, dtype=np.uint32) + 1
        return is_new

    def take_out(self, is_taken: npt.NDArray[np.bool_]) -> DigestSet:
        """Take digests out, by their places in the order of arrival; return them as a set."""
        words = self._words[: self._size]
        taken = DigestSet(words[is_taken].view("V32").ravel())
        self._words = words[~is_taken]
        self._size = len(self._words)
        self._rebuild()
        return taken

    def in_order(self) -> memoryview:
        """The sorted digests, one after another. No digest can be added afterwards."""
        self._table = np.zeros(0, np.uint32)
        digests = self._words[: self._size].view("S32")  # all have 32 bytes, so NULs at the end do no harm
        digests.sort(axis=0)
        return digests.view(np.uint8).data

    def _claim(self, start: int, end: int) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.uint64]]:
        """Enter places of `_words` into the table if their digest is new; return which are new, and the slots."""
        words = self._words[start:end]
        is_new = np.zeros(len(words), np.bool_)
        slots, open_ = self._slots(words), np.arange(len(words))
        while len(open_):
            free = open_[self._table[slots[open_]] == 0]
            self._table[slots[free[::-1]]] = start + free[::-1] + 1  # of equal slots the last write wins: the first row
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
            self._rebuild(size)

    def _rebuild(self, size: int = 0) -> None:
        """Make the table anew, with places for `size` digests at least."""
        self._table = np.zeros(1 << max(10, int(3 * max(size, self._size)).bit_length()), np.uint32)
        for start in range(0, self._size, _CHUNK):
            self._claim(start, min(start + _CHUNK, self._size))

    def _slots(self, words: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        return words[:, 1] & np.uint64(len(self._table) - 1)  # not the first word, which decides the split

    def _next(self, slots: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        return (slots + np.uint64(1)) & np.uint64(len(self._table) - 1)


def merge_digests(*ordered: memoryview) -> Iterator[bytes]:
    """Merge sorted digests of several sets into one order. The result comes in pieces, to save memory."""
    bounds = np.arange(1, 256, dtype=np.uint8).view("S1").astype("S32")
    sets = [np.frombuffer(digests, "S32") for digests in ordered]
    for pieces in zip(*(np.split(digests, np.searchsorted(digests, bounds)) for digests in sets), strict=True):
        yield np.sort(np.concatenate(pieces), kind="stable").tobytes()


def _words_of(digests: Digests | Collection[bytes]) -> npt.NDArray[np.uint64]:
    joined = (
        np.ascontiguousarray(digests) if isinstance(digests, np.ndarray) else np.frombuffer(b"".join(digests), "V32")
    )
    return joined.view(np.uint64).reshape(-1, 4)
