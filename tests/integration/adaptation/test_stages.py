"""The stages of an adaptation are tried again after an error of a connection, and read nothing twice."""

from __future__ import annotations

import asyncio
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import EndpointConnectionError
from prefect import flow

import tasks.adaptation.ingest as ingest_stage
import tasks.adaptation.train as train_stage
from deal_core.errors import DataValidationError, StoreError
from flows.adapt import begin
from flows.adapt_result import AdaptResult
from infra.store.local import FileStore
from infra.store.opening import open_store
from infra.versions import Versions
from tasks.adaptation.evaluate import evaluate_version
from tasks.adaptation.gate import judge_version
from tasks.adaptation.ingest import ingest_arrival
from tasks.adaptation.promote import promote_version
from tasks.adaptation.register import register_version
from tasks.adaptation.report import report_version
from tasks.adaptation.resume import find_parent
from tasks.adaptation.run import AdaptationRun, load_base, start_run
from tasks.adaptation.train import train_version
from tasks.references import TrainedAdapter
from tasks.spec import AdaptSpec, parse
from tests.adapting import BANK, CLINIC, FAIL, run

pytestmark = pytest.mark.usefixtures("prefect_api", "home", "without_mlflow")
QUICK = {"max_steps": 3, "max_prompt_tokens": 192, "max_answer_tokens": 12, "checkpoint_steps": 0}
STAGES = (
    find_parent,
    load_base,
    start_run,
    ingest_arrival,
    train_version,
    evaluate_version,
    judge_version,
    register_version,
    promote_version,
    report_version,
)


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no stage wait before it is tried again."""
    for stage in STAGES:
        monkeypatch.setattr(stage, "retry_delay_seconds", 0)


def counted(patch: pytest.MonkeyPatch, module: Any, name: str) -> list[str]:
    """Each call of a module's function from now on."""
    calls: list[str] = []
    whole = getattr(module, name)

    def call(*args: Any, **options: Any) -> Any:
        calls.append(name)
        return whole(*args, **options)

    patch.setattr(module, name, call)
    return calls


def prepare(base: Path, task: dict[str, Any]) -> AdaptationRun:
    """All that comes before the training of a task."""
    spec = parse(AdaptSpec, {"lineage": "l", "base_model": str(base), "task": task, "train": QUICK}, "test")

    @flow
    async def begun() -> AdaptationRun | AdaptResult:
        return await begin(open_store(), spec)

    prepared = asyncio.run(begun())
    assert isinstance(prepared, AdaptationRun)
    return prepared


def test_a_stage_that_loses_its_connection_is_tried_again_and_the_run_goes_on(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    trainings = counted(monkeypatch, train_stage, "_train")
    lost: list[str] = []
    upload, put = FileStore.upload_folder, FileStore.put_bytes

    def lose(key: str) -> None:
        """Be away at the first write of what a stage makes."""
        kind = key.partition("/")[0]
        if kind in ("datasets", "adapters", "versions", "promotions", "reports") and kind not in lost:
            lost.append(kind)
            raise StoreError(f"Cannot write {key!r}.") from EndpointConnectionError(endpoint_url="http://store")

    def upload_or_lose(store: FileStore, local: Path, prefix: str, **options: Any) -> int:
        lose(prefix)
        return upload(store, local, prefix, **options)

    def put_or_lose(store: FileStore, key: str, data: bytes, **options: Any) -> bool:
        lose(key)
        return put(store, key, data, **options)

    monkeypatch.setattr(FileStore, "upload_folder", upload_or_lose)
    monkeypatch.setattr(FileStore, "put_bytes", put_or_lose)
    result = run(tiny_base, BANK)

    assert (result.status, result.version) == ("promoted", "1")
    assert lost == ["datasets", "adapters", "versions", "promotions", "reports"]
    tried_again = {
        name.rpartition("-")[0]
        for record in caplog.records
        if "Retry 1/" in record.getMessage() and (name := getattr(record, "task_run_name", None))
    }
    assert tried_again == {"ingest", "train", "register", "promote", "report"}
    assert len(trainings) == 1, "a training that has ended is not repeated, because its upload failed"
    assert [version.version for version in Versions(open_store()).all("l")] == ["1"], "nothing is registered twice"


def test_a_flow_of_ones_own_trains_and_judges_and_registers_nothing(
    tiny_base: Path, bank_home: Path, copy_to_home: Callable[[Path], Path]
) -> None:
    """docs/own_flow.py, as it stands there."""
    example = runpy.run_path(str(Path(__file__).parents[3] / "docs" / "own_flow.py"))
    values = {"lineage": "l", "base_model": str(tiny_base), "task": BANK, "train": QUICK, "gate": FAIL}
    assert asyncio.run(example["try_out"](parse(AdaptSpec, values, "test"))).startswith("rejected: bank ")
    assert Versions(open_store()).all("l") == ()
    copy_to_home(bank_home)
    assert "version 1 has learned from this arrival" in asyncio.run(
        example["try_out"](parse(AdaptSpec, values, "test"))
    )


def test_what_goes_through_the_stages_is_plain(
    tiny_base: Path, bank_home: Path, copy_to_home: Callable[[Path], Path]
) -> None:
    """A stage can be started with what was written as JSON: on another day, by another program."""
    copy_to_home(bank_home)
    prepared = prepare(tiny_base, CLINIC)
    again = AdaptationRun.model_validate_json(prepared.model_dump_json())
    assert (again.run_key, again.tasks, again.renewal, again.spec) == (
        prepared.run_key,
        prepared.tasks,
        prepared.renewal,
        prepared.spec,
    )
    trained = asyncio.run(train_version.fn(again))
    report = asyncio.run(evaluate_version.fn(again, TrainedAdapter.model_validate_json(trained.model_dump_json())))
    assert set(report.accuracies) == {"bank", "clinic"} and report.adapter is not None and report.adapter.is_changed


def test_a_mistake_in_the_data_is_not_tried_again(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "", "label": "a"}\n' * 5)
    tries = counted(monkeypatch, ingest_stage, "build_dataset")
    with pytest.raises(DataValidationError):
        run(tiny_base, {"name": "bank", "data": str(bad)})
    assert len(tries) == 1
