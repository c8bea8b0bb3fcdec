"""A job whose files go through the store: where they lie, and that a second try goes on from the stored checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from deal_core.adapter.files import WEIGHTS_FILE
from deal_core.config import AdapterConfig, TrainConfig
from deal_core.method_config import MethodConfig
from deal_core.training.jobs import TrainingJob, read_result
from deal_core.training.train import TrainingSetup
from infra.stored_job import download_result, upload_job, work_on
from tests.unit.deal_core.conftest import TASK, make_rows

PREFIX = "adapters/l/run/jobs/train"


@pytest.fixture
def job(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrainingJob:
    from deal_core.base_model.load import load_base

    monkeypatch.setenv("DEAL_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("DEAL_CACHE_DIR", str(tmp_path / "cache"))
    make_rows(12).to_parquet(str(tmp_path / "train.parquet"))
    return TrainingJob(
        base_source=str(tiny_base),
        base_sha256=load_base(str(tiny_base), tmp_path / "cache", precision="fp32").sha256,
        cache_folder=tmp_path / "no such folder",
        precision="fp32",
        parent_folder=None,
        rows_file=tmp_path / "train.parquet",
        setup=TrainingSetup(
            task=TASK,
            strategy="seq_lora",
            adapter=AdapterConfig(rank=4),
            method=MethodConfig(),
            train=TrainConfig(max_steps=7, batch_size=2, checkpoint_steps=1, max_prompt_tokens=64),
        ),
        output_folder=tmp_path / "out",
        checkpoint_folder=tmp_path / "checkpoints",
    )


def test_a_second_try_goes_on_from_the_stored_checkpoint_with_the_same_result(job, tmp_path) -> None:
    from infra.store.opening import open_store

    store = open_store()
    upload_job(store, job, PREFIX)
    messages: list[Mapping[str, Any]] = []
    work_on(PREFIX, messages.append)
    download_result(store, job, PREFIX)
    assert not list(store.list("adapters")), "rows, checkpoints and adapter leave the store"
    whole = read_result(job, messages[-1]["result"])
    assert [message["step"] for message in messages[:-1]] == [1, 2, 3, 4, 5, 6, 7] and whole.resumed_from_step is None

    def die(message: Mapping[str, Any]) -> None:
        if message.get("step") == 5:
            raise InterruptedError

    again = replace(job, output_folder=tmp_path / "again")
    upload_job(store, again, PREFIX)
    with pytest.raises(InterruptedError):
        work_on(PREFIX, die)
    kept = {info.key.split("/")[6] for info in store.list(f"{PREFIX}/checkpoints")}
    assert kept == {"checkpoint-3", "checkpoint-4", "steps.jsonl"}
    store.delete(f"{PREFIX}/checkpoints/checkpoint-4/COMPLETE")
    messages.clear()
    work_on(PREFIX, messages.append)
    download_result(store, again, PREFIX)
    resumed = read_result(job, messages[-1]["result"])
    assert resumed.resumed_from_step == 3 and resumed.losses == whole.losses
    assert [message["step"] for message in messages[:-1]] == [1, 2, 3, 4, 5, 6, 7]
    first, second = (load_file(tmp_path / name / WEIGHTS_FILE) for name in ("out", "again"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert asdict(whole)["num_steps"] == 7
