"""Which test rows a new version answers."""

from __future__ import annotations

import hashlib

import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from deal_core.data.schema import TaskSchema
from tasks.adaptation.frozen_rows import TestSet, share_rows, within_budget

SIZES = st.dictionaries(st.text(max_size=3), st.integers(1, 600), min_size=1, max_size=60)


def make_set(name: str, num_rows: int) -> TestSet:
    digests = [hashlib.sha256(f"{name} {number}".encode()).hexdigest() for number in range(num_rows)]
    rows = Dataset.from_dict({"input": [f"row {number}" for number in range(num_rows)], "sha256": digests})
    return TestSet(schema=TaskSchema(name=name), rows=rows, max_prompt_tokens=9, max_new_tokens=9)


@given(SIZES, st.integers(1, 3000))
def test_a_budget_is_spent_evenly_and_never_exceeded_while_every_task_can_have_a_row(
    sizes: dict[str, int], budget: int
) -> None:
    shares = share_rows(sizes, budget)
    assert set(shares) == set(sizes)
    assert all(1 <= shares[name] <= size for name, size in sizes.items())
    assert sum(shares.values()) <= max(budget, len(sizes))
    cut = [shares[name] for name, size in sizes.items() if shares[name] < size]
    if cut:
        assert max(cut) - min(cut) <= 1 and max(shares.values()) <= max(cut) + 1
        assert sum(shares.values()) >= min(budget, sum(sizes.values())) or min(cut) == 1
    else:
        assert shares == sizes


@pytest.mark.parametrize("budget", [5, 17, 40])
def test_a_smaller_share_lies_within_a_larger_one_and_the_task_just_learned_is_whole(budget: int) -> None:
    sets = [make_set(name, 20) for name in ("a", "b", "new")]
    within, more = within_budget(sets, "new", budget), within_budget(sets, "new", budget + 6)
    assert sum(len(each.rows) for each in within[:2]) <= budget and len(within[2].rows) == 20
    for few, many in zip(within, more, strict=True):
        assert set(few.rows["sha256"]) <= set(many.rows["sha256"])
