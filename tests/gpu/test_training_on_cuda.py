"""The same training on a CUDA device: bf16 base, fp32 adapter, resume, and each option of a training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file

from deal_core.base_model.load import load_base
from deal_core.config import AdapterConfig, TrainConfig
from deal_core.data.schema import TaskSchema
from deal_core.method_config import MethodConfig
from deal_core.training.jobs import TrainingJob
from deal_core.training.ranks import run_in_processes
from deal_core.training.train import TrainingResult, TrainingSetup, train_adapter
from deal_core.training.trainer import AdapterTrainer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]

TASK = TaskSchema(name="colours", labels=("red", "green"), instruction="Which colour is meant?")
NEXT = replace(TASK, name="tones", instruction="Which tone is meant?")
"""Learned after TASK, of which rows are kept and rehearsed."""
ROWS = [
    {"input": f"message {i} about {('blood', 'grass')[i % 2]}", "output": ("red", "green")[i % 2]} for i in range(24)
]
ADAPTER = AdapterConfig(rank=4)
STEPS = TrainConfig(max_steps=12, batch_size=4, learning_rate=1e-2, max_prompt_tokens=64, checkpoint_steps=4)


def run(
    tiny_base: Path,
    work: Path,
    parent: Path | None,
    die_at: int | None = None,
    adapter: AdapterConfig = ADAPTER,
    train: TrainConfig = STEPS,
) -> TrainingResult:
    def on_log(step: int, _: object) -> None:
        if step == die_at:
            raise InterruptedError

    base = load_base(str(tiny_base), work / "cache", precision="auto")
    return train_adapter(
        base,
        Dataset.from_list(ROWS),
        TrainingSetup(
            task=NEXT if parent else TASK,
            old_tasks=(TASK,) if parent else (),
            strategy="deal",
            adapter=adapter,
            method=MethodConfig(),
            train=train,
        ),
        parent_folder=parent,
        output_folder=work / "adapter",
        checkpoint_folder=work / "checkpoints",
        on_log=on_log,
    )


def test_learns_and_resumes(tiny_base, tmp_path):
    first = run(tiny_base, tmp_path / "first", None)
    parent = tmp_path / "first" / "adapter"
    assert first.losses[-1][1] < first.losses[0][1]
    whole = run(tiny_base, tmp_path / "whole", parent)
    assert whole.notes[0] == "rehearsed 6 rows of one old task, 4 a step"
    with pytest.raises(InterruptedError):
        run(tiny_base, tmp_path / "again", parent, die_at=7)
    resumed = run(tiny_base, tmp_path / "again", parent)
    assert resumed.resumed_from_step == 4
    assert [loss for _, loss in resumed.losses] == pytest.approx([loss for _, loss in whole.losses], rel=2e-2)


OPTIONS: dict[str, dict[str, Any]] = {
    "all-linear": {"adapter": AdapterConfig(rank=4, target_modules="all-linear")},
    "rslora": {"adapter": AdapterConfig(rank=4, rslora=True)},
    "dropout": {"adapter": AdapterConfig(rank=4, dropout=0.1)},
    "warm-up": {"train": replace(STEPS, warmup_share=0.25)},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_learns_and_resumes_with_each_option(name: str, tiny_base: Path, tmp_path: Path) -> None:
    given = OPTIONS[name]
    first = run(tiny_base, tmp_path / "first", None, **given)
    parent = tmp_path / "first" / "adapter"
    assert first.losses[-1][1] < first.losses[0][1]
    whole = run(tiny_base, tmp_path / "whole", parent, **given)
    with pytest.raises(InterruptedError):
        run(tiny_base, tmp_path / "again", parent, die_at=7, **given)
    resumed = run(tiny_base, tmp_path / "again", parent, **given)
    assert [loss for _, loss in resumed.losses] == pytest.approx([loss for _, loss in whole.losses], rel=2e-2)


KERNELS: dict[str, dict[str, Any]] = {
    "eager": {"attention": "eager"},
    "sdpa": {"attention": "sdpa"},
    "padding-free": {"padding_free": True},
    "compiled": {"torch_compile": True},
    "compiled without padding": {"torch_compile": True, "padding_free": True},
    "flash": {"attention": "flash_attention_2"},
    "flash without padding": {"attention": "flash_attention_2", "padding_free": True},
}


@pytest.mark.parametrize("name", KERNELS)
def test_each_way_to_compute_a_step_gives_the_usual_losses(name: str, tiny_base: Path, tmp_path: Path) -> None:
    if "flash" in name:
        pytest.importorskip("flash_attn")
    usual = run(tiny_base, tmp_path / "usual", None)
    parent = tmp_path / "usual" / "adapter"
    for number, start in enumerate((None, parent)):
        expected = usual if start is None else run(tiny_base, tmp_path / "usual-next", start)
        found = run(tiny_base, tmp_path / f"{number}", start, train=replace(STEPS, **KERNELS[name]))
        assert [loss for _, loss in found.losses] == pytest.approx([loss for _, loss in expected.losses], rel=5e-2)


def test_a_step_of_adamw_is_one_kernel(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[torch.optim.Optimizer] = []
    create = AdapterTrainer.create_optimizer

    def spy(self: AdapterTrainer, model: Any = None) -> torch.optim.Optimizer:
        made.append(create(self, model))
        return made[-1]

    monkeypatch.setattr(AdapterTrainer, "create_optimizer", spy)
    run(tiny_base, tmp_path, None)
    assert made[-1].defaults["fused"]


@pytest.mark.parametrize("quantize", ["8bit", "4bit"])
def test_learns_on_a_quantized_base(quantize, tiny_base, tmp_path):
    pytest.importorskip("bitsandbytes")
    base = load_base(str(tiny_base), tmp_path / "cache", quantize=quantize)
    assert base.is_quantized
    folder = tmp_path / "adapter"
    result = train_adapter(
        base,
        Dataset.from_list(ROWS),
        TrainingSetup(
            task=TASK,
            strategy="deal",
            adapter=AdapterConfig(rank=4),
            method=MethodConfig(),
            train=replace(STEPS, quantize=quantize),
        ),
        parent_folder=None,
        output_folder=folder,
        checkpoint_folder=tmp_path / "checkpoints",
    )
    assert result.losses[-1][1] < result.losses[0][1]
    assert {tensor.dtype for tensor in load_file(folder / "adapter_model.safetensors").values()} == {torch.float32}


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")
def test_two_devices_give_the_losses_of_one(tiny_base, tmp_path):
    one = run(tiny_base, tmp_path / "one", None)
    rows_file = tmp_path / "rows.parquet"
    Dataset.from_list(ROWS).to_parquet(str(rows_file))
    job = TrainingJob(
        setup=TrainingSetup(
            task=TASK,
            strategy="deal",
            adapter=AdapterConfig(rank=4),
            method=MethodConfig(),
            train=replace(STEPS, num_processes=2),
        ),
        base_source=str(tiny_base),
        base_sha256=load_base(str(tiny_base), tmp_path / "cache").sha256,
        cache_folder=tmp_path / "cache",
        parent_folder=None,
        rows_file=rows_file,
        output_folder=tmp_path / "two",
        checkpoint_folder=tmp_path / "two-checkpoints",
    )
    two = run_in_processes(job, tmp_path / "ranks")
    assert [loss for _, loss in two.losses] == pytest.approx([loss for _, loss in one.losses], rel=2e-2)
