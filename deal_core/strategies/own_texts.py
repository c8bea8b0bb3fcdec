"""Questions about texts of the old tasks themselves (`rehearsal.texts: own`).

`rehearsal.answers` says whose answers are the targets. `parent`: the parent's, asked for with every arrival. `first`:
those of the version that had just learned the task. It is the parent of the next arrival, which asks it once and keeps
its answers with the adapter. So old answers do not drift from arrival to arrival, and the time to ask does not grow
with the number of tasks. Answers that are labels are re-centred (`deal_core.strategies.answered`).

Shapes: N texts of a task, M tokens of all answers, W most likely tokens that a target keeps.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Mapping, Sequence

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from deal_core.adapter.method_state import KEPT_ANSWERS
from deal_core.data.prompts import encode_prompt
from deal_core.data.schema import TaskSchema
from deal_core.method_config import RehearsalConfig
from deal_core.strategies.answered import answered, recentred_questions
from deal_core.strategies.rehearsal import Question
from deal_core.strategies.strategy import TaskContext, TaskTexts


def with_own_texts(config: RehearsalConfig, old_texts: Sequence[TaskTexts], new: TaskSchema) -> list[TaskTexts]:
    """The old tasks that are asked about texts of their own."""
    return [texts for texts in old_texts if config.texts == "own" and len(texts.rows) and texts.task.name != new.name]


def without_own_texts(olds: Sequence[TaskSchema], own: Sequence[TaskTexts]) -> list[TaskSchema]:
    """The old tasks that are not asked about texts of their own."""
    names = {texts.task.name for texts in own}
    return [old for old in olds if old.name not in names]


def ask_about_own_texts(
    config: RehearsalConfig,
    model: PeftModel,
    context: TaskContext,
    own: Sequence[TaskTexts],
    kept: Mapping[str, Tensor],
    *,
    num_each: int,
    seed: int,
) -> tuple[list[list[Question]], dict[str, Tensor]]:
    """Return the questions of each old task with own texts, and the answers to keep with the next version.

    Args:
        config: Whose answers are the targets.
        model: The parent with its adapter, before any training step.
        context: The arrival.
        own: The old tasks that are asked about texts of their own, see `with_own_texts`.
        kept: The answers that the parent's method state holds.
        num_each: Most texts without labels that are asked about, if the answers are not kept.
        seed: Seed of all random choices.
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
