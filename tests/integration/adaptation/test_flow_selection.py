"""Runs that train on chosen rows: every stage counts them, and a resumed run takes the same ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

import benchmarks  # noqa: F401  its scores
import tasks.adaptation.train as train_stage
from deal_core.adapter.state import load_method_state
from deal_core.method_config import SelectionConfig
from deal_core.strategies.kept_rows import rows_name, unpack
from deal_core.training.jobs import TrainingJob
from tasks.context import current_store
from tasks.lineage.version_files import borrowed_adapter
from tests.adapting import BANK, CLINIC, page_of, run, version_of

pytestmark = pytest.mark.usefixtures("prefect_api", "home")
TRAIN = {
    "num_epochs": 1,
    "batch_size": 4,
    "max_prompt_tokens": 192,
    "max_answer_tokens": 12,
    "checkpoint_steps": 0,
}


class _DiedError(Exception):
    pass


@pytest.mark.nightly
def test_a_resumed_run_trains_on_the_rows_that_it_chose_first(
    tiny_base: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(tiny_base, BANK, train=TRAIN, selection={"keep": 16})
    assert first.num_steps == 4 and first.dataset.num_train == 72
    settings: dict[str, Any] = {
        "train": TRAIN,
        "selection": {"score": "loss", "keep": 0.25, "noise": "name"},
    }
    trained_on: list[list[str]] = []
    learn = train_stage._train

    def die_once(training: TrainingJob, *rest: Any) -> Any:
        rows_file = training.rows_file
        trained_on.append(pq.read_table(rows_file).column("sha256").to_pylist())
        if len(trained_on) == 1:
            journal = json.loads((rows_file.parents[1] / "selection.json").read_text())
            assert len(journal["rows"]) == len(trained_on[0])
            raise _DiedError
        return learn(training, *rest)

    monkeypatch.setattr(train_stage, "_train", die_once)
    with pytest.raises(_DiedError):
        run(tiny_base, CLINIC, **settings)
    monkeypatch.setattr("deal_core.selection.choose._Choosing.make", None)  # a second choice would fail
    second = run(tiny_base, CLINIC, **settings)
    kept = SelectionConfig(keep=0.25).num_kept(second.dataset.num_train)
    assert trained_on[1] == trained_on[0] and len(trained_on[0]) == kept
    assert second.num_steps == -(-kept // 4)
    assert not list(home.rglob("selection.json")), "row numbers are of no use after the run"
    _, page = page_of(second)
    assert f"{kept} of {second.dataset.num_train} training rows were chosen by loss" in page
    assert f"learned from {kept} of {second.dataset.num_train} rows" in page
    assert "labels that were checked" in page or "no label could be checked" in page
    with borrowed_adapter(current_store(), version_of(second), with_method=True) as folder:
        rows = load_method_state(folder).kept_rows
    assert {name: len(unpack(packed)) for name, packed in rows.items()} == {
        rows_name("bank"): 4,
        rows_name("clinic"): round(kept / 4),
    }, "a quarter of the chosen rows, not of all"
