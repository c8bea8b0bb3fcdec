"""The card beside an adapter's copy says how many test rows judge each task."""

from __future__ import annotations

from dataclasses import replace

import pytest

from deal_core.base_model.sources import DEFAULT_BASE
from tasks.lineage.model_card import write_card
from tasks.lineage.record import FrozenRows
from tests.stored_versions import VERSION
from tests.unit.test_stored_json import RECORD


@pytest.mark.parametrize(
    ("source", "front", "loaded"),
    [
        ("org/model", 'base_model: "org/model"', 'from_pretrained("org/model")'),
        ("org/model@abc123", 'base_model: "org/model"', 'from_pretrained("org/model", revision="abc123")'),
        ("gpt2", 'base_model: "gpt2"', 'from_pretrained("gpt2")'),
        ("/models/mine", "license", 'from_pretrained("FOLDER OF '),
        (DEFAULT_BASE, "license", 'from_pretrained("FOLDER OF '),
    ],
)
def test_the_base_model_is_named_as_the_hub_does(source: str, front: str, loaded: str) -> None:
    card = write_card(
        replace(RECORD, base=RECORD.base.model_copy(update={"source": source})), VERSION, "mit", "CAUSAL_LM"
    )
    assert front in card.split("---")[1] and loaded in card
    assert ("base_model:" in card) == ("base_model:" in front)


@pytest.mark.parametrize("num_test", [99, 100])
def test_all_test_rows_are_counted_and_few_are_named(num_test: int) -> None:
    digest = "e" * 64
    tasks = tuple(
        replace(
            known,
            tests=(FrozenRows(dataset_uri=f"datasets/{known.schema.name}/{digest}/support/s", num_rows=num_test),),
        )
        for known in RECORD.tasks
    )
    card = write_card(replace(RECORD, tasks=tasks), VERSION, "mit", "CAUSAL_LM")
    assert card.count(f"`{digest}` | {num_test} |") == len(RECORD.tasks)
    assert ("Fewer than 100 test rows" in card) == (num_test < 100)
