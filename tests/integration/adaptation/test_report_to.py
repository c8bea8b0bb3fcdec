"""train.report_to: a training's figures in other tools too, without an effect on the version."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from deal_core.config import TrainConfig
from deal_core.errors import ConfigError
from flows.benchmark import BenchmarkSpec
from tests.adapting import BANK, CLINIC, run

STEPS = {"max_steps": 3, "max_prompt_tokens": 192, "max_answer_tokens": 12, "checkpoint_steps": 2}


@pytest.mark.usefixtures("prefect_api")
def test_tensorboard_has_every_step_of_the_training(
    home: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = run(tiny_base, BANK, train={**STEPS, "report_to": ["tensorboard"]})
    events = EventAccumulator(str(home / "tensorboard" / "l" / told.run_key[:16]))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3]
    assert all(event.value > 0 for event in events.Scalars("train/loss"))
    assert not list((home / "work").rglob("events.out*")), "checkpoints have no copy"
    monkeypatch.setitem(sys.modules, "trackio", None)
    repeat = run(tiny_base, BANK, train={**STEPS, "report_to": ["trackio"]})
    assert repeat.status == "repeat", "it is no part of a run's identity"
    with pytest.raises(ConfigError, match="trackio, which is not installed here; pip install trackio"):
        run(tiny_base, BANK, again=True, train={**STEPS, "report_to": ["trackio"]})


@pytest.mark.nightly
@pytest.mark.usefixtures("prefect_api", "home")
def test_wandb_has_a_run_for_each_training(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)
    for task in (BANK, CLINIC):
        run(tiny_base, task, train={**STEPS, "report_to": ["wandb"]})
    assert len(list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))) == 2


def test_it_decides_nothing_and_is_not_for_cells() -> None:
    plain = TrainConfig()
    assert replace(plain, report_to=("trackio",)).deciding() == plain.deciding()
    with pytest.raises(ValueError, match=r"train\.report_to is not for cells"):
        BenchmarkSpec(train=TrainConfig(report_to=("trackio",)))
