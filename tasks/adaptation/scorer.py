"""Scores adapters on test rows, and says when the answers to a task have collapsed to one label.

The module imports torch, so a stage imports it only when it scores.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from deal_core.adapter.state import adapter_on
from deal_core.base_model.language_model import LanguageModel
from deal_core.evaluation.general_ability import perplexity
from deal_core.evaluation.label_scores import label_scores, recentred_accuracy
from deal_core.evaluation.metrics import collapsed
from deal_core.evaluation.report import Scores
from deal_core.evaluation.score import TaskEvaluation, count_too_long, evaluate_task
from deal_core.general.suites import Suite
from deal_core.safe_text import brief
from infra.serving.evaluation import evaluation_engine
from tasks.base import lend_base
from tasks.context import current_store
from tasks.lineage.frozen_rows import Answers, TestSet
from tasks.progress import advance
from tasks.references import BaseRef


@dataclass(frozen=True)
class Scored:
    """The scores and answers of one adapter."""

    evaluations: Mapping[str, TaskEvaluation]
    answers: Answers
    perplexity: float | None
    """Perplexity on plain English; None: not measured, or not defined."""
    recentred: Mapping[str, float] = field(default_factory=dict)
    """By task whose answers have collapsed: the accuracy if every label were answered as often as it occurs."""

    @property
    def accuracies(self) -> dict[str, float]:
        """Accuracy by task."""
        return {name: evaluation.accuracy for name, evaluation in self.evaluations.items()}

    @property
    def outcomes(self) -> dict[str, Scores]:
        """Each row's score, by task."""
        return {name: evaluation.outcomes for name, evaluation in self.evaluations.items()}


class Scorer:
    """Scores adapters on test sets and reports the progress."""

    def __init__(self, base: BaseRef, *, stage: str = "evaluate") -> None:
        self._base = lend_base(base)
        self._engine = evaluation_engine(current_store(), self._base)
        self._report = advance(stage)
        self._total = 0
        self._done = 0
        self.num_rows: dict[str, int] = {}

    @property
    def engine(self) -> str | None:
        """What answers the rows, such as "vllm 0.32.0"; None: this process does."""
        return None if self._engine is None else self._engine.name

    def expect(self, *passes: Sequence[TestSet]) -> None:
        """Set the total of the progress. Each pass is a sequence of test sets that will be scored."""
        self._total = sum(len(test_set.rows) for sets in passes for test_set in sets)

    def score(
        self, adapter_folder: Path | None, sets: Sequence[TestSet], *, general: bool = False, explain: bool = False
    ) -> Scored:
        """Score one adapter (None: the untouched base model) on each test set.

        `general` scores it on plain English too. `explain` measures what the collapse of a task's answers costs.
        """
        evaluations, answers, costs = {}, {}, {}
        on_engine = self._engine.answering(adapter_folder) if self._engine else nullcontext()
        with adapter_on(self._base.model, adapter_folder) as model, on_engine as answer:
            for test_set in sets:
                name = test_set.schema.name
                advance_task = partial(self._advance, name)
                evaluation = evaluate_task(model, self._base.tokenizer, test_set, test_set.rows, advance_task, answer)
                evaluations[name] = evaluation
                self.num_rows[name] = evaluation.num_rows
                answers[name] = dict(zip(test_set.rows["sha256"], evaluation.answers, strict=True))
                if explain and collapsed(evaluation.labels) is not None:
                    costs[name] = self._recentred_accuracy(model, test_set)
            on_english = perplexity(model, self._base.tokenizer) if general else None
        return Scored(evaluations, answers, on_english, costs)

    def score_suites(self, adapter_folder: Path | None, suites: Sequence[Suite]) -> dict[str, Scores]:
        """Score one adapter (None: the untouched base model) on suites of general ability: the score of each row."""
        self._total += sum(map(len, suites))
        on_engine = self._engine.answering(adapter_folder) if self._engine else nullcontext()
        with adapter_on(self._base.model, adapter_folder) as model, on_engine as answer:
            return {
                suite.name: suite.score(model, self._base.tokenizer, answer, partial(self._advance, suite.name))
                for suite in suites
            }

    def _recentred_accuracy(self, model: LanguageModel, test_set: TestSet) -> float:
        return recentred_accuracy(
            *label_scores(
                model,
                self._base.tokenizer,
                test_set.schema,
                test_set.rows,
                max_prompt_tokens=test_set.max_prompt_tokens,
            )
        )

    def count_too_long(self, test_set: TestSet, references: Sequence[str | Sequence[str]]) -> int:
        """Rows whose references no answer can match."""
        return count_too_long(self._base.tokenizer, test_set, references)

    def _advance(self, name: str, num_rows: int) -> None:
        self._done += num_rows
        self._report(self._done, self._total, name)


def collapse_notes(scored: Scored) -> tuple[str, ...]:
    """Say which label has taken over the answers to a task, and what that costs."""
    notes = []
    for name, recentred in scored.recentred.items():
        evaluation = scored.evaluations[name]
        label = collapsed(evaluation.labels)
        assert label is not None
        answer = "no label of the task" if label.label is None else brief(label.label)
        rows = 100 * label.num_rows / evaluation.num_rows
        note = f"{name}: {100 * label.share:.0f} % of the answers are {answer}, but {rows:.0f} % of the test rows are"
        if (recentred - evaluation.accuracy) * evaluation.num_rows >= 1:
            note += (
                f". If every label were answered as often as it occurs, accuracy would be {100 * recentred:.1f} % "
                f"instead of {100 * evaluation.accuracy:.1f} %"
            )
        notes.append(note)
    return tuple(notes)
