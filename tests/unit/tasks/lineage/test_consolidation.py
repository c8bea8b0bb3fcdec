"""When a lineage is consolidated: by its arrivals since the last time, and by its forgetting budget."""

from __future__ import annotations

from typing import Any

import pytest

from infra.versions import Since, Version
from tasks.lineage.consolidation import ConsolidatePolicy, why_due
from tests.stored_versions import VERSION

SPENT = ({"kind": "total_drop", "task": "bank", "value": 9.0, "limit": 8.0},)


def chain(*kinds: str, champion: int | None = None, **changes: Any) -> list[Version]:
    """Versions that continue each other; the last one is champion, with `changes`, unless another one is named."""
    serving = champion or len(kinds)
    return [
        VERSION.model_copy(
            update={
                "version": str(number),
                "parent_version": str(number - 1) if number > 1 else None,
                "kind": kind,
                "since": Since(aliases=("champion",) if number == serving else ()),
                **(changes if number == len(kinds) else {}),
            }
        )
        for number, kind in enumerate(kinds, start=1)
    ]


A, C = "adaptation", "consolidation"
EVERY_TWO = ConsolidatePolicy(every_arrivals=2)
WHEN_SPENT = ConsolidatePolicy(when_spent=True)


@pytest.mark.parametrize(
    ("kinds", "is_due"),
    [((A,), False), ((A, A), True), ((A, A, A), True), ((A, A, C), False), ((A, A, C, A), False), ((A, C, A, A), True)],
)
def test_arrivals_are_counted_since_the_last_consolidation(kinds: tuple[str, ...], is_due: bool) -> None:
    assert (why_due(EVERY_TWO, chain(*kinds), None) is not None) == is_due
    assert why_due(ConsolidatePolicy(), chain(*kinds), None) is None


def test_a_spent_budget_is_due() -> None:
    assert why_due(WHEN_SPENT, chain(A, A, debts={"bank": 8.0}), 8.0) is None
    assert "bank has lost 8.1 of 8.0 points" in str(why_due(WHEN_SPENT, chain(A, A, debts={"bank": 8.1}), 8.0))
    assert why_due(WHEN_SPENT, chain(A, C, debts={"bank": 9.0}), 8.0) is None, "it was just consolidated"


def test_a_rejection_for_the_budget_is_due_until_another_version_is_champion() -> None:
    rejected = {"accepted": False, "failed_checks": SPENT}
    assert "version 3 was rejected for it" in str(why_due(WHEN_SPENT, chain(A, A, A, champion=2, **rejected), 8.0))
    assert why_due(WHEN_SPENT, chain(A, A, A, champion=1, **rejected), 8.0) is None
    other = {"accepted": False, "failed_checks": ({**SPENT[0], "kind": "drop"},)}
    assert why_due(WHEN_SPENT, chain(A, A, A, champion=2, **other), 8.0) is None


def test_a_champion_is_consolidated_once_even_if_the_gate_rejects_it() -> None:
    assert why_due(EVERY_TWO, chain(A, A, C, champion=2, accepted=False), None) is None
    assert why_due(EVERY_TWO, chain(A, A, C, champion=1, accepted=False), None) is None
    assert why_due(EVERY_TWO, [*chain(A, A, A, champion=3)], None) is not None
    assert why_due(EVERY_TWO, [], None) is None
