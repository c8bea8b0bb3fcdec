"""A DigestSet behaves like a set, and gives its digests in order."""

from __future__ import annotations

import hashlib
import random

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from deal_core.data.digest_set import DigestSet, merge_digests

DIGESTS = st.integers(0, 12).map(lambda i: hashlib.sha256(bytes([i])).digest())
COLLIDING = st.tuples(st.binary(min_size=1, max_size=1), st.binary(min_size=2, max_size=2)).map(
    lambda ends: ends[0] + bytes(29) + ends[1]  # one slot for all; many end in NUL
)


@settings(max_examples=100)
@given(batches=st.lists(st.lists(DIGESTS | COLLIDING, max_size=30), max_size=6))
def test_a_set_of_digests_is_a_set(batches: list[list[bytes]]) -> None:
    ours, python = DigestSet(), set()
    for batch in batches:
        assert ours.contains(batch).tolist() == [digest in python for digest in batch]
        is_new = []
        for digest in batch:
            is_new.append(digest not in python)
            python.add(digest)
        assert ours.add(batch).tolist() == is_new
        assert len(ours) == len(python)
    assert bytes(ours.in_order()) == b"".join(sorted(python))


@given(digests=st.sets(DIGESTS | COLLIDING), chance=st.randoms(use_true_random=False))
def test_digests_that_are_taken_out_are_there_no_more(digests: set[bytes], chance: random.Random) -> None:
    in_arrival = chance.sample(sorted(digests), len(digests))
    is_taken = [chance.random() < 0.5 for _ in in_arrival]
    left = DigestSet(in_arrival)
    taken = left.take_out(np.array(is_taken, np.bool_))
    assert left.contains(in_arrival).tolist() == [not each for each in is_taken]
    assert taken.contains(in_arrival).tolist() == is_taken and len(left) + len(taken) == len(digests)
    assert left.add(in_arrival).tolist() == is_taken and len(left) == len(digests)


def test_a_large_set_of_digests_grows_and_keeps_all() -> None:
    digests = [hashlib.sha256(b"%d" % number).digest() for number in range(20_000)]
    ours = DigestSet()
    assert all(ours.add(digests[start : start + 700]).all() for start in range(0, 20_000, 700))
    assert not ours.add(digests).any()
    assert len(ours) == 20_000
    assert bytes(ours.in_order()) == b"".join(sorted(digests))


def test_sets_are_merged_into_one_order() -> None:
    digests = [hashlib.sha256(b"%d" % number).digest() for number in range(300)]
    first, second = DigestSet(digests[:100]), DigestSet(digests[100:])
    assert b"".join(merge_digests(first.in_order(), second.in_order())) == b"".join(sorted(digests))
