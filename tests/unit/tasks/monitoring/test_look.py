"""The rows that later looks compare with."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd

from deal_core.judging_config import DriftLimits
from infra.store.keys import baseline_key
from infra.store.local import FileStore
from tasks.monitoring.look import BASELINE_COLUMNS, _baseline, _take_reference


def test_a_rebase_keeps_the_rows_of_a_task_that_is_quiet_now(tmp_path: Path) -> None:
    store, config = FileStore(tmp_path), DriftLimits(min_rows=10)
    info: Any = SimpleNamespace(lineage="l", version="3")

    def live(*tasks: str) -> pd.DataFrame:
        rows = [
            {
                **dict.fromkeys(BASELINE_COLUMNS),
                "task": task,
                "id": f"{task}{n}",
                "input_sha256": f"{task}{n}",
                "time": float(n),
                "confidence": 0.5,
                "chars": n,
            }
            for task in tasks
            for n in range(12)
        ]
        return pd.DataFrame(rows)

    _take_reference(store, info, live("bank", "clinic"), config)
    _take_reference(store, info, live("bank"), config)
    found = _baseline(store, info)
    assert found is not None and found["task"].value_counts().to_dict() == {"bank": 12, "clinic": 12}
    store.put_bytes(baseline_key("l", "3"), b"damaged")
    _take_reference(store, info, live("bank"), config)
    assert set(_baseline(store, info)["task"]) == {"bank"}  # type: ignore[index]
