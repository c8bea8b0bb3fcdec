"""Scores adapters on test rows, and says when the answers to a task have collapsed to one label.

The module imports torch, so a stage imports it only when it scores.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from deal_core.adapter.state import adapter_on
from deal_core.base_model.language_model import LanguageModel
from deal_core.base_model.turn_ends import stop_ids
from deal_core.evaluation.evaluate import (
    TaskEvaluation,
    confidences_of,
    count_too_long,
    evaluate_answers,
    evaluate_task,
)
from deal_core.evaluation.label_scores import label_scores, recentred_accuracy
from deal_core.evaluation.likelihood import divergence_from_base
from deal_core.evaluation.metrics import collapsed
from deal_core.evaluation.proof import Proof, make_proof
from deal_core.evaluation.report import Scores
from deal_core.general.perplexity import perplexity
from deal_core.general.suites import Suite
from deal_core.safe_text import brief
from deal_core.training.jobs import AnswerJob, AnswerResult
from infra.general_scores import answerer_of
from infra.launch import is_in_this_process, launch_job
from infra.serving.evaluation import evaluation_engine
from infra.settings import HomeSettings, LaunchSettings
from infra.store.base import ObjectStore
from tasks.base import cached_base, lend_tokenizer, release_base
from tasks.lineage.frozen_rows import Answers, TestSet
from tasks.progress import advance
from tasks.references import BaseRef

if TYPE_CHECKING:
    from peft import PeftModel

    from deal_core.evaluation.answering import ServedTask


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

    def only(self, sets: Sequence[TestSet]) -> Scored:
        """Return what was found on these test sets."""
        names = [test_set.schema.name for test_set in sets]
        return Scored(
            {name: self.evaluations[name] for name in names}, {name: self.answers[name] for name in names}, None
        )


_Found = tuple[Mapping[str, TaskEvaluation], float | None]
"""The evaluations by task, and the perplexity on plain English."""


@dataclass(frozen=True)
class Processes:
    """Several processes that answer test rows, each its share."""

    number: int
    jobs_folder: str
    """Folder in the store for their jobs."""
    folder: Path
    """Folder on this machine for rows and logs."""


class Scorer:
    """Scores adapters on test sets and reports the progress.

    An engine answers the rows if one is set (DEAL_EVALUATE_ENGINE); else `processes` do, if they are given and not this
    process alone. This process loads the base model only for what it computes itself.
    """

    def __init__(
        self, store: ObjectStore, base: BaseRef, *, stage: str = "evaluate", processes: Processes | None = None
    ) -> None:
        self._store = store
        self._base = base
        self._engine = evaluation_engine(store, partial(cached_base, base))
        is_alone = processes is None or self._engine is not None or is_in_this_process(processes.number)
        self._processes = None if is_alone else processes
        self._report = advance(stage)
        self._total = 0
        self._done = 0
        self.num_rows: dict[str, int] = {}

    @property
    def engine(self) -> str | None:
        """What answers the rows, such as "vllm 0.32.0"; None: this process does."""
        return None if self._engine is None else self._engine.name

    @cached_property
    def answerer(self) -> str:
        """What computes the answers, see `answerer_of`. Only answers of one are compared."""
        return answerer_of(self.engine, self._base.quantize, stop_ids(self._tokenizer))

    @cached_property
    def _tokenizer(self) -> Any:
        return lend_tokenizer(self._base)

    def expect(self, *passes: Sequence[TestSet]) -> None:
        """Set the total of the progress. Each pass is a sequence of test sets that will be scored."""
        self._total = sum(len(test_set.rows) for sets in passes for test_set in sets)

    def score(
        self, adapter_folder: Path | None, sets: Sequence[TestSet], *, general: bool = False, explain: bool = False
    ) -> Scored:
        """Score one adapter (None: the untouched base model) on each test set.

        `general` scores it on plain English too. `explain` measures what the collapse of a task's answers costs.
        """
        score = self._alone if self._processes is None else partial(self._together, self._processes)
        evaluations, on_english = score(adapter_folder, sets, general)
        answers, costs = {}, {}
        for test_set in sets:
            evaluation = evaluations[test_set.schema.name]
            self.num_rows[test_set.schema.name] = evaluation.num_rows
            answers[test_set.schema.name] = dict(zip(test_set.rows["sha256"], evaluation.answers, strict=True))
            if explain and collapsed(evaluation.labels) is not None:
                with adapter_on(cached_base(self._base).model, adapter_folder) as model:
                    costs[test_set.schema.name] = self._recentred_accuracy(model, test_set)
        return Scored(evaluations, answers, on_english, costs)

    def _alone(self, adapter_folder: Path | None, sets: Sequence[TestSet], general: bool) -> _Found:
        """Let this process answer, or the engine."""
        on_engine = self._engine.answering(adapter_folder) if self._engine else nullcontext()
        with adapter_on(cached_base(self._base).model, adapter_folder) as model, on_engine as answer:
            evaluations = {
                test_set.schema.name: evaluate_task(
                    model,
                    self._tokenizer,
                    test_set,
                    test_set.rows,
                    partial(self._advance, test_set.schema.name),
                    answer,
                )
                for test_set in sets
            }
            return evaluations, perplexity(model, self._tokenizer) if general else None

    def _together(
        self, processes: Processes, adapter_folder: Path | None, sets: Sequence[TestSet], general: bool
    ) -> _Found:
        """Let several processes answer the rows and read the plain English."""
        rows_folder = processes.folder / "rows"
        shutil.rmtree(rows_folder, ignore_errors=True)
        rows_folder.mkdir(parents=True)
        files = [rows_folder / f"{number}.parquet" for number in range(len(sets))]
        for file, test_set in zip(files, sets, strict=True):
            test_set.rows.to_parquet(str(file))
        job = AnswerJob(
            kind="score" if general else "answer",
            base_source=self._base.source,
            base_sha256=self._base.sha256,
            cache_folder=HomeSettings().cache_dir,
            quantize=self._base.quantize,
            shard=LaunchSettings().shard,
            num_processes=processes.number,
            adapter_folder=adapter_folder,
            tasks=tuple(sets),
            rows_files=tuple(files),
        )
        left = [len(test_set.rows) for test_set in sets]

        def on_message(message: Mapping[str, Any]) -> None:
            place = message["task"]
            num_rows = min(message["rows"], left[place])  # the other processes may have answered fewer so far
            left[place] -= num_rows
            self._advance(sets[place].schema.name, num_rows)

        release_base()  # the processes need the memory of this device
        found = launch_job(self._store, job, processes.jobs_folder, processes.folder / "ranks", on_message)
        assert isinstance(found, AnswerResult)
        evaluations = {
            test_set.schema.name: evaluate_answers(
                test_set.schema, test_set.rows, [row.text for row in given], confidences_of(given)
            )
            for test_set, given in zip(sets, found.answers, strict=True)
        }
        return evaluations, found.perplexity

    def score_suites(self, adapter_folder: Path | None, suites: Sequence[Suite]) -> dict[str, Scores]:
        """Score one adapter (None: the untouched base model) on suites of general ability: the score of each row."""
        self._total += sum(map(len, suites))
        on_engine = self._engine.answering(adapter_folder) if self._engine else nullcontext()
        with adapter_on(cached_base(self._base).model, adapter_folder) as model, on_engine as answer:
            return {
                suite.name: suite.score(model, self._tokenizer, answer, partial(self._advance, suite.name))
                for suite in suites
            }

    def _recentred_accuracy(self, model: LanguageModel, test_set: TestSet) -> float:
        return recentred_accuracy(
            *label_scores(
                model,
                self._tokenizer,
                test_set.schema,
                test_set.rows,
                max_prompt_tokens=test_set.max_prompt_tokens,
            )
        )

    def divergence_from_base(self, adapter_folder: Path, test_set: TestSet) -> float | None:
        """How far an adapter is from the base model on a task's rows, see `likelihood.divergence_from_base`.

        None: other processes answer, and the base model is not loaded into this one.
        """
        if self._processes is not None:
            return None
        with adapter_on(cached_base(self._base).model, adapter_folder) as model:
            return divergence_from_base(model, self._tokenizer, test_set, test_set.rows)

    def prove(self, adapter_folder: Path, tasks: Sequence[ServedTask]) -> Proof | None:
        """Return what tells an engine that applies an adapter, see `deal_core.evaluation.proof`.

        None: other processes answer, and the base model is not loaded into this one. Or no engine serves adapters on
        it.
        """
        base = None if self._processes is not None else cached_base(self._base)
        if base is None or base.kind == "seq2seq":
            return None
        with adapter_on(base.model, adapter_folder) as model:
            return make_proof(cast("PeftModel", model), self._tokenizer, tasks)

    def count_too_long(self, test_set: TestSet, references: Sequence[str | Sequence[str]]) -> int:
        """Rows whose references no answer can match."""
        return count_too_long(self._tokenizer, test_set, references)

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
