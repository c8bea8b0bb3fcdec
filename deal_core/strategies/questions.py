"""Make the rehearsal's questions about old tasks: choose texts, and record the parent's answers."""

from __future__ import annotations

import math
import random
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace

from peft import PeftModel
from torch import Tensor

from deal_core.config import EvaluateConfig
from deal_core.data.order import spread
from deal_core.data.prompts import encode_prompt
from deal_core.data.schema import TaskSchema
from deal_core.evaluation.generation import answer_limit, generate
from deal_core.method_config import RehearsalConfig
from deal_core.strategies.label_questions import recentred_questions
from deal_core.strategies.rehearsal import Question, Rehearsal, pack, unpack, with_target
from deal_core.strategies.strategy import SEED_STRIDE, STORED_ROWS, TaskContext, TaskTexts

MIN_SHARING = 8
"""With fewer questions per old task, all tasks share batches: a batch per task would be nearly empty."""


def make_rehearsal(
    config: RehearsalConfig, model: PeftModel, context: TaskContext, rows: Mapping[str, Tensor], seed: int
) -> Rehearsal | None:
    """Return the rehearsal of an arriving task, or None if there are no questions.

    Args:
        config: Kind and number of texts.
        model: The parent with its adapter, before any training step.
        context: The arrival.
        rows: The stored rows of the parent's method state.
        seed: Seed of all random choices.
    """
    stored = [unpack(value) for _, value in sorted(rows.items())] if config.keeps_rows else []
    stored = [questions for questions in stored if questions]  # `deal forget` empties the rows of a task
    seed += SEED_STRIDE * len(stored)  # every arrival gets a new order; otherwise only the same few rows are asked
    is_shared = bool(stored) and config.asks_about_arrival
    num_put = _num_put(config, context.train.num_steps(len(context.encoded)), is_shared)
    own = with_own_texts(config, context.old_texts, context.task)
    others = _others(context.old_tasks, own)
    about_own = _about_own_texts(config, model, context, own, seed, num_put)
    asked = _about_arrival(config, model, context, others, seed, num_put) if config.asks_about_arrival else []
    rehearsal = Rehearsal(
        [stored, [*about_own, *asked]], context.collator(), num_rows=config.rows_per_step, weight=config.weight,
        temperature=config.temperature, seed=seed,
    )  # fmt: skip
    return rehearsal if rehearsal.kinds else None


def keep_rows(
    config: RehearsalConfig, context: TaskContext, rows: Mapping[str, Tensor], seed: int
) -> dict[str, Tensor]:
    """Return the stored rows of all tasks, with a sample of the new task's rows; empty if no rows are kept."""
    if not config.keeps_rows:
        return {}
    new = [Question(row["prompt_ids"], row["answer_ids"]) for row in context.encoded]
    kept = choose_kept(config, [tuple(question.answer_ids) for question in new], seed)
    return {**rows, f"{STORED_ROWS}{len(rows):04d}": pack([new[place] for place in kept])}


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


def num_answered(
    config: RehearsalConfig, new: TaskSchema, olds: Sequence[TaskSchema], old_texts: Sequence[TaskTexts], *,
    num_texts: int, num_steps: int,
) -> int:
    """How many questions the parent answers before the first step of an arrival of `num_texts` rows.

    If rows are stored, half of the steps' questions are about these.
    """
    num_put = _num_put(config, num_steps, is_shared=config.texts == "both")
    own = with_own_texts(config, old_texts, new)
    asked = tasks_to_ask(_others(olds, own), new) if config.asks_about_arrival else []
    num_own = _num_each(config, num_put, own)
    about_own = sum(len(each.rows) if each.task.labels else min(num_own, len(each.rows)) for each in own)
    return about_own + len(asked) * min(_num_each(config, num_put, asked), num_texts)


def _num_put(config: RehearsalConfig, num_steps: int, is_shared: bool) -> int:
    """How many questions the steps put, without those about stored rows."""
    return config.rows_per_step * num_steps // (2 if is_shared else 1)


def _num_each(config: RehearsalConfig, num_put: int, tasks: Sequence[object]) -> int:
    return math.ceil(min(config.num_texts, num_put) / max(1, len(tasks)))


def with_own_texts(config: RehearsalConfig, old_texts: Sequence[TaskTexts], new: TaskSchema) -> list[TaskTexts]:
    """The old tasks that are asked about texts of their own."""
    return [each for each in old_texts if config.texts == "own" and len(each.rows) and each.task.name != new.name]


def _others(olds: Sequence[TaskSchema], own: Sequence[TaskTexts]) -> list[TaskSchema]:
    """The old tasks that are not asked about texts of their own."""
    names = {each.task.name for each in own}
    return [old for old in olds if old.name not in names]


def _about_own_texts(
    config: RehearsalConfig, model: PeftModel, context: TaskContext, own: Sequence[TaskTexts], seed: int, num_put: int
) -> list[list[Question]]:
    """Questions about texts of the old tasks themselves. Answers to labelled tasks are re-centred."""
    num_each = _num_each(config, num_put, own)
    generator, found = random.Random(seed), []
    for each in own:
        if each.task.labels:
            questions, _ = recentred_questions(model, context.base.tokenizer, each, generator)
        else:
            texts = list(each.rows["input"])
            drawn = generator.sample(texts, min(num_each, len(texts)))
            questions = _answered(config, model, context, [(each.task, drawn)], each.max_prompt_tokens)
        found.append(questions)
    return found


def not_asked(config: RehearsalConfig, context: TaskContext) -> str:
    """Return the names of the old tasks without questions; empty if every old task is asked."""
    new = context.task
    olds = _others(context.old_tasks, with_own_texts(config, context.old_texts, new))
    asked = {_wording(old) for old in tasks_to_ask(olds, new)}
    return ", ".join(old.name for old in olds if old.name != new.name and _wording(old) not in asked)


def _wording(task: TaskSchema) -> tuple[str, frozenset[str], str | None, str]:
    """All parts of a prompt except its text; the order of the options does not count."""
    shows_labels = task.template is None or "{options}" in task.template
    return task.instruction.strip(), frozenset(task.labels if shows_labels else ()), task.template, task.prompt


def _about_arrival(
    config: RehearsalConfig, model: PeftModel, context: TaskContext, others: Sequence[TaskSchema], seed: int,
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
    texts = list(context.rows["input"])
    drawn = [(old, random.Random(seed).sample(texts, min(num_each, len(texts)))) for old, seed in olds]
    in_order = _answered(config, model, context, drawn, context.train.max_prompt_tokens)
    size = len(in_order) // max(1, len(olds))
    return [in_order[start * size : (start + 1) * size] for start in range(len(olds))]


def _answered(
    config: RehearsalConfig, model: PeftModel, context: TaskContext, asked: Sequence[tuple[TaskSchema, list[str]]],
    max_prompt_tokens: int,
) -> list[Question]:
    """Questions about texts under each task's instruction, with the parent's answers, in the order of the texts."""
    tokenizer, train, evaluate = context.base.tokenizer, context.train, EvaluateConfig()
    prompts: list[list[int]] = []
    limits: list[int] = []
    for old, drawn in asked:
        prompts += [encode_prompt(tokenizer, old, text, max_prompt_tokens) for text in drawn]
        limits += [answer_limit(tokenizer, old, replace(evaluate, max_new_tokens=train.max_answer_tokens))] * len(drawn)
    questions: dict[int, Question] = {}
    for batch, answers, logits_BKV in generate(
        model, tokenizer, prompts, max(limits, default=1), max_batch_tokens=evaluate.max_batch_tokens, with_logits=True
    ):
        assert logits_BKV is not None
        for i, answer, logits_KV in zip(batch, answers, logits_BKV, strict=True):
            ids = _until_end(answer[: limits[i]], tokenizer.eos_token_id)
            questions[i] = with_target(Question(prompts[i], ids), logits_KV[: len(ids)], config.temperature)
    return [questions[i] for i in range(len(prompts))]


def _until_end(answer: list[int], end: int | None) -> list[int]:
    """The tokens up to and including the end token; all tokens if there is no end token."""
    return answer[: answer.index(end) + 1] if end in answer else answer
