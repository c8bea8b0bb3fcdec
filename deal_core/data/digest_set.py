"""Sets of digests that take little memory, and the digests of several sets in one order."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from tempfile import TemporaryFile
from typing import Self

import numpy as np
import numpy.typing as npt

Digests = npt.NDArray[np.void]
"""Array of digests of 32 bytes each."""
OrderedDigests = npt.NDArray[np.bytes_]
"""Sorted array of digests. All have 32 bytes, so NULs at the end of one do no harm."""
_CHUNK = 2**16
_LEAST_SLOTS = 1024


class DigestSet:
    """A set of SHA-256 digests that keeps 8 bytes of each, in a hash table with open addressing.

    A digest takes 11 to 22 bytes of memory; in a Python set it takes 130. Two digests with the same 8 bytes count as
    one: among ten million digests there are two such with a probability of three in a million.
    """

    def __init__(self, digests: Digests | Collection[bytes] = ()) -> None:
        self._table = np.zeros(_LEAST_SLOTS, np.uint64)  # 0: free
        self._size = 0
        self.add(digests)

    def __len__(self) -> int:
        return self._size

    def contains(self, digests: Digests | Collection[bytes]) -> npt.NDArray[np.bool_]:
        """Which of the digests are in the set."""
        keys = _keys_of(digests)
        is_there = np.zeros(len(keys), np.bool_)
        slots, open_ = self._slots(keys), np.arange(len(keys))
        while len(open_):
            stored = self._table[slots[open_]]
            is_same = stored == keys[open_]
            is_there[open_[is_same]] = True
            open_ = open_[~is_same & (stored > 0)]
            slots[open_] = self._next(slots[open_])
        return is_there

    def add(self, digests: Digests | Collection[bytes]) -> npt.NDArray[np.bool_]:
        """Add the digests; return which are new, that is neither in the set nor earlier in `digests`."""
        keys = _keys_of(digests)
        if 4 * (self._size + len(keys)) > 3 * len(self._table):
            self._grow(self._size + len(keys))
        firsts = np.unique(keys, return_index=True)[1]
        is_new = np.zeros(len(keys), np.bool_)
        is_new[firsts] = self._enter(keys[firsts])
        self._size += int(is_new.sum())
        return is_new

    def _enter(self, keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
        """Enter keys, each of which is given once, into the table; return which are new."""
        is_new = np.zeros(len(keys), np.bool_)
        slots, open_ = self._slots(keys), np.arange(len(keys))
        while len(open_):
            free = open_[self._table[slots[open_]] == 0]
            self._table[slots[free]] = keys[free]  # of several keys for one slot the last one has it
            is_new[free] = self._table[slots[free]] == keys[free]
            open_ = open_[self._table[slots[open_]] != keys[open_]]
            slots[open_] = self._next(slots[open_])
        return is_new

    def _grow(self, size: int) -> None:
        """Make the table anew, with room for `size` digests at least."""
        keys = self._table[self._table > 0]
        self._table = np.zeros(1 << max(10, (4 * size // 3).bit_length()), np.uint64)
        for start in range(0, len(keys), _CHUNK):
            self._enter(keys[start : start + _CHUNK])

    def _slots(self, keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        return keys & np.uint64(len(self._table) - 1)

    def _next(self, slots: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        return (slots + np.uint64(1)) & np.uint64(len(self._table) - 1)


class StoredDigests(DigestSet):
    """A set of digests that gives them back in the end.

    Until then they are in a temporary file, in the order of their arrival. The end of the context removes it.
    """

    def __init__(self) -> None:
        self._file = TemporaryFile()  # noqa: SIM115  # the end of the context closes it
        super().__init__()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def add(self, digests: Digests | Collection[bytes]) -> npt.NDArray[np.bool_]:
        """See `DigestSet.add`."""
        is_new = super().add(digests)
        self._file.write(_array_of(digests)[is_new].tobytes())
        return is_new

    def take_out(self, is_taken: npt.NDArray[np.bool_]) -> OrderedDigests:
        """Take digests out, by their places in the order of arrival, and return them."""
        taken, before = [np.zeros(0, "V32")], self._file
        self._file = TemporaryFile()  # noqa: SIM115  # the end of the context closes it
        self._table, self._size = np.zeros(_LEAST_SLOTS, np.uint64), 0
        with before:
            before.seek(0)
            for start in range(0, len(is_taken), _CHUNK):
                digests, is_out = np.frombuffer(before.read(32 * _CHUNK), "V32"), is_taken[start : start + _CHUNK]
                taken.append(digests[is_out])
                self.add(digests[~is_out])
        return np.sort(np.concatenate(taken).view("S32"))

    def in_order(self) -> OrderedDigests:
        """The digests in order. None can be added or looked up afterwards."""
        self._table = np.zeros(0, np.uint64)
        self._file.seek(0)
        digests = np.fromfile(self._file, "S32")
        digests.sort()
        return digests


def merge_digests(*sets: OrderedDigests) -> Iterator[bytes]:
    """Merge the digests of several sets into one order. The result comes in pieces, to save memory."""
    bounds = np.arange(1, 256, dtype=np.uint8).view("S1").astype("S32")
    for pieces in zip(*(np.split(digests, np.searchsorted(digests, bounds)) for digests in sets), strict=True):
        yield np.sort(np.concatenate(pieces), kind="stable").tobytes()


def _array_of(digests: Digests | Collection[bytes]) -> Digests:
    return digests if isinstance(digests, np.ndarray) else np.frombuffer(b"".join(digests), "V32")


def _keys_of(digests: Digests | Collection[bytes]) -> npt.NDArray[np.uint64]:
    """The second 8 bytes of each digest; the first ones decide the split, so a set's can be alike. 0 means free."""
    return np.maximum(np.ascontiguousarray(_array_of(digests)).view(np.uint64)[1::4], 1)
