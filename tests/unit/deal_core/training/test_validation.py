"""Validation: rows that are held back choose the step that is kept, and end a training early."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from deal_core.config import TrainConfig
from deal_core.data.schema import TaskSchema
from deal_core.training import train as training
from deal_core.training.validation import PATIENCE, PER_EPOCH
from tests.unit.deal_core.conftest import TONE, Train, at_night, pairs, same_weights

STEPS_OF_EPOCH = 6
NOISE = TrainConfig(
    num_epochs=12,
    batch_size=4,
    learning_rate=0.1,
    max_grad_norm=0.0,
    schedule="constant",
    balance_labels=False,
    max_prompt_tokens=64,
    checkpoint_steps=4,
    validation_share=0.2,
)
"""Labels at random are learned by heart, so the loss of the rows that are held back soon rises."""


@pytest.fixture(autouse=True)
def few_rows_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deal_core.config.MIN_VALIDATED", 30)


@pytest.fixture
def noise(task: TaskSchema) -> Dataset:
    draw = random.Random(0)
    return Dataset.from_list(
        [{"input": f"message {i} about {i * 7919}", "output": draw.choice(task.labels)} for i in range(30)]
    )


def test_the_best_step_is_kept_and_the_training_ends_early(
    train: Train, noise: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    learned: list[int] = []
    divide = training._divide

    def note(*given: Any) -> tuple[list[int], list[int]]:
        learned[:] = divide(*given)[0]
        return divide(*given)

    monkeypatch.setattr(training, "_divide", note)
    found = train("seq_lora", rows=noise, train=NOISE)
    result, kept = found.result, found.result.kept_step
    steps, losses = zip(*result.validation_losses, strict=True)
    assert list(steps) == [*range(STEPS_OF_EPOCH // PER_EPOCH, result.num_steps + 1, STEPS_OF_EPOCH // PER_EPOCH)]
    assert kept == steps[losses.index(min(losses))] and kept < result.num_steps < NOISE.num_steps(24)
    assert len(steps) - 1 - steps.index(kept) == PATIENCE
    assert any(f"step {kept} is kept" in note and "ended early" in note for note in result.notes)

    rows = noise.select(learned)
    plain = train("seq_lora", rows=rows, train=replace(NOISE, validation_share=0.0, max_steps=kept))
    assert plain.losses == found.losses[:kept], "the rows that are held back are not learned, and nothing else differs"
    assert same_weights(plain.folder, found.folder), "the adapter is that of the best step"


@pytest.mark.parametrize("strategy", ["deal", *at_night("seq_lora")])
@pytest.mark.parametrize("at_best", [1, *at_night(-2, 6)])
def test_a_killed_training_chooses_the_step_that_it_would_have_chosen(
    strategy: str, at_best: int, train: Train, parent: Path, noise: Dataset, killed_and_resumed: Train
) -> None:
    """Killed after the best step, before it, and long after it, so that only a checkpoint has the best step."""
    whole = train(strategy, parent, rows=noise, train=NOISE)
    assert whole.result.kept_step is not None
    killed_at = min(max(NOISE.checkpoint_steps, whole.result.kept_step + at_best), whole.result.num_steps - 1)
    resumed = killed_and_resumed(strategy, parent, at=killed_at, rows=noise, train=NOISE)
    assert resumed.result.resumed_from_step == killed_at - killed_at % NOISE.checkpoint_steps
    assert resumed.result.validation_losses == whole.result.validation_losses
    assert resumed.result.kept_step == whole.result.kept_step
    assert resumed.losses == whole.losses and same_weights(resumed.folder, whole.folder)


def test_a_training_that_died_after_it_had_ended_early_ends_there_again(
    train: Train, noise: Dataset, tmp_path: Path
) -> None:
    settings = replace(NOISE, checkpoint_steps=1)
    given = {"rows": noise, "train": settings, "checkpoint_folder": tmp_path / "checkpoints"}
    whole = train("seq_lora", **given)
    again = train("seq_lora", **given)
    assert again.result.resumed_from_step == whole.result.num_steps - 1
    assert again.result.num_steps == whole.result.num_steps and same_weights(again.folder, whole.folder)


def test_of_few_rows_none_are_held_back(train: Train, rows: Callable[..., Dataset]) -> None:
    short = replace(NOISE, max_steps=4)
    plain, asked = (train("seq_lora", rows=rows(29), train=replace(short, validation_share=each)) for each in (0, 0.2))
    assert asked.result.validation_losses == () and asked.result.kept_step is None
    assert same_weights(plain.folder, asked.folder)
    assert any("none of 29 rows are held back" in note for note in asked.result.notes)
    assert not any("validation" in note for note in plain.result.notes)


def test_labels_keep_their_shares_and_no_row_is_in_both_parts() -> None:
    answers = [[1]] * 60 + [[2]] * 30 + [[3]] * 10
    learned, held_back = training._divide(Dataset.from_dict({"answer_ids": answers}), 80, 0)
    assert sorted(learned + held_back) == [*range(100)] and learned == sorted(learned)
    assert Counter(answers[place][0] for place in held_back) == {1: 12, 2: 6, 3: 2}
    assert training._divide(Dataset.from_dict({"answer_ids": answers}), 80, 1)[1] != held_back


def test_preferences_are_validated_by_their_own_loss(train: Train) -> None:
    settings = replace(NOISE, num_epochs=2, preference_learning_rate=5e-3)
    found = train("seq_lora", rows=pairs(30), task=TONE, train=settings).result
    steps, losses = zip(*found.validation_losses, strict=True)
    assert len(steps) == 2 * PER_EPOCH and losses[-1] < losses[0] < 0.7, "−log σ(0) is 0.693"


def test_a_share_of_zero_changes_no_digest() -> None:
    assert "validation_share" not in TrainConfig().deciding()
    assert TrainConfig(validation_share=0.1).deciding()["validation_share"] == 0.1
