"""By what an arrival is checked: a task that the lineage knows stays as it was learned."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from deal_core.config import DataConfig
from deal_core.data.dataset import Landing, build_dataset
from deal_core.data.schema import TaskSchema
from deal_core.data.source_files import files_at
from deal_core.errors import ConfigError
from infra.store.local import FileStore
from infra.store.opening import open_store
from tasks.lineage.record import KnownSlice
from tasks.spec import TaskSpec
from tasks.task_schema import choose_schema, landing_of
from tests.stored_versions import known_task, put_version, version
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


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize(("has_own_tests", "num_lacking"), [(False, 70), (True, 0)])
def test_test_rows_grow_to_the_aim_unless_the_user_chose_them(
    tmp_path: Path, has_own_tests: bool, num_lacking: int
) -> None:
    store, files = open_store(), [tmp_path / "rows.jsonl", tmp_path / "tests.jsonl"]
    for file, num_rows in zip(files, (90, 30), strict=True):
        rows = [{"text": f"{file.name} {number}", "label": "ab"[number % 2]} for number in range(num_rows)]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources, tests = map(files_at, files)
    landing = Landing(
        sources=sources,
        task=TaskSchema(name="bank", labels=("a", "b")),
        config=DataConfig(),
        test_sources=tests if has_own_tests else (),
    )
    manifest = build_dataset(landing, tmp_path / "dataset")
    assert manifest.num_test == 30
    uri = f"datasets/bank/{manifest.sha256}/l/s"
    store.upload_folder(tmp_path / "dataset", uri)
    known = known_task(manifest.task, uri, manifest.num_test)
    parent = version(1, dataset_sha256=manifest.sha256)
    put_version(store, parent)
    record, spec = replace(RECORD, lineage="l", tasks=(known,)), TaskSpec(name="bank", data=str(files[0]))
    with landing_of(store, spec, known.schema, record, DataConfig(test_rows=100), parent=parent) as landed:
        assert landed.num_lacking == num_lacking
