"""A check of the promises that every strategy makes to the training loop and to a lineage, for a package's own tests.

Example:
    >>> def test_mine_keeps_the_promises(tmp_path):  # doctest: +SKIP
    ...     check_strategy("mine", tmp_path)
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import torch
from datasets import Dataset
from safetensors.torch import load_file
from torch import Tensor
from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

from deal_core.adapter.files import WEIGHTS_FILE
from deal_core.adapter.state import load_method_state
from deal_core.base_model.load import load_base
from deal_core.config import AdapterConfig, TrainConfig
from deal_core.data.schema import TaskSchema
from deal_core.method_config import MethodConfig
from deal_core.strategies import strategy_class
from deal_core.training.train import TrainingSetup, train_adapter
from deal_core.training.trainer import OnLog

SHAPES = TaskSchema(name="shapes", labels=("round", "flat"), instruction="Which shape has it?")
SIZES = TaskSchema(name="sizes", labels=("large", "small"), instruction="How big is it?")
STEPS = TrainConfig(
    max_steps=6, batch_size=4, learning_rate=5e-3, max_prompt_tokens=96, checkpoint_steps=2, schedule="constant"
)
NUM_ROWS = 12


class _StoppedError(Exception):
    pass


def check_strategy(name: str, folder: Path) -> None:
    """Learn two tasks with a strategy on a tiny model with random weights, and check what the strategy promises.

    It takes a few seconds. `folder` takes the model and the adapters.

    Raises:
        ConfigError: There is no such strategy, or its class does not fit the name.
        AssertionError: A promise is broken. The message says which.
    """
    cls = strategy_class(name)
    parts = asdict(MethodConfig())
    settings = parts.keys() | {f"{part}.{setting}" for part, values in parts.items() for setting in values}
    assert set(cls.reads) <= settings, f"reads names no settings: {sorted(set(cls.reads) - settings)}."
    _build_base(folder / "base")
    base = load_base(str(folder / "base"), folder / "cache", precision="fp32")

    def learn(task: TaskSchema, parent: str | None, output: str, on_log: OnLog | None = None) -> dict[str, Tensor]:
        rows = [
            {"input": f"{task.name} number {number}", "output": task.labels[number % 2]} for number in range(NUM_ROWS)
        ]
        train_adapter(
            base,
            Dataset.from_list(rows),
            TrainingSetup(
                task=task,
                old_tasks=() if parent is None else (SHAPES,),
                strategy=name,
                adapter=AdapterConfig(rank=4, alpha=8),
                method=MethodConfig(),
                train=STEPS,
            ),
            parent_folder=None if parent is None else folder / parent,
            output_folder=folder / output,
            checkpoint_folder=folder / f"{output}-checkpoints",
            on_log=on_log,
        )
        return load_file(folder / output / WEIGHTS_FILE)

    before = learn(SHAPES, None, "first")
    after = learn(SIZES, "first", "second")
    grows = cls.num_new_slots(AdapterConfig()) > 0
    assert before.keys() == after.keys(), "a later task changed the adapter's modules."
    same_shape = [key for key in before if before[key].shape == after[key].shape]
    assert grows or any(not torch.equal(before[key], after[key]) for key in same_shape), "a later task changed nothing."
    assert grows or len(same_shape) == len(before), "the adapter grew; see num_new_slots."
    assert all(value.isfinite().all() for value in after.values()), "a weight is not finite."

    state = load_method_state(folder / "second")
    assert state.strategy == name, f"the state is of {state.strategy!r}; finish returns name."
    assert state.stores != "nothing" or not state.kept_rows, "stores is nothing, but the state holds rows."

    again = learn(SIZES, "first", "again")
    _require_equal(after, again, "the same rows and the same seed gave another adapter.")

    def stop(step: int, _: object) -> None:
        if step == 4:
            raise _StoppedError

    with suppress(_StoppedError):
        learn(SIZES, "first", "resumed", stop)
    resumed = learn(SIZES, "first", "resumed")
    _require_equal(after, resumed, "a resumed run gave another adapter; see checkpoint and restore.")


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
