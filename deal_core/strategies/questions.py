"""What is asked about old tasks while a new one is learned: by which texts, and whose answers are held."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace

from peft import PeftModel
from torch import Tensor

from deal_core.config import EvaluateConfig, RehearsalConfig
from deal_core.data.prompts import encode_prompt
from deal_core.data.schema import TaskSchema
from deal_core.evaluation.score import answer_limit, generate
from deal_core.strategies.rehearsal import Question, Rehearsal, pack, unpack, with_target
from deal_core.strategies.strategy import SEED_STRIDE, STORED_ROWS, TaskContext

MIN_SHARING = 8
"""With fewer questions for each old task, those of all tasks go together: a batch for each would be nearly empty."""


def make_rehearsal(
    config: RehearsalConfig, model: PeftModel, context: TaskContext, rows: Mapping[str, Tensor], seed: int
) -> Rehearsal | None:
    """Return the rehearsal of a task that arrives, or None where there is nothing to ask.

    Args:
        config: Which texts, how many.
        model: The parent, its adapter on and untouched.
        context: The arrival.
        rows: The stored rows of the parent's method state.
        seed: Decides what is drawn.
    """
    stored = [unpack(value) for _, value in sorted(rows.items())] if config.keeps_rows else []
    stored = [questions for questions in stored if questions]  # those of a task that was forgotten are gone
    seed += SEED_STRIDE * len(stored)  # another order with every arrival, or the same few rows would always be put
    asked: list[list[Question]] = []
    if config.asks_about_arrival:
        num_put = config.rows_per_step * context.train.num_steps(len(context.encoded)) // (2 if stored else 1)
        asked = _about_arrival(config, model, context, seed, num_put)
    rehearsal = Rehearsal(
        [stored, asked], context.collator(), num_rows=config.rows_per_step, weight=config.weight,
        temperature=config.temperature, seed=seed,
    )  # fmt: skip
    return rehearsal if rehearsal.kinds else None


def keep_rows(
    config: RehearsalConfig, context: TaskContext, rows: Mapping[str, Tensor], seed: int
) -> dict[str, Tensor]:
    """Return the stored rows of all tasks, the new one's sample among them; empty where none are kept."""
    if not config.keeps_rows:
        return {}
    new = list(context.encoded)
    sample = random.Random(seed).sample(new, max(1, round(config.stored_share * len(new))))
    questions = [Question(row["prompt_ids"], row["answer_ids"]) for row in sample]
    return {**rows, f"{STORED_ROWS}{len(rows):04d}": pack(questions)}


def tasks_to_ask(olds: Sequence[TaskSchema], new: TaskSchema) -> list[TaskSchema]:
    """Return the old tasks that can be asked about the new one's texts, each way of asking once.

    A chat's rows are conversations, those of the other formats are texts. A task that asks as the new one does would
    put the new rows' own prompts, and hold them to another answer than their label.
    """
    askable = (old for old in olds if (old.format == "chat") == (new.format == "chat"))
    by_wording = {_wording(old): old for old in askable if old.name != new.name}
    by_wording.pop(_wording(new), None)
    return list(by_wording.values())


def not_asked(olds: Sequence[TaskSchema], new: TaskSchema) -> str:
    """Return the names of the old tasks that no question is put for; empty where every one is asked."""
    asked = {_wording(old) for old in tasks_to_ask(olds, new)}
    return ", ".join(old.name for old in olds if old.name != new.name and _wording(old) not in asked)


def _wording(task: TaskSchema) -> tuple[str, frozenset[str], str | None]:
    """What a prompt says beside its text, whatever the order of the options."""
    shows_labels = task.template is None or "{options}" in task.template
    return task.instruction.strip(), frozenset(task.labels if shows_labels else ()), task.template


def _about_arrival(
    config: RehearsalConfig, model: PeftModel, context: TaskContext, seed: int, num_put: int
) -> list[list[Question]]:
    """Questions about the new one's texts for every old task that can be asked so, no more than the steps put."""
    olds = tasks_to_ask(context.old_tasks, context.task)
    num_each = math.ceil(min(config.num_texts, num_put) / max(1, len(olds)))
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
    """The new task's texts, drawn by a seed for each old task, under its instruction, with the parent's answers.

    The tasks given are asked together, in the same batches; of one alone the instruction is read once for all texts.
    """
    tokenizer, train, evaluate = context.base.tokenizer, context.train, EvaluateConfig()
    texts = list(context.rows["input"])
    prompts: list[list[int]] = []
    limits: list[int] = []
    for old, seed in olds:
        drawn = random.Random(seed).sample(texts, min(num_each, len(texts)))
        prompts += [encode_prompt(tokenizer, old, text, train.max_prompt_tokens) for text in drawn]
        limits += [answer_limit(tokenizer, old, replace(evaluate, max_new_tokens=train.max_answer_tokens))] * len(drawn)
    questions: dict[int, Question] = {}
    for batch, answers, logits_BKV in generate(
        model, tokenizer, prompts, max(limits, default=1), max_batch_tokens=evaluate.max_batch_tokens, with_logits=True
    ):
        assert logits_BKV is not None
        for i, answer, logits_KV in zip(batch, answers, logits_BKV, strict=True):
            ids = _until_end(answer[: limits[i]], tokenizer.eos_token_id)
            questions[i] = with_target(Question(prompts[i], ids), logits_KV[: len(ids)], config.temperature)
    in_order = [questions[i] for i in range(len(prompts))]
    size = len(in_order) // max(1, len(olds))
    return [in_order[start * size : (start + 1) * size] for start in range(len(olds))]


def _until_end(answer: list[int], end: int | None) -> list[int]:
    """The tokens up to the end token and with it; all of them where the answer did not end."""
    return answer[: answer.index(end) + 1] if end in answer else answer
