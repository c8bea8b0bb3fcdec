"""A check of the promises that every strategy makes to the training loop and to a lineage, for a package's own tests.

Example:
    >>> def test_mine_keeps_the_promises(tmp_path):  # doctest: +SKIP
    ...     check_strategy("mine", tmp_path)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from datasets import Dataset
from safetensors.torch import load_file
from torch import Tensor
from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

from deal_core.adapter.files import WEIGHTS_FILE
from deal_core.adapter.state import load_method_state
from deal_core.base_model.load import BaseModel, load_base
from deal_core.config import AdapterConfig, TrainConfig
from deal_core.data.schema import TaskSchema
from deal_core.method_config import MethodConfig
from deal_core.strategies import strategy_class
from deal_core.training.train import TrainingSetup, train_adapter

SHAPES = TaskSchema(name="shapes", labels=("round", "flat"), instruction="Which shape has it?")
SIZES = TaskSchema(name="sizes", labels=("large", "small"), instruction="How big is it?")
STEPS = TrainConfig(
    max_steps=6, batch_size=4, learning_rate=5e-3, max_prompt_tokens=96, checkpoint_steps=2, schedule="constant"
)
NUM_ROWS = 12


def check_strategy(name: str, folder: Path) -> None:
    """Learn two tasks with a strategy on a tiny model with random weights, and check what the strategy promises.

    It takes a few seconds. `folder` takes the model and the adapters.

    Raises:
        ConfigError: There is no such strategy, or its class does not fit the name.
        AssertionError: A promise is broken. The message says which.
    """
    cls = strategy_class(name)
    known = {
        key for part, values in asdict(MethodConfig()).items() for key in (part, *(f"{part}.{each}" for each in values))
    }
    assert set(cls.reads) <= known, f"reads names no settings: {sorted(set(cls.reads) - known)}."
    _build_base(folder / "base")
    base = load_base(str(folder / "base"), folder / "cache", precision="fp32")
    first, second = folder / "first", folder / "second"
    _learn(base, name, SHAPES, None, first)
    _learn(base, name, SIZES, first, second)

    before, after = _weights(first), _weights(second)
    assert before.keys() == after.keys(), "a later task changed the adapter's modules."
    assert any(not torch.equal(before[key], after[key]) for key in before if before[key].shape == after[key].shape) or (
        cls.num_new_slots(AdapterConfig()) > 0
    ), "a later task changed nothing."
    if cls.num_new_slots(AdapterConfig()) == 0:
        assert all(before[key].shape == after[key].shape for key in before), "the adapter grew; see num_new_slots."
    assert all(value.isfinite().all() for value in after.values()), "a weight is not finite."

    state = load_method_state(second)
    assert state.strategy == name, f"the state is of {state.strategy!r}; finish returns name."
    if state.stores == "nothing":
        assert not state.stored_rows, "stores is nothing, but the state holds rows."

    again = folder / "again"
    _learn(base, name, SIZES, first, again)
    _require_equal(after, _weights(again), "the same rows and the same seed gave another adapter.")

    resumed = folder / "resumed"
    try:
        _learn(base, name, SIZES, first, resumed, on_log=_stop_at(4))
    except _StoppedError:
        _learn(base, name, SIZES, first, resumed)
    _require_equal(after, _weights(resumed), "a resumed run gave another adapter; see checkpoint and restore.")


class _StoppedError(Exception):
    pass


def _stop_at(last: int) -> Callable[[int, object], None]:
    def on_log(step: int, _: object) -> None:
        if step == last:
            raise _StoppedError

    return on_log


def _learn(
    base: BaseModel,
    strategy: str,
    task: TaskSchema,
    parent: Path | None,
    output: Path,
    on_log: Callable[[int, object], None] | None = None,
) -> None:
    old_tasks = () if parent is None else (SHAPES,)
    rows = [{"input": f"{task.name} number {number}", "output": task.labels[number % 2]} for number in range(NUM_ROWS)]
    train_adapter(
        base,
        Dataset.from_list(rows),
        TrainingSetup(
            task=task,
            old_tasks=old_tasks,
            strategy=strategy,
            adapter=AdapterConfig(rank=4, alpha=8),
            method=MethodConfig(),
            train=STEPS,
        ),
        parent_folder=parent,
        output_folder=output,
        checkpoint_folder=output.with_name(f"{output.name}-checkpoints"),
        on_log=on_log,
    )


def _weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / WEIGHTS_FILE)


def _require_equal(one: dict[str, Tensor], other: dict[str, Tensor], problem: str) -> None:
    assert all(torch.equal(one[key], other[key]) for key in one), problem


def _build_base(folder: Path) -> None:
    """Write a Llama with two layers of width 32 and random weights; its tokens are bytes."""
    tokenizer = ByT5Tokenizer(extra_ids=0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=512,
                tie_word_embeddings=True,
                initializer_range=0.2,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
