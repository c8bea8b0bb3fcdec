"""The same training on a CUDA device: bf16 base, fp32 adapter, resume, and each option of a training."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaModel

from deal_core.base_model.load import find_config, load_base, precision_name
from deal_core.config import AdapterConfig, TrainConfig
from deal_core.data.schema import TaskSchema
from deal_core.evaluation.answering import ServedTask
from deal_core.evaluation.batches import MAX_BATCH_TOKENS, batch_tokens, in_batches
from deal_core.evaluation.generation import answer_inputs
from deal_core.method_config import MethodConfig
from deal_core.planning.memory import BatchShape, MethodShape, plan_memory
from deal_core.planning.meta_model import measure_model
from deal_core.training.elastic import run_in_processes
from deal_core.training.jobs import TrainingJob
from deal_core.training.train import TrainingResult, TrainingSetup, train_adapter
from deal_core.training.trainer import AdapterTrainer
from tests.turn_bases import KINDS, build_turn_base

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


def test_products_of_the_adapter_are_bf16_and_its_weights_fp32(tiny_base: Path, tmp_path: Path) -> None:
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        pytest.skip("this device has no bf16")
    types = set[torch.dtype]()

    def note(module: nn.Module, given: Any, output: Any) -> None:
        if isinstance(module, nn.Linear) and module.weight.requires_grad:
            types.add(output.dtype)

    with torch.nn.modules.module.register_module_forward_hook(note):
        run(tiny_base, tmp_path, None)
    assert types == {torch.bfloat16}
    kept = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in kept.values()} == {torch.float32}


def test_rehearsed_rows_take_no_pass_of_their_own(tiny_base: Path, tmp_path: Path) -> None:
    passes = 0

    def note(module: nn.Module, given: Any, output: Any) -> None:
        nonlocal passes
        passes += isinstance(module, LlamaModel) and module.training

    run(tiny_base, tmp_path / "first", None)
    with torch.nn.modules.module.register_module_forward_hook(note):
        later = run(tiny_base, tmp_path / "later", tmp_path / "first" / "adapter")
    assert "rehearsed 6 rows of one old task, 4 a step" in later.notes and passes == STEPS.max_steps


def test_answers_do_not_depend_on_the_size_of_a_batch(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = load_base(str(tiny_base), tmp_path / "cache", precision="fp32")
    served = ServedTask(schema=TASK, max_prompt_tokens=64, max_new_tokens=5)
    inputs = [row["input"] for row in ROWS]
    assert batch_tokens(base.model) > MAX_BATCH_TOKENS
    together = answer_inputs(base.model, base.tokenizer, served, inputs)
    monkeypatch.setattr("deal_core.evaluation.batches.batch_tokens", lambda model: 100)
    apart = answer_inputs(base.model, base.tokenizer, served, inputs)
    assert [answer.text for answer in apart] == [answer.text for answer in together]


def test_a_batch_that_does_not_fit_into_the_memory_is_divided(tiny_base: Path, tmp_path: Path) -> None:
    base = load_base(str(tiny_base), tmp_path / "cache")
    free, _ = torch.cuda.mem_get_info()

    def read(batch: list[int]) -> int:
        torch.empty(len(batch) * free // 3, dtype=torch.uint8, device="cuda")
        return len(batch)

    found = [size for _, size in in_batches(base.model, [8] * 10, read)]
    assert sum(found) == 10 and max(found) == 2


def test_held_back_rows_choose_the_step_that_is_kept(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deal_core.config.MIN_VALIDATED", len(ROWS))
    train = replace(STEPS, validation_share=0.25)
    whole = run(tiny_base, tmp_path / "whole", None, train=train)
    assert whole.kept_step in dict(whole.validation_losses)
    with pytest.raises(InterruptedError):
        run(tiny_base, tmp_path / "again", None, die_at=7, train=train)
    resumed = run(tiny_base, tmp_path / "again", None, train=train)
    assert dict(resumed.validation_losses) == pytest.approx(dict(whole.validation_losses), rel=2e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_ends_where_its_turn_ends(kind: str, tmp_path: Path) -> None:
    build_turn_base(tmp_path / "base", KINDS[kind])
    base = load_base(str(tmp_path / "base"), tmp_path / "cache", precision="fp32")
    task = ServedTask(schema=TaskSchema(name="yes", format="chat"), max_prompt_tokens=64, max_new_tokens=8)
    (answer,) = answer_inputs(
        base.model, base.tokenizer, task, [json.dumps([{"role": "user", "content": "It barks ."}])]
    )
    assert answer.text == "yes" and not answer.is_cut


def test_a_training_takes_about_the_memory_that_is_planned(tiny_base: Path, tmp_path: Path) -> None:
    run(tiny_base, tmp_path / "first", None, train=replace(STEPS, max_steps=1))  # libraries take their memory once
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(tiny_base, tmp_path / "second", None)
    peak = torch.cuda.max_memory_allocated() - before
    config = find_config(str(tiny_base), tmp_path / "cache").config
    batch = BatchShape(num_rows=STEPS.batch_size, num_tokens=64, num_answer_tokens=4)
    precision = precision_name("auto")
    planned = plan_memory(
        measure_model(config, ADAPTER),
        batch,
        MethodShape(rank=ADAPTER.rank, strategy="deal", method=MethodConfig(), is_first_task=True),
        train=STEPS,
        precision=precision,
        on_cpu=False,
    )
    assert peak < 2 * planned.total, "small tensors take whole blocks of memory"


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")
@pytest.mark.parametrize("shard", ["none", "base"])
def test_two_devices_give_the_losses_of_one(shard, tiny_base, tmp_path):
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
        shard=shard,
    )
    two = run_in_processes(job, tmp_path / "ranks")
    assert [loss for _, loss in two.losses] == pytest.approx([loss for _, loss in one.losses], rel=2e-2)
