"""A set of digests behaves like a set, and gives its digests in order."""

from __future__ import annotations

import hashlib
import random
import tracemalloc

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from deal_core.data.digest_set import DigestSet, StoredDigests, merge_digests

DIGESTS = st.integers(0, 12).map(lambda i: hashlib.sha256(bytes([i])).digest())
COLLIDING = st.tuples(st.binary(min_size=1, max_size=1), st.binary(min_size=2, max_size=2)).map(
    lambda ends: ends[0] + bytes(7) + b"\7" + bytes(5) + ends[1] + bytes(16)  # one slot for all; many end in NUL
)


@settings(max_examples=100)
@given(batches=st.lists(st.lists(DIGESTS | COLLIDING, max_size=30, unique_by=lambda digest: digest[8:]), max_size=6))
def test_a_set_of_digests_is_a_set(batches: list[list[bytes]]) -> None:
    with StoredDigests() as ours:
        python: dict[bytes, bytes] = {}  # two digests with the same second 8 bytes are one
        for batch in batches:
            assert ours.contains(batch).tolist() == [digest[8:] in python for digest in batch]
            is_new = []
            for digest in [*batch, *batch[:3]]:
                is_new.append(digest[8:] not in python)
                python.setdefault(digest[8:], digest)
            assert ours.add([*batch, *batch[:3]]).tolist() == is_new
            assert len(ours) == len(python)
        assert ours.in_order().tobytes() == b"".join(sorted(python.values()))


@given(digests=st.sets(DIGESTS | COLLIDING.filter(lambda digest: not digest[0])), chance=st.randoms())
def test_digests_that_are_taken_out_are_there_no_more(digests: set[bytes], chance: random.Random) -> None:
    in_arrival = chance.sample(sorted(digests), len(digests))
    is_taken = [chance.random() < 0.5 for _ in in_arrival]
    with StoredDigests() as left:
        left.add(in_arrival)
        taken = left.take_out(np.array(is_taken, np.bool_))
        assert left.contains(in_arrival).tolist() == [not each for each in is_taken]
        assert len(left) + len(taken) == len(digests)
        assert taken.tobytes() == b"".join(sorted(d for d, is_out in zip(in_arrival, is_taken, strict=True) if is_out))
        assert left.add(in_arrival).tolist() == is_taken and len(left) == len(digests)
        assert left.in_order().tobytes() == b"".join(sorted(digests))


def test_sets_are_merged_into_one_order_and_take_little_memory() -> None:
    digests = [hashlib.sha256(b"%d" % number).digest() for number in range(20_000)]
    with StoredDigests() as first, StoredDigests() as second:
        tracemalloc.start()
        try:
            assert all(first.add(digests[start : start + 700]).all() for start in range(0, 14_000, 700))
            used, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert used < 14_000 * 24
        assert not first.add(digests[:14_000]).any() and len(first) == 14_000
        second.add(digests[14_000:])
        assert b"".join(merge_digests(first.in_order(), second.in_order())) == b"".join(sorted(digests))
    assert DigestSet(digests[:3]).contains(digests[:5]).tolist() == [True, True, True, False, False]
