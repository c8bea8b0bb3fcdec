"""The card beside an adapter's copy says how many test rows judge each task."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tasks.lineage.model_card import write_card
from tasks.references import Spared
from tests.stored_versions import VERSION
from tests.unit.test_stored_json import RECORD


@pytest.mark.parametrize(("spared", "bank", "talk"), [(None, 120, 120), ("labelled", 70, 120), ("all", 70, 70)])
def test_rows_whose_texts_may_teach_are_not_counted(spared: Spared, bank: int, talk: int) -> None:
    tasks = tuple(
        replace(known, num_test=120, dataset_uri=f"datasets/{known.schema.name}/{'e' * 64}/support/s")
        for known in RECORD.tasks
    )
    card = write_card(replace(RECORD, tasks=tasks, spared=spared), VERSION, "mit", "CAUSAL_LM")
    digest = "e" * 64
    assert f"`{digest}` | {bank} |" in card and f"`{digest}` | {talk} |" in card
    assert ("Fewer than 100 test rows" in card) == (spared is not None)
