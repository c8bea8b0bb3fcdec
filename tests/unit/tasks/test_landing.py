"""The environment says where the rows of an arrival are checked."""

from __future__ import annotations

from pathlib import Path

import pytest

from deal_core.config import DataConfig
from deal_core.data.batch_check import checked_here
from deal_core.data.on_ray import checked_on_ray
from deal_core.data.schema import TaskSchema
from infra.store.local import FileStore
from tasks.landing import landing_of
from tasks.spec import TaskSpec


@pytest.mark.parametrize(("ingest", "check"), [(None, checked_here), ("local", checked_here), ("ray", checked_on_ray)])
def test_rows_are_checked_where_the_setting_says(
    ingest: str | None, check: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DEAL_INGEST", raising=False)
    if ingest is not None:
        monkeypatch.setenv("DEAL_INGEST", ingest)
    (tmp_path / "rows.csv").write_text("text,label\na,b\n")
    task = TaskSpec(name="pets", data=str(tmp_path / "rows.csv"))
    with landing_of(FileStore(tmp_path / "store"), task, TaskSchema(name="pets"), None, DataConfig()) as landing:
        assert landing.check is check
