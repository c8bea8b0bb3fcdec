"""Rehearsal: while a new task is learned, questions about old tasks keep the model at its earlier answers.

Shapes: B questions, K tokens of the longest answer, V vocabulary, N most likely tokens that a target keeps.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from deal_core.data.collate import IGNORED, AnswerCollator, answer_logits

NUM_KEPT = 64
"""Number of most likely tokens that a target keeps; the remaining probability counts as one more token."""
NUM_DRIFT_STEPS = 4
"""Number of steps whose questions measure how the start of an arrival changes old answers."""
TINY = 1e-6


@dataclass(frozen=True)
class Question:
    """One prompt, its target answer, and the target distribution if it is known.

    Attributes:
        prompt_ids: Tokens of the prompt.
        answer_ids: The K tokens of the answer.
        tokens_KN: The most likely tokens at each position of the answer; None: only the answer is the target.
        shares_KN: The probabilities of `tokens_KN`.
        is_parents: Whether the distribution is the parent's alone.
    """

    prompt_ids: Sequence[int]
    answer_ids: Sequence[int]
    tokens_KN: Tensor | None = None
    shares_KN: Tensor | None = None
    is_parents: bool = False


class Rehearsal:
    """Chooses a few questions for every step and gives their loss.

    The kinds of questions take turns, and within a kind the old tasks take turns, so all get an equal share of a step.
    The step's number alone decides its questions, so a resumed run asks the same ones. When all questions of a set
    were asked, the set starts again.

    Args:
        kinds: For each kind, one set of questions per old task. Empty sets and kinds are ignored.
        collate: Pads questions to a batch.
        num_rows: Questions per step.
        weight: Weight of the questions' loss.
        temperature: T: softens both distributions; the loss is multiplied by T².
        seed: Seed of the order.
    """

    def __init__(
        self,
        kinds: Sequence[Sequence[Sequence[Question]]],
        collate: AnswerCollator,
        *,
        num_rows: int,
        weight: float,
        temperature: float,
        seed: int,
    ) -> None:
        generator = random.Random(seed)
        self.kinds: list[list[list[Question]]] = []
        for sets in kinds:
            shuffled = [generator.sample(questions, len(questions)) for questions in sets if questions]
            generator.shuffle(shuffled)
            if shuffled:
                self.kinds.append(shuffled)
        self._collate = collate
        self._num_rows = num_rows
        self._weight = weight
        self._temperature = temperature

    def describe(self) -> str:
        """Return a note for people: the number of questions."""
        sets = [questions for kind in self.kinds for questions in kind]
        num_questions = sum(len(questions) for questions in sets)
        return f"rehearsed {num_questions} questions about old tasks (sets: {len(sets)}), {self._num_rows} a step"

    def draw(self, step: int) -> list[Question]:
        """Return the questions of a step, counted from 0."""
        if not self.kinds:
            return []
        return [self._at(place) for place in range(step * self._num_rows, (step + 1) * self._num_rows)]

    def _at(self, place: int) -> Question:
        turn, kind = divmod(place, len(self.kinds))
        sets = self.kinds[kind]
        again, task = divmod(turn, len(sets))
        return sets[task][again % len(sets[task])]

    def loss(self, model: nn.Module, step: int, *, rank: int = 0, num_processes: int = 1) -> Tensor | None:
        """Return weight·T²·KL(target ‖ model) per answer token, or cross-entropy if only an answer is known.

        Several processes divide the questions. The mean of their results equals the result of a single process.
        """
        drawn = self.draw(step)
        if not drawn:
            return None
        # every process must take part in a step: one without a question asks the first question with weight 0
        questions = drawn[rank::num_processes] or drawn[:1]
        share = num_processes if rank < len(drawn) else 0
        num_tokens = sum(len(question.answer_ids) for question in drawn)
        return self._weight * self._summed(model, questions) / num_tokens * share

    @torch.no_grad()
    def drift(self, model: nn.Module) -> float | None:
        """Return KL(parent ‖ model) per answer token over the first steps' questions; None if no answer is known."""
        drawn = (question for step in range(NUM_DRIFT_STEPS) for question in self.draw(step))
        questions = [question for question in drawn if question.is_parents]
        if not questions:
            return None
        model.eval()
        num_tokens = sum(len(question.answer_ids) for question in questions)
        return float(self._summed(model, questions)) / self._temperature**2 / num_tokens

    def _summed(self, model: nn.Module, questions: Sequence[Question]) -> Tensor:
        device = next(model.parameters()).device
        losses = []
        for group in self._collate.groups(questions):
            inputs = {name: value.to(device) for name, value in self._collate([vars(q) for q in group]).items()}
            logits_BKV = answer_logits(model, inputs).float()
            is_right = "position_ids" in inputs  # answers of a decoder-only model end at the right edge
            for logits_KV, labels_K, question in zip(logits_BKV, inputs["labels"], group, strict=True):
                length = len(question.answer_ids)
                part = slice(-length, None) if is_right else slice(0, length)
                losses.append(self._question_loss(logits_KV[part], labels_K[part], question))
        return torch.stack(losses).sum()

    def _question_loss(self, logits_KV: Tensor, labels_K: Tensor, question: Question) -> Tensor:
        if question.tokens_KN is None or question.shares_KN is None:
            return cross_entropy(logits_KV, labels_K, ignore_index=IGNORED, reduction="sum")
        tokens_KN, shares_KN = question.tokens_KN.to(logits_KV.device), question.shares_KN.to(logits_KV.device)
        log_model_KN = (logits_KV / self._temperature).log_softmax(-1).gather(-1, tokens_KN)
        rest_model_K = (1 - log_model_KN.exp().sum(-1)).clamp_min(TINY)
        rest_K = (1 - shares_KN.sum(-1)).clamp_min(TINY)
        kept = (shares_KN * (shares_KN.clamp_min(TINY).log() - log_model_KN)).sum()
        rest = (rest_K * (rest_K.log() - rest_model_K.log())).sum()
        return self._temperature**2 * (kept + rest)


def with_target(question: Question, logits_KV: Tensor, temperature: float) -> Question:
    """Return the question with the logits' distribution, softened by the temperature, as its target."""
    shares_KV = (logits_KV.float() / temperature).softmax(-1)
    top = shares_KV.topk(min(NUM_KEPT, shares_KV.shape[-1]), dim=-1)
    return replace(question, tokens_KN=top.indices.cpu(), shares_KN=top.values.cpu(), is_parents=True)


def pack(questions: Sequence[Question]) -> Tensor:
    """Write prompts and answers as one tensor of integers, for a method's state."""
    flat = [
        number for q in questions for number in (len(q.prompt_ids), len(q.answer_ids), *q.prompt_ids, *q.answer_ids)
    ]
    return torch.tensor(flat, dtype=torch.int32)


def unpack(packed: Tensor) -> list[Question]:
    """Read the questions back from a tensor that `pack` wrote."""
    numbers, questions, at = packed.tolist(), [], 0
    while at < len(numbers):
        num_prompt, num_answer = numbers[at : at + 2]
        middle, end = at + 2 + num_prompt, at + 2 + num_prompt + num_answer
        questions.append(Question(numbers[at + 2 : middle], numbers[middle:end]))
        at = end
    return questions
