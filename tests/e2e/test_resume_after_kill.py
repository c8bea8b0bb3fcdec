"""A training is killed with kill -9; the same command resumes it, loses nothing, and makes one version."""

from __future__ import annotations

import shutil
import subprocess
import time
from pathlib import Path

import pytest
import yaml
from mlflow import MlflowClient

from benchmarks.tiny_base import EXAMPLES, NO_LIMITS
from infra.run_journal import RunJournal
from infra.settings import TrackingSettings
from infra.store.local import FileStore
from tests.e2e.command import command, deal, environment
from tests.e2e.conftest import AdaptHere
from tests.registering import in_mlflow

TOLERANCE = 0.02
"""Of a step's loss: bf16 weights round, and the order of sums may differ between two processes."""

pytestmark = [pytest.mark.e2e, pytest.mark.nightly]


def losses(home: Path, run_key: str) -> dict[int, float]:
    """The losses that MLflow has of a run, which are those of its journal."""
    tracked = in_mlflow("l", run_key, TrackingSettings(home=home))
    history = tracked.client.get_metric_history(tracked.run_id, "train/loss")
    assert len(history) == len({point.step for point in history}), "a step was logged twice"
    found = {point.step: point.value for point in sorted(history, key=lambda point: point.step)}
    journal = RunJournal(FileStore(home / "store")).find("l", run_key)
    assert journal is not None and dict(journal.curve["train/loss"]) == found
    return found


def servers_of(home: Path) -> list[int]:
    """The Prefect APIs that belong to a home."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            is_server = b"prefect.server.api.server:create_app" in (folder / "cmdline").read_bytes()
            if is_server and str(home).encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
        except OSError:
            continue
    return found


@pytest.fixture
def spec(tiny_base: Path, tmp_path: Path) -> Path:
    values = {
        "lineage": "l",
        "base_model": str(tiny_base),
        "task": {
            "name": "clinic",
            "data": str(EXAMPLES / "clinic" / "train.csv"),
            "test_data": str(EXAMPLES / "clinic" / "test.csv"),
            "columns": {"text": "note", "label": "finding"},
        },
        "train": {"max_steps": 60, "max_prompt_tokens": 192, "checkpoint_steps": 10},
        "gate": NO_LIMITS,
    }
    path = tmp_path / "clinic.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_killed_and_started_again_equals_uninterrupted(spec: Path, tmp_path: Path, adapt_here: AdaptHere) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    first = tmp_path / "bank.yaml"
    values = yaml.safe_load(spec.read_text())
    values["task"] = {"name": "bank", "data": str(EXAMPLES / "bank" / "train.jsonl")}
    values["train"] |= {"max_steps": 5, "checkpoint_steps": 0}
    first.write_text(yaml.safe_dump(values))
    # With a parent the second task is learned by the method, not by plain LoRA.
    assert adapt_here(first, whole).version == "1"
    shutil.copytree(whole, killed)
    expected = deal(whole, "adapt", str(spec))

    process = subprocess.Popen(
        command(killed, "adapt", str(spec)),
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait_for_checkpoint(killed, process, step=20)
    process.kill()
    process.wait()
    assert servers_of(killed), "the killed command leaves its API behind"

    result = deal(killed, "adapt", str(spec))
    assert result["status"] == "promoted" and result["version"] == "2" and result["parent_version"] == "1"
    assert result["resumed_from_step"] is not None and result["resumed_from_step"] >= 20
    assert result["run_key"] != "" and result["num_steps"] == 60
    client = MlflowClient(f"sqlite:///{killed / 'mlflow.db'}")
    assert len(client.search_model_versions("name = 'l'")) == 2
    experiment = client.get_experiment_by_name("deal/l").experiment_id
    assert [run.info.status for run in client.search_runs([experiment])] == ["FINISHED"] * 2
    resumed, uninterrupted = losses(killed, result["run_key"]), losses(whole, expected["run_key"])
    assert list(resumed) == list(uninterrupted) == list(range(1, 61))
    assert resumed == pytest.approx(uninterrupted, abs=TOLERANCE)
    assert not servers_of(killed), "the next command ends what the killed one left, and then its own"
    assert not any(killed.joinpath("work").rglob("checkpoint-*"))


def wait_for_checkpoint(home: Path, process: subprocess.Popen[bytes], step: int) -> None:
    """Return once the checkpoint of that step is complete."""
    while not any(home.joinpath("work").rglob(f"checkpoints/checkpoint-{step}/COMPLETE")):
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.02)
