"""Questions about texts of tasks, with the answers that a model writes to them."""

from __future__ import annotations

from collections.abc import Sequence

from peft import PeftModel

from deal_core.data.prompts import encode_prompt
from deal_core.data.schema import TaskSchema
from deal_core.evaluation.generation import answer_limit, generate
from deal_core.strategies.rehearsal import Question, with_target
from deal_core.strategies.strategy import TaskContext


def answered(
    model: PeftModel,
    context: TaskContext,
    asked: Sequence[tuple[TaskSchema, list[str]]],
    *,
    max_prompt_tokens: int,
    max_new_tokens: int,
    temperature: float = 1.0,
) -> list[Question]:
    """Questions about texts under each task's instruction, with the model's answers, in the order of the texts."""
    tokenizer = context.base.tokenizer
    prompts: list[list[int]] = []
    limits: list[int] = []
    for old, drawn in asked:
        prompts += [encode_prompt(tokenizer, old, text, max_prompt_tokens) for text in drawn]
        limits += [answer_limit(tokenizer, old, max_new_tokens)] * len(drawn)
    questions: dict[int, Question] = {}
    for batch, answers, logits_BKV in generate(model, tokenizer, prompts, max(limits, default=1), with_logits=True):
        assert logits_BKV is not None
        for i, answer, logits_KV in zip(batch, answers, logits_BKV, strict=True):
            ids = _until_end(answer[: limits[i]], tokenizer.eos_token_id)
            questions[i] = with_target(Question(prompts[i], ids), logits_KV[: len(ids)], temperature)
    return [questions[i] for i in range(len(prompts))]


def _until_end(answer: list[int], end: int | None) -> list[int]:
    """The tokens up to and including the end token; all tokens if there is no end token."""
    return answer[: answer.index(end) + 1] if end in answer else answer
