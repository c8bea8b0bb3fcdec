"""A tiny base model in fp32, a task, rows, and a parent adapter that has learned something."""

from __future__ import annotations

import copy
import functools
import itertools
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, disable_progress_bars
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from deal_core.adapter.files import WEIGHTS_FILE
from deal_core.base_model.load import BaseModel, load_base
from deal_core.config import AdapterConfig, TrainConfig
from deal_core.data.schema import TaskSchema
from deal_core.evaluation.answering import SERVED_FILE, ServedTask, ServedVersion
from deal_core.method_config import MethodConfig
from deal_core.training.train import TrainingResult, TrainingSetup, train_adapter
from tests.conftest import MakeOnce

TASK = TaskSchema(name="colours", labels=("red", "green", "blue"), instruction="Which colour is meant?")
WORDS = {"red": "rose fire blood", "green": "grass leaf moss", "blue": "sea sky ice"}
SHORT = TrainConfig(
    max_steps=4, batch_size=4, learning_rate=5e-3, schedule="constant", balance_labels=False, max_prompt_tokens=64
)
SPECIAL_IDS = ("pad_token_id", "bos_token_id", "eos_token_id")
PARTS = ("deal", "rehearsal", "selection", "strategy_options")
TONE = TaskSchema(name="tone", format="completion", instruction="Answer.", metric="preference", learns_preferences=True)
"""A task that learns preferences; `pairs` makes its rows."""


def at_night(*cases: Any) -> list[Any]:
    """Return parameters for `make nightly` alone; a tuple is one case of several arguments."""
    return [pytest.param(*(each if isinstance(each, tuple) else (each,)), marks=pytest.mark.nightly) for each in cases]


def as_served(schema: TaskSchema, max_new_tokens: int = 50) -> ServedTask:
    return ServedTask(schema=schema, max_prompt_tokens=64, max_new_tokens=max_new_tokens)


def make_rows(num_rows: int, first: int = 0) -> Dataset:
    labels = list(WORDS)
    rows = []
    for i in range(first, first + num_rows):
        label = labels[i % 3]
        word = WORDS[label].split()[(i // 3) % 3]
        rows.append({"input": f"message {i} about {word} " + "and more " * (i % 5), "output": label})
    return Dataset.from_list(rows)


def pairs(num_rows: int) -> Dataset:
    """Pairs of answers that differ in length and have the number of their pair as third word."""
    return Dataset.from_list(
        [
            {
                "input": f"tap {i} drips " + "and more " * (i % 4),
                "output": f"red rose {i} " + "sea " * (i % 3),
                "rejected": f"blue moss {i}" + " sky" * (i % 5),
            }
            for i in range(num_rows)
        ]
    )


@pytest.fixture
def offline_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The Hub's cache folder, with the network switched off as HF_HUB_OFFLINE does."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.fixture(autouse=True)
def quiet() -> None:
    disable_progress_bars()
    torch.set_num_threads(1)


@pytest.fixture
def task() -> TaskSchema:
    return TASK


@pytest.fixture
def rows() -> Callable[..., Dataset]:
    return make_rows


def small_model(model_type: str, vocab_size: int = 64, **changes: Any) -> PreTrainedModel:
    """A model of two layers with random weights, of one of transformers' types."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 256}
    heads, ids = {"num_attention_heads": 4, "num_key_value_heads": 2}, dict(zip(SPECIAL_IDS, range(3), strict=True))
    config = CONFIG_MAPPING[model_type](vocab_size=vocab_size, **sizes, **heads, **ids, **changes)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
    return model


@pytest.fixture(scope="session")
def loaded_base(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    return load_base(str(tiny_base), tmp_path_factory.mktemp("cache"), precision="fp32")


@pytest.fixture
def base(loaded_base: BaseModel) -> BaseModel:
    """A base model that the test may change."""
    return copy.deepcopy(loaded_base)


@dataclass
class Run:
    """Results of one training run for a test."""

    result: TrainingResult
    folder: Path
    losses: list[float] = field(default_factory=list)


def train_into(folder: Path, base: BaseModel, strategy: str, parent: Path | None = None, **changes: Any) -> Run:
    """Train with small defaults that the changes override; the adapter's folder is `folder`/adapter."""
    given = {
        "rows": make_rows(24),
        "output_folder": folder / "adapter",
        "checkpoint_folder": folder / "checkpoints",
        **changes,
    }
    setup = TrainingSetup(
        task=given.pop("task", TASK),
        old_tasks=tuple(given.pop("old_tasks", ())),
        strategy=strategy,
        adapter=given.pop("adapter", AdapterConfig(rank=4)),
        method=MethodConfig(**{name: given.pop(name) for name in PARTS if name in given}),
        train=given.pop("train", SHORT),
    )
    result = train_adapter(base, setup=setup, parent_folder=parent, **given)
    return Run(result, given["output_folder"], [loss for _, loss in result.losses])


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The adapter's weights in a folder, by name."""
    return dict(load_file(folder / WEIGHTS_FILE))


def same_weights(one: Path, other: Path) -> bool:
    """Whether two adapters are equal, bit for bit."""
    first, second = weights(one), weights(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def assert_close_weights(one: Path, other: Path, *, rtol: float, atol: float) -> None:
    """Two adapters are equal within rounding."""
    expected, found = weights(one), weights(other)
    assert expected.keys() == found.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=rtol, atol=atol)


Train = Callable[..., Run]


@pytest.fixture
def train(base: BaseModel, tmp_path: Path) -> Train:
    """Train on the test's base model; every call gets its own folder."""
    numbers = itertools.count(1)

    def run(strategy: str = "deal", parent: Path | None = None, **changes: Any) -> Run:
        return train_into(tmp_path / f"run-{next(numbers)}", base, strategy, parent, **changes)

    return run


@pytest.fixture
def killed_and_resumed(train: Train, tmp_path: Path) -> Train:
    """Train, die after the step `at`, and train again with the same arguments; return the second run."""

    def run(strategy: str, parent: Path | None = None, *, at: int, **given: Any) -> Run:
        def die(step: int, _: object) -> None:
            if step == at:
                raise InterruptedError

        folders = {"output_folder": tmp_path / "killed", "checkpoint_folder": tmp_path / "killed-checkpoints"}
        with pytest.raises(InterruptedError):
            train(strategy, parent, **given, **folders, on_log=die)
        return train(strategy, parent, **given, **folders)

    return run


@pytest.fixture(scope="session")
def one_task_learned(loaded_base: BaseModel, made_once: MakeOnce) -> Path:
    """Folder of an adapter that has learned one task; tests take a copy, `parent`."""
    base = copy.deepcopy(loaded_base)
    first = replace(SHORT, max_steps=12, learning_rate=2e-2)
    rows = make_rows(24, first=100)
    made = made_once("one-task", lambda folder: train_into(folder, base, "seq_lora", rows=rows, train=first))
    return made / "adapter"


@pytest.fixture(scope="session")
def trained_once(loaded_base: BaseModel, one_task_learned: Path, tmp_path_factory: pytest.TempPathFactory) -> Train:
    """Train a second task, or the first with `is_first`, once for all tests that give these arguments and only read."""

    @functools.cache
    def run(strategy: str = "deal", *, is_first: bool = False, **given: Any) -> Run:
        parent = None if is_first else one_task_learned
        return train_into(tmp_path_factory.mktemp("trained"), copy.deepcopy(loaded_base), strategy, parent, **given)

    return run


@pytest.fixture
def parent(one_task_learned: Path, tmp_path: Path) -> Path:
    """A copy of the folder of an adapter that has learned one task."""
    return shutil.copytree(one_task_learned, tmp_path / "parent")


@pytest.fixture
def served_version(base: BaseModel, tiny_base: Path) -> ServedVersion:
    """A version that knows a chat and a task with labels."""
    return ServedVersion(
        lineage="l",
        base_source=str(tiny_base),
        base_name=base.name,
        base_sha256=base.sha256,
        newest_task="colours",
        tasks=(
            ServedTask(schema=TaskSchema(name="help", format="chat"), max_prompt_tokens=64, max_new_tokens=3),
            ServedTask(schema=TASK, max_prompt_tokens=64, max_new_tokens=5),
        ),
    )


@pytest.fixture
def served_folder(parent: Path, served_version: ServedVersion) -> Path:
    """The folder of such a version."""
    (parent / SERVED_FILE).write_text(json.dumps(served_version.to_json()))
    return parent
