"""Make the rehearsal's questions about old tasks: choose texts, and record the parent's answers.

Shapes: N texts of a task, M tokens of all answers, W most likely tokens that a target keeps.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Hashable, Iterable, Mapping, Sequence

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from deal_core.adapter.method_state import KEPT_ANSWERS, STORED_ROWS
from deal_core.config import MAX_OWN_TEXTS, EvaluateConfig, TrainConfig
from deal_core.data.order import spread
from deal_core.data.prompts import encode_prompt
from deal_core.data.schema import TaskSchema
from deal_core.method_config import RehearsalConfig
from deal_core.strategies.answered import answered, recentred_questions
from deal_core.strategies.rehearsal import Question, Rehearsal, pack, unpack
from deal_core.strategies.strategy import SEED_STRIDE, PlannedArrival, TaskContext, TaskTexts

MIN_SHARING = 8
"""With fewer questions per old task, all tasks share batches: a batch per task would be nearly empty."""


def make_rehearsal(
    config: RehearsalConfig,
    model: PeftModel,
    context: TaskContext,
    kept: Mapping[str, Tensor],
    seed: int,
    num_arrivals: int = 0,
) -> tuple[Rehearsal | None, dict[str, Tensor]]:
    """Return the rehearsal of an arriving task, and the answers to keep; None if there are no questions.

    Args:
        config: Kind and number of texts.
        model: The parent with its adapter, before any training step.
        context: The arrival.
        kept: The stored rows and the kept answers of the parent's method state.
        seed: Seed of all random choices.
        num_arrivals: Arrivals that the parent has learned.
    """
    stored = [unpack(kept[name]) for name in sorted(kept) if name.startswith(STORED_ROWS) and config.keeps_rows]
    stored = [questions for questions in stored if questions]  # `deal data delete` empties the rows of a task
    own, olds = _tasks_asked(config, context)
    # every arrival asks in a new order; otherwise, with few steps, only the same few rows are asked
    seed += SEED_STRIDE * (num_arrivals if own else len(stored))
    is_shared = bool(stored) and config.asks_about_arrival
    num_put = _num_put(config, context.train.num_steps(len(context.encoded)), is_shared)
    about_own, answers = _about_own_texts(
        config, model, context, own, kept, num_each=_num_each(config, num_put, own), seed=seed
    )
    about_arrival = _about_arrival(config, model, context, olds, seed, _num_each(config, num_put, olds))
    rehearsal = Rehearsal(
        [stored, [*about_own, *about_arrival]],
        context.collator(),
        num_rows=config.rows_per_step,
        weight=config.weight,
        temperature=config.temperature,
        seed=seed,
    )
    return rehearsal if rehearsal.kinds else None, answers


def _about_own_texts(
    config: RehearsalConfig,
    model: PeftModel,
    context: TaskContext,
    own: Sequence[TaskTexts],
    kept: Mapping[str, Tensor],
    *,
    num_each: int,
    seed: int,
) -> tuple[list[list[Question]], dict[str, Tensor]]:
    """Return the questions of each old task with texts of its own, and the answers to keep with the next version.

    `rehearsal.answers` says whose answers are the targets. `parent`: the parent's, asked for with every arrival; of
    texts without labels, `num_each` are asked about. `first`: those of the version that had just learned the task. It
    is the parent of the next arrival, which asks it once and keeps its answers with the adapter. So old answers do not
    drift from arrival to arrival, and the time to ask does not grow with the number of tasks.
    """
    tokenizer, generator = context.base.tokenizer, random.Random(seed)
    sets: list[list[Question]] = []
    answers: dict[str, Tensor] = {}
    for texts in own:
        if config.answers == "parent":
            sets.append(_asked(model, context, texts, generator, num_each))
            continue
        name = answers_name(texts.task.name)
        prompts = [encode_prompt(tokenizer, texts.task, text, texts.max_prompt_tokens) for text in texts.rows["input"]]
        packed = {part: tensor for part, tensor in kept.items() if part.startswith(name)}
        questions = unpack_answers(packed, name, prompts)
        if questions is None:
            questions = _asked(model, context, texts, generator)
            packed = pack_answers(questions, name)
        answers |= packed
        sets.append(questions)
    return sets, answers


def _asked(
    model: PeftModel, context: TaskContext, texts: TaskTexts, generator: random.Random, num_each: int | None = None
) -> list[Question]:
    """Ask about all texts, in their order; without labels, about a sample of `num_each` texts if it is given."""
    if texts.task.labels:
        questions, _ = recentred_questions(model, context.base.tokenizer, texts, generator)
        return questions
    inputs = list(texts.rows["input"])
    if num_each is not None:
        inputs = generator.sample(inputs, min(num_each, len(inputs)))
    return answered(
        model,
        context,
        [(texts.task, inputs)],
        max_prompt_tokens=texts.max_prompt_tokens,
        max_new_tokens=texts.max_new_tokens,
    )


def _about_arrival(
    config: RehearsalConfig,
    model: PeftModel,
    context: TaskContext,
    olds: Sequence[TaskSchema],
    seed: int,
    num_each: int,
) -> list[list[Question]]:
    """Texts of the new task under each old task's instruction, with the parent's answers; each task has a seed."""
    num_rows, train = len(context.rows), context.train
    num_texts = min(num_each, num_rows)
    if not (olds and num_texts):
        return []
    drawn: list[tuple[TaskSchema, list[str]]] = []
    for number, old in enumerate(olds):
        places = random.Random(seed + number).sample(range(num_rows), num_texts)
        drawn.append((old, list(context.rows.select(places)["input"])))
    # a task that is asked alone has its instruction computed once for all texts; with few texts, tasks share batches
    groups = [[task] for task in drawn] if num_each >= MIN_SHARING else [drawn]
    sets: list[list[Question]] = []
    for group in groups:
        questions = answered(
            model,
            context,
            group,
            max_prompt_tokens=train.max_prompt_tokens,
            max_new_tokens=longest_old_answer(train),
            temperature=config.temperature,
        )
        sets += [questions[start : start + num_texts] for start in range(0, len(questions), num_texts)]
    return sets


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


def _tasks_asked(
    config: RehearsalConfig, arrival: TaskContext | PlannedArrival
) -> tuple[list[TaskTexts], list[TaskSchema]]:
    """Return the old tasks that are asked about texts of their own, and those that are asked about the new texts."""
    new = arrival.task
    own = [texts for texts in arrival.old_texts if config.texts == "own" and len(texts.rows)]
    own = [texts for texts in own if texts.task.name != new.name]
    names = {texts.task.name for texts in own}
    others = [old for old in arrival.old_tasks if old.name not in names]
    return own, tasks_to_ask(others, new) if config.asks_about_arrival else []


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
    num_put = _num_put(config, arrival.num_steps, is_shared=config.texts == "both")
    own, olds = _tasks_asked(config, arrival)
    num_own = _num_each(config, num_put, own)
    if config.answers == "first":
        own = [texts for texts in own if texts.task.name == arrival.learned_last]
        num_own = MAX_OWN_TEXTS
    about_own = sum(len(texts.rows) if texts.task.labels else min(num_own, len(texts.rows)) for texts in own)
    return about_own + len(olds) * min(_num_each(config, num_put, olds), arrival.num_rows)


def _num_put(config: RehearsalConfig, num_steps: int, is_shared: bool) -> int:
    """How many questions the steps put, without those about stored rows."""
    return config.rows_per_step * num_steps // (2 if is_shared else 1)


def _num_each(config: RehearsalConfig, num_put: int, tasks: Sequence[object]) -> int:
    return math.ceil(min(config.num_texts, num_put) / max(1, len(tasks)))


def not_asked(config: RehearsalConfig, context: TaskContext) -> str:
    """Return the names of the old tasks without questions; empty if every old task is asked."""
    own, olds = _tasks_asked(config, context)
    names, wordings = {context.task.name, *(texts.task.name for texts in own)}, {_wording(old) for old in olds}
    return ", ".join(old.name for old in context.old_tasks if old.name not in names and _wording(old) not in wordings)


def _wording(task: TaskSchema) -> tuple[str, frozenset[str], str | None, str]:
    """All parts of a prompt except its text; the order of the options does not count."""
    shows_labels = task.template is None or "{options}" in task.template
    return task.instruction.strip(), frozenset(task.labels if shows_labels else ()), task.template, task.prompt


def answers_name(task: str) -> str:
    """Name prefix of the tensors that hold the answers to a task's texts."""
    return f"{KEPT_ANSWERS}{hashlib.sha256(task.encode()).hexdigest()[:16]}."


def pack_answers(questions: Sequence[Question], name: str) -> dict[str, Tensor]:
    """Write answers and targets as tensors. Of the prompts only a digest is kept."""
    tokens = [q.tokens_KN for q in questions if q.tokens_KN is not None]
    shares = [q.shares_KN for q in questions if q.shares_KN is not None]
    return {
        f"{name}prompts": _digest(q.prompt_ids for q in questions),
        f"{name}lengths_N": torch.tensor([len(q.answer_ids) for q in questions], dtype=torch.int32),
        f"{name}ids_M": torch.tensor([token for q in questions for token in q.answer_ids], dtype=torch.int32),
        f"{name}tokens_MW": _rows(tokens).to(torch.int32),
        f"{name}shares_MW": _rows(shares),
    }


def unpack_answers(tensors: Mapping[str, Tensor], name: str, prompts: Sequence[Sequence[int]]) -> list[Question] | None:
    """Read the questions that `pack_answers` wrote; None if there are none, or if they are about other prompts."""
    digest = tensors.get(f"{name}prompts")
    if digest is None or not torch.equal(digest, _digest(prompts)):
        return None
    lengths = tensors[f"{name}lengths_N"].tolist()
    parts = [tensors[f"{name}{part}"] for part in ("ids_M", "tokens_MW", "shares_MW")]
    ids, tokens, shares = (torch.split(part, lengths) for part in parts)
    return [
        Question(prompt, answer.tolist(), tokens_KN.long(), shares_KN)
        for prompt, answer, tokens_KN, shares_KN in zip(prompts, ids, tokens, shares, strict=True)
    ]


def _rows(matrices: Sequence[Tensor]) -> Tensor:
    """The rows of all matrices, padded with zeros to one width. A token of share 0 adds nothing to a loss."""
    return pad_sequence([row for matrix in matrices for row in matrix], batch_first=True)


def _digest(prompts: Iterable[Sequence[int]]) -> Tensor:
    text = json.dumps([list(map(int, prompt)) for prompt in prompts])
    return torch.frombuffer(bytearray(hashlib.sha256(text.encode()).digest()), dtype=torch.uint8)
