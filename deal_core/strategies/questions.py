"""Make the rehearsal's questions about old tasks: choose texts, and record the parent's answers."""

from __future__ import annotations

import math
import random
from collections.abc import Hashable, Mapping, Sequence

from peft import PeftModel
from torch import Tensor

from deal_core.adapter.method_state import STORED_ROWS
from deal_core.config import MAX_OWN_TEXTS, EvaluateConfig, TrainConfig
from deal_core.data.order import spread
from deal_core.data.schema import TaskSchema
from deal_core.method_config import RehearsalConfig
from deal_core.strategies.answered import answered
from deal_core.strategies.own_texts import ask_about_own_texts, with_own_texts, without_own_texts
from deal_core.strategies.rehearsal import Question, Rehearsal, pack, unpack
from deal_core.strategies.strategy import SEED_STRIDE, PlannedArrival, TaskContext

MIN_SHARING = 8
"""With fewer questions per old task, all tasks share batches: a batch per task would be nearly empty."""


def make_rehearsal(
    config: RehearsalConfig, model: PeftModel, context: TaskContext, kept: Mapping[str, Tensor], seed: int
) -> tuple[Rehearsal | None, dict[str, Tensor]]:
    """Return the rehearsal of an arriving task, and the answers to keep; None if there are no questions.

    Args:
        config: Kind and number of texts.
        model: The parent with its adapter, before any training step.
        context: The arrival.
        kept: The stored rows and the kept answers of the parent's method state.
        seed: Seed of all random choices.
    """
    stored = [unpack(kept[name]) for name in sorted(kept) if name.startswith(STORED_ROWS) and config.keeps_rows]
    stored = [questions for questions in stored if questions]  # `deal data delete` empties the rows of a task
    seed += SEED_STRIDE * len(stored)  # every arrival gets a new order; otherwise only the same few rows are asked
    is_shared = bool(stored) and config.asks_about_arrival
    num_put = _num_put(config, context.train.num_steps(len(context.encoded)), is_shared)
    own = with_own_texts(config, context.old_texts, context.task)
    others = without_own_texts(context.old_tasks, own)
    about_own, answers = ask_about_own_texts(
        config, model, context, own, kept, num_each=_num_each(config, num_put, own), seed=seed
    )
    asked = _about_arrival(config, model, context, others, seed, num_put) if config.asks_about_arrival else []
    rehearsal = Rehearsal(
        [stored, [*about_own, *asked]],
        context.collator(),
        num_rows=config.rows_per_step,
        weight=config.weight,
        temperature=config.temperature,
        seed=seed,
    )
    return rehearsal if rehearsal.kinds else None, answers


def keep_rows(
    config: RehearsalConfig, context: TaskContext, rows: Mapping[str, Tensor], seed: int
) -> dict[str, Tensor]:
    """Return the stored rows of all tasks, with a sample of the new task's rows; empty if no rows are kept."""
    if not config.keeps_rows:
        return {}
    kept = choose_kept(config, [tuple(answer_ids) for answer_ids in context.encoded["answer_ids"]], seed)
    new = [Question(row["prompt_ids"], row["answer_ids"]) for row in context.encoded.select(kept)]
    return {**rows, f"{STORED_ROWS}{len(rows):04d}": pack(new)}


def choose_kept(config: RehearsalConfig, answers: Sequence[Hashable], seed: int) -> list[int]:
    """Return the places of the rows of an arrival that are kept, given the answers of all of its rows."""
    num_rows, num_kept, generator = len(answers), config.num_kept(len(answers)), random.Random(seed)
    if not config.balance_stored:
        return generator.sample(range(num_rows), num_kept)
    places = generator.sample(range(num_rows), num_rows)
    return [places[i] for i in spread([answers[place] for place in places], generator.random)[:num_kept]]


def tasks_to_ask(olds: Sequence[TaskSchema], new: TaskSchema) -> list[TaskSchema]:
    """Return the old tasks that can be asked about the new task's texts. Of tasks with one wording, one is kept.

    A chat task can be asked only about chats, and other tasks only about texts. An old task with the new task's wording
    is left out: its questions would be the new rows' own prompts, with another answer than their label.
    """
    askable = (old for old in olds if (old.format == "chat") == (new.format == "chat"))
    by_wording = {_wording(old): old for old in askable if old.name != new.name}
    by_wording.pop(_wording(new), None)
    return list(by_wording.values())


def longest_old_answer(train: TrainConfig) -> int:
    """Return the most tokens of an answer about the new task's texts: the old task's answers may be the longer ones."""
    return max(train.max_answer_tokens, EvaluateConfig().max_new_tokens)


def num_answered(config: RehearsalConfig, arrival: PlannedArrival) -> int:
    """How many questions the parent answers before the first step of an arrival.

    If rows are stored, half of the steps' questions are about these. With `answers: first` the parent answers for the
    task that it learned last. It also answers where its state lacks answers, which is not counted.
    """
    new = arrival.task
    num_put = _num_put(config, arrival.num_steps, is_shared=config.texts == "both")
    own = with_own_texts(config, arrival.old_texts, new)
    asked = tasks_to_ask(without_own_texts(arrival.old_tasks, own), new) if config.asks_about_arrival else []
    num_own = _num_each(config, num_put, own)
    if config.answers == "first":
        own = [each for each in own if each.task.name == arrival.learned_last]
        num_own = MAX_OWN_TEXTS
    about_own = sum(len(each.rows) if each.task.labels else min(num_own, len(each.rows)) for each in own)
    return about_own + len(asked) * min(_num_each(config, num_put, asked), arrival.num_rows)


def _num_put(config: RehearsalConfig, num_steps: int, is_shared: bool) -> int:
    """How many questions the steps put, without those about stored rows."""
    return config.rows_per_step * num_steps // (2 if is_shared else 1)


def _num_each(config: RehearsalConfig, num_put: int, tasks: Sequence[object]) -> int:
    return math.ceil(min(config.num_texts, num_put) / max(1, len(tasks)))


def not_asked(config: RehearsalConfig, context: TaskContext) -> str:
    """Return the names of the old tasks without questions; empty if every old task is asked."""
    new = context.task
    olds = without_own_texts(context.old_tasks, with_own_texts(config, context.old_texts, new))
    asked = {_wording(old) for old in tasks_to_ask(olds, new)}
    return ", ".join(old.name for old in olds if old.name != new.name and _wording(old) not in asked)


def _wording(task: TaskSchema) -> tuple[str, frozenset[str], str | None, str]:
    """All parts of a prompt except its text; the order of the options does not count."""
    shows_labels = task.template is None or "{options}" in task.template
    return task.instruction.strip(), frozenset(task.labels if shows_labels else ()), task.template, task.prompt


def _about_arrival(
    config: RehearsalConfig,
    model: PeftModel,
    context: TaskContext,
    others: Sequence[TaskSchema],
    seed: int,
    num_put: int,
) -> list[list[Question]]:
    """Questions about the new task's texts, for the other old tasks that can be asked; no more than the steps use."""
    olds = tasks_to_ask(others, context.task)
    num_each = _num_each(config, num_put, olds)
    groups = [[old] for old in olds] if num_each >= MIN_SHARING else [olds]
    seeds = iter(range(seed, seed + len(olds)))
    return [
        questions
        for group in groups
        for questions in _on_new_texts(config, model, context, [(old, next(seeds)) for old in group], num_each)
    ]


def _on_new_texts(
    config: RehearsalConfig,
    model: PeftModel,
    context: TaskContext,
    olds: Sequence[tuple[TaskSchema, int]],
    num_each: int,
) -> list[list[Question]]:
    """Texts of the new task under each old task's instruction, with the parent's answers; each task has its own seed.

    The given tasks share batches. For a single task, the instruction is computed once for all texts.
    """
    num_texts = len(context.rows)

    def draw(seed: int) -> list[str]:
        places = random.Random(seed).sample(range(num_texts), min(num_each, num_texts))
        return list(context.rows.select(places)["input"])

    drawn = [(old, draw(seed)) for old, seed in olds]
    in_order = answered(
        model,
        context,
        drawn,
        max_prompt_tokens=context.train.max_prompt_tokens,
        max_new_tokens=longest_old_answer(context.train),
        temperature=config.temperature,
    )
    size = len(in_order) // max(1, len(olds))
    return [in_order[start * size : (start + 1) * size] for start in range(len(olds))]
