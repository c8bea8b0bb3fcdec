"""Train a version until it prefers none of its tasks' labels: it learns its own answers, re-centred.

A version that learned a new task often answers some labels of an old task too often. An offset per label takes that
away (`deal_core.evaluation.recentring`). Here the adapter learns the offsets: its answers q = softmax(log p + offset)
to texts of every task become its targets, in a few steps after the training. So a plain PEFT folder answers re-centred.
The texts' own labels are not learned; only how often each label occurs among them is used.

Shapes: N texts, L labels, K tokens of a label, M tokens that begin one of the labels.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from peft import PeftModel
from scipy.special import softmax

from deal_core.adapter.state import load_adapter, load_method_state, save_adapter
from deal_core.base_model.load import BaseModel
from deal_core.config import EvaluateConfig, TrainConfig
from deal_core.data.collate import answer_collator
from deal_core.data.prompts import encode_answer, encode_prompt
from deal_core.data.schema import TaskSchema
from deal_core.errors import TrainingDivergedError
from deal_core.evaluation.generation import LanguageModel
from deal_core.evaluation.label_scores import Floats, label_scores
from deal_core.evaluation.recentring import label_offsets
from deal_core.strategies.rehearsal import Question, Rehearsal

OnStage = Callable[[int, int, str], None]


@dataclass(frozen=True, kw_only=True)
class LabelTexts:
    """Texts of a task with labels. No strategy trains on them, and no score counts them."""

    task: TaskSchema
    rows: Dataset
    """Columns input and output; of the outputs, the labels, only the counts are used."""
    max_prompt_tokens: int


def recentre_adapter(
    base: BaseModel, folder: Path, tasks: Sequence[LabelTexts], train: TrainConfig,
    on_stage: OnStage = lambda done, total, stage: None,
) -> tuple[str, ...]:
    """Train a saved adapter for `train.recentre_steps` on its own re-centred answers, and save it in its place.

    The tasks take turns, so each has an equal share of the steps. The rate falls linearly from `train.learning_rate`.

    Args:
        base: The base model. It has no adapter again after the call.
        folder: The adapter. Its method state stays as it is.
        tasks: Texts of all tasks of the version; tasks without labels or texts are left out.
        train: Number of steps, rows per step, rate and seed.
        on_stage: Called with the number of finished steps or texts, their total, and what is done.

    Returns:
        Notes for people; empty if there is nothing to do.

    Raises:
        AdapterStateError: The adapter does not fit the base.
        TrainingDivergedError: The adapter's scores are not finite.
    """
    tasks = [each for each in tasks if each.task.labels and len(each.rows)]
    if not (train.recentre_steps and tasks):
        return ()
    model = load_adapter(base.model, folder, is_trainable=True)
    try:
        sets, shifts = _questions(base, model, tasks, train, on_stage)
        collate = answer_collator(base.model, base.tokenizer, is_recomputed=train.gradient_checkpointing)
        rehearsal = Rehearsal(
            [sets], collate, num_rows=train.batch_size, weight=1.0, temperature=1.0, seed=train.seed
        )
        _learn(model, rehearsal, train, on_stage)
        save_adapter(model, folder, load_method_state(folder), base_name=base.name)
    finally:
        model.unload()
    worst = max(range(len(tasks)), key=shifts.__getitem__)
    return (
        f"re-centred the labels of {len(tasks)} tasks in {train.recentre_steps} steps; before, "
        f"{shifts[worst]:.0%} of the answers to {tasks[worst].task.name} had a label that others should have had",
    )


def _questions(
    base: BaseModel, model: LanguageModel, tasks: Sequence[LabelTexts], train: TrainConfig, on_stage: OnStage
) -> tuple[list[list[Question]], list[float]]:
    """For each task, the questions, and how far the labels' shares in the answers were from their true shares."""
    generator, total, done = random.Random(train.seed), sum(len(each.rows) for each in tasks), 0
    sets, shifts = [], []
    for each in tasks:
        on_stage(done, total, f"finding the label offsets of {each.task.name}")
        log_probs_NL, targets_N = label_scores(
            model, base.tokenizer, each.task, each.rows, EvaluateConfig(), max_prompt_tokens=each.max_prompt_tokens
        )
        if not np.isfinite(log_probs_NL).all():
            raise TrainingDivergedError(
                f"The trained adapter scores labels of {each.task.name} with numbers that are not finite: the training "
                f"diverged. Lower train.learning_rate (it is {train.learning_rate:g})."
            )
        targets_NL = softmax(log_probs_NL + label_offsets(log_probs_NL, targets_N), axis=1)
        task, limit = each.task, each.max_prompt_tokens
        labels = [encode_answer(base.tokenizer, task, label, limit) for label in task.labels]
        prompts = [encode_prompt(base.tokenizer, task, text, limit) for text in each.rows["input"]]
        sets.append([question(prompt, labels, goal_L, generator)
                     for prompt, goal_L in zip(prompts, targets_NL, strict=True)])  # fmt: skip
        shifts.append(_shift(log_probs_NL, targets_N))
        done += len(each.rows)
    return sets, shifts


def _shift(log_probs_NL: Floats, targets_N: NDArray[np.int64]) -> float:
    """The total variation between the labels' shares in the answers and among the texts."""
    num_texts, num_labels = log_probs_NL.shape
    shares_L, true_L = (np.bincount(each, minlength=num_labels) / num_texts
                        for each in (log_probs_NL.argmax(1), targets_N))  # fmt: skip
    return float(np.abs(shares_L - true_L).sum() / 2)


def question(
    prompt_ids: Sequence[int], labels: Sequence[Sequence[int]], goal_L: Floats, generator: random.Random
) -> Question:
    """Return a question whose answer is a label drawn with the probabilities `goal_L`.

    The targets at each token of the answer are the probabilities of all tokens that continue a label which begins as
    the answer does. So the expected loss is KL(goal ‖ model) over the labels, by the chain rule.
    """
    (answer_ids,) = ([*each] for each in generator.choices(labels, goal_L.tolist()))
    steps: list[dict[int, float]] = []
    for place in range(len(answer_ids)):
        chances: dict[int, float] = {}
        for label, goal in zip(labels, goal_L, strict=True):
            if len(label) > place and list(label[:place]) == answer_ids[:place]:
                chances[label[place]] = chances.get(label[place], 0.0) + float(goal)
        steps.append(chances)
    width = max(map(len, steps))
    tokens_KM, shares_KM = torch.zeros(len(steps), width, dtype=torch.long), torch.zeros(len(steps), width)
    for place, chances in enumerate(steps):
        tokens_KM[place, : len(chances)] = torch.tensor(list(chances))
        shares_KM[place, : len(chances)] = torch.tensor(list(chances.values())) / sum(chances.values())
    return Question(prompt_ids, answer_ids, tokens_KM, shares_KM)


def _learn(model: PeftModel, rehearsal: Rehearsal, train: TrainConfig, on_stage: OnStage) -> None:
    """Take the steps with AdamW."""
    factors = [factor for factor in model.parameters() if factor.requires_grad]
    optimizer = torch.optim.AdamW(factors, lr=train.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, train.recentre_steps)
    model.train()
    for step in range(train.recentre_steps):
        on_stage(step, train.recentre_steps, "re-centring the labels")
        loss = rehearsal.loss(model, step)
        assert loss is not None, "there are questions"
        loss.backward()  # type: ignore[no-untyped-call]
        if train.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(factors, train.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
