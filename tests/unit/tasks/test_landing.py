"""By what an arrival is checked: a task that the lineage knows stays as it was learned."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from deal_core.data.schema import TaskSchema
from deal_core.errors import ConfigError
from infra.store.local import FileStore
from tasks.landing import choose_schema
from tasks.lineage.record import KnownSlice
from tasks.spec import TaskSpec
from tests.unit.test_stored_json import RECORD, TASKS


def test_a_known_task_stays_as_it_was_learned_and_its_earlier_test_rows_keep_their_name(tmp_path: Path) -> None:
    bank = replace(RECORD.tasks[0], schema=replace(TASKS[0], prompt="chat"))
    earlier = KnownSlice(name="bank.old-1", of="bank", tests=bank.tests)
    record = replace(RECORD, tasks=(bank, *RECORD.tasks[1:]), slices=(earlier,))

    def choose(name: str, **given: Any) -> TaskSchema:
        return choose_schema(FileStore(tmp_path / "store"), TaskSpec(name=name, data="x.csv", **given), record)

    assert choose("bank") == bank.schema
    for field, value in {"prompt": "plain", "metric": "rouge_l", "instruction": "What?", "labels": ["a"]}.items():
        with pytest.raises(ConfigError, match=f"task.{field} of 'bank' is .* the lineage learned it as"):
            choose("bank", **{field: value})
    with pytest.raises(ConfigError, match="names earlier test rows"):
        choose("bank.old-1")
