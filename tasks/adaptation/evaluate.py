"""Evaluate a version on the frozen test rows of every task of its lineage."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from prefect import task
from prefect.cache_policies import NO_CACHE

from deal_core.config import EvaluateConfig
from deal_core.evaluation.answer_scores import plain_answer, right_answers, score_answers
from deal_core.evaluation.label_figures import collapsed, number_labels
from deal_core.evaluation.metrics import AccuracyMatrix
from deal_core.evaluation.report import AdapterFacts, EvaluationReport, Scores
from deal_core.safe_text import brief, listed
from infra.store.base import ObjectStore
from infra.store.keys import dataset_sha256
from tasks.adaptation.frozen_rows import (
    Answers,
    KeptAnswers,
    TestSet,
    answered_rows,
    keep_answers,
    load_test_set,
    load_test_sets,
    read_answers,
    within_budget,
)
from tasks.adaptation.ingest import read_manifest
from tasks.base import lend_base
from tasks.context import current_store
from tasks.lineage.record import KnownSlice, LineageRecord, read_record
from tasks.lineage.renewal import find_renewal, is_renewal_asked
from tasks.lineage.tombstones import TestRowsForgottenError, forgotten_tests
from tasks.lineage.version_files import borrowed_adapter, borrowed_parent
from tasks.monitoring.reference import has_reference, write_reference
from tasks.progress import advance
from tasks.references import AdapterRef, BaseRef, DatasetRef, VersionRef, VersionScores

if TYPE_CHECKING:
    from deal_core.evaluation.generation import LanguageModel
    from deal_core.evaluation.score import TaskEvaluation


@task(name="evaluate", cache_policy=NO_CACHE)
def evaluate_version(
    base: BaseRef,
    parent: VersionRef | None,
    adapter: AdapterRef,
    dataset: DatasetRef,
    config: EvaluateConfig,
    max_prompt_tokens: int,
    notes: tuple[str, ...] = (),
) -> EvaluationReport:
    """Score the new adapter on every task, and the base model and the parent on a new task.

    A known task keeps its first prompts and lengths; `config.max_new_tokens` applies to new tasks only. The rows of a
    known task are frozen, so the base's accuracies come from the record and the parent's answers from the store. The
    parent is asked only rows without a stored answer.

    If a task's test rows were forgotten, the arrival's test rows replace them. If they are renewed, the rows before
    stay as a slice. If a task gains labels, the new version is asked with the new labels and the parent without them,
    as each of them serves.
    """
    store = current_store()
    record = read_record(store, parent.adapter_uri) if parent else None
    renewal = find_renewal(store, record, dataset)
    renewed, slices = renewal.known, renewal.slices
    sets = load_test_sets(store, [known for known in record.tasks if known != renewed] if record else ())
    sets += _slice_sets(store, record, slices) if record else []
    sets = within_budget(sets, dataset.task, config.max_old_rows)
    new = []
    if renewed is not None:
        new = [_widened(each, dataset) for each in load_test_sets(store, [renewed.judged_by(dataset)])]
    elif record is None or record.task(dataset.task) is None:
        schema = read_manifest(store, dataset.uri).task
        new = [load_test_set(store, schema, dataset.uri, max_prompt_tokens, config.max_new_tokens)]
    else:
        notes = (*notes, *_notes_on_known_task(store, record, dataset))
    kept = read_answers(store, parent.adapter_uri) if parent else None
    answered = kept.now if kept else {}
    if renewal.new_slice is not None:
        answered = {**answered, renewal.new_slice: answered.get(dataset.task, {})}
    open_rows = _unanswered(sets, answered)
    all_sets = [*(_widened(each, dataset, slices) for each in sets), *new]
    scorer = Scorer(base, config)
    scorer.expect(new, [*new, *open_rows] if parent else [], all_sets)
    with borrowed_parent(store, parent) as parent_folder, borrowed_adapter(store, adapter) as folder:
        on_base = scorer.score(None, new, general=True)
        on_parent = scorer.score(parent_folder, new) if parent else Scored({}, {}, None)
        if open_rows:
            asked = scorer.score(parent_folder, open_rows).answers
            answered = answered | {name: answered.get(name, {}) | answers for name, answers in asked.items()}
        now = scorer.score(folder, all_sets, general=True, explain=True)
        facts = _look_at(adapter, folder, parent, parent_folder)
    (own,) = (each for each in all_sets if each.schema.name == dataset.task)
    if num_too_long := scorer.count_too_long(own, right_answers(own.rows)):
        effect = "so no answer can match them" if own.schema.metric == "exact" else "so answers to them are cut"
        notes = (*notes, f"{num_too_long} of {len(own.rows)} test answers of {dataset.task} are longer than "
                         f"evaluate.max_new_tokens allows, {effect}")  # fmt: skip
    if scorer.count_too_long(own, dataset.new_labels):
        notes = (*notes, f"new labels of {dataset.task} are longer than the evaluate.max_new_tokens of its first "
                         "arrival allows, so no version can answer with them")  # fmt: skip
    notes = (*notes, *collapse_notes(now))
    before = on_parent.answers if parent else on_base.answers
    completed = {each.schema.name: answered[each.schema.name] for each in open_rows}
    keep_answers(store, adapter.uri, KeptAnswers(now=now.answers, before=before | completed))
    judging = [each for each in all_sets if each.schema.name not in {known.name for known in slices}]
    write_reference(store, adapter.uri, adapter.lineage, judging, now.evaluations)
    earlier = {each.schema.name: _outcomes(each, answered[each.schema.name]) for each in sets}
    parent_accuracies = (record.accuracies() if record else {}) | {
        name: sum(outcomes) / len(outcomes) for name, outcomes in earlier.items()
    }
    for each in slices:
        if each.name not in now.accuracies:  # its rows were forgotten
            parent_accuracies.pop(each.name, None)
    base_accuracy = (_base_accuracies(record) | on_base.accuracies)[dataset.task]
    parent_accuracy = (parent_accuracies | on_parent.accuracies).get(dataset.task)
    matrix = record.matrix if record else AccuracyMatrix()
    if renewed is not None:
        parent_accuracies |= on_parent.accuracies
        notes = (*notes, renewal.note(dataset))
        if renewal.new_slice is not None:
            matrix = matrix.with_slice(dataset.task, renewal.new_slice)
        matrix = matrix.remeasured(
            dataset.task, base_accuracy=base_accuracy, last_accuracy=on_parent.accuracies[dataset.task]
        )
    return EvaluationReport(
        task=dataset.task,
        accuracies=now.accuracies,
        parent_accuracies=parent_accuracies,
        base_accuracy=base_accuracy,
        parent_accuracy_new_task=parent_accuracy,
        num_rows=scorer.num_rows,
        matrix=matrix.with_row(
            dataset.task, now.accuracies, base_accuracy=base_accuracy, parent_accuracy=parent_accuracy
        ),
        notes=notes,
        outcomes=now.outcomes,
        parent_outcomes={**earlier, **on_parent.outcomes},
        perplexity=now.perplexity,
        base_perplexity=on_base.perplexity,
        adapter=facts,
        majority_rate=now.evaluations[dataset.task].majority_rate,
        metrics={each.schema.name: each.schema.metric for each in all_sets},
        slices={each.name: each.of for each in slices},
        labels={name: found.labels for name, found in now.evaluations.items() if found.labels},
    )


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
        return {name: found.accuracy for name, found in self.evaluations.items()}

    @property
    def outcomes(self) -> dict[str, Scores]:
        """Each row's score, by task."""
        return {name: found.outcomes for name, found in self.evaluations.items()}


class Scorer:
    """Scores adapters on test sets and reports the progress."""

    def __init__(self, base: BaseRef, config: EvaluateConfig) -> None:
        self._base = lend_base(base)
        self._config = config
        self._report = advance("evaluate")
        self._total = 0
        self._done = 0
        self.num_rows: dict[str, int] = {}

    def expect(self, *passes: Sequence[TestSet]) -> None:
        """Set the total of the progress. Each pass is a sequence of test sets that will be scored."""
        self._total = sum(len(test_set.rows) for sets in passes for test_set in sets)

    def score(
        self, adapter_folder: Path | None, sets: Sequence[TestSet], *, general: bool = False, explain: bool = False
    ) -> Scored:
        """Score one adapter (None: the untouched base model) on each test set.

        Args:
            adapter_folder: the adapter.
            sets: the test sets.
            general: score it on plain English too.
            explain: measure what the collapse of a task's answers costs.
        """
        from deal_core.adapter.state import adapter_on
        from deal_core.evaluation.general_ability import perplexity
        from deal_core.evaluation.score import evaluate_task

        found, answers, recentred = {}, {}, {}
        with adapter_on(self._base.model, adapter_folder) as model:
            for test_set in sets:
                evaluation = evaluate_task(
                    model,
                    self._base.tokenizer,
                    test_set.schema,
                    test_set.rows,
                    replace(self._config, max_new_tokens=test_set.max_new_tokens),
                    max_prompt_tokens=test_set.max_prompt_tokens,
                    on_progress=partial(self._advance, test_set.schema.name),
                )
                found[evaluation.task] = evaluation
                self.num_rows[evaluation.task] = evaluation.num_rows
                answers[evaluation.task] = dict(zip(test_set.rows["sha256"], evaluation.answers, strict=True))
                if explain and collapsed(evaluation.labels) is not None:
                    recentred[evaluation.task] = self._recentred(model, test_set)
            known = perplexity(model, self._base.tokenizer) if general else None
        return Scored(found, answers, known, recentred)

    def _recentred(self, model: LanguageModel, test_set: TestSet) -> float:
        from deal_core.evaluation.criterion import recentred_accuracy
        from deal_core.evaluation.label_scores import label_log_probs

        numbers = number_labels(test_set.schema.labels)
        targets = [numbers[plain_answer(reference)] for reference in test_set.rows["output"]]
        log_probs_NL = label_log_probs(
            model, self._base.tokenizer, test_set.schema, list(test_set.rows["input"]), self._config,
            max_prompt_tokens=test_set.max_prompt_tokens,
        )  # fmt: skip
        return recentred_accuracy(log_probs_NL.double().numpy(), np.array(targets))

    def count_too_long(self, test_set: TestSet, references: Sequence[str | Sequence[str]]) -> int:
        """Rows whose references no answer can match."""
        from deal_core.evaluation.score import count_too_long

        return count_too_long(self._base.tokenizer, test_set.schema, references, test_set.max_new_tokens)

    def _advance(self, name: str, num_rows: int) -> None:
        self._done += num_rows
        self._report(self._done, self._total, name)


def collapse_notes(scored: Scored) -> tuple[str, ...]:
    """Say which label has taken over the answers to a task, and what that costs."""
    notes = []
    for name, recentred in scored.recentred.items():
        found = scored.evaluations[name]
        label = collapsed(found.labels)
        assert label is not None
        answer = "no label of the task" if label.label is None else brief(label.label)
        rows = 100 * label.num_rows / found.num_rows
        notes.append(
            f"{name}: {100 * label.share:.0f} % of the answers are {answer}, but {rows:.0f} % of the test rows are. If "
            f"every label were answered as often as it occurs, accuracy would be {100 * recentred:.1f} % instead of "
            f"{100 * found.accuracy:.1f} %"
        )
    return tuple(notes)


def _notes_on_known_task(store: ObjectStore, record: LineageRecord, dataset: DatasetRef) -> Iterator[str]:
    """Notes about unused test rows of an arrival, and about labels that came after the test rows were frozen."""
    known = record.task(dataset.task)
    is_frozen = known is not None and dataset_sha256(known.dataset_uri) == dataset.sha256
    if known and dataset.num_test and not is_frozen and read_manifest(store, dataset.uri).split == "given":
        yield (
            f"{dataset.task} stays judged on the {known.num_test} test rows of its first arrival; the "
            f"{dataset.num_test} test rows of this arrival are neither learned nor asked"
        )
    if known and record and not dataset.num_test and is_renewal_asked(store, record.lineage, known):
        yield f"new test rows of {dataset.task} were asked for, but this arrival has none; the next one may bring them"
    if dataset.new_labels:
        yield (
            f"{dataset.task} gains the labels {listed(dataset.new_labels)}: its frozen test rows have none of them, "
            "so no figure shows how well they are learned"
        )


def _slice_sets(store: ObjectStore, record: LineageRecord, slices: Sequence[KnownSlice]) -> list[TestSet]:
    """The test rows of slices, asked as their tasks are. Slices whose rows were forgotten are left out."""
    sets = []
    for each in slices:
        known = record.task(each.of)
        assert known is not None, "a slice is of a task that was learned"
        if forgotten_tests(store, each.of, each.dataset_uri) is None:
            (found,) = load_test_sets(store, [replace(known, dataset_uri=each.dataset_uri)])
            sets.append(replace(found, schema=replace(found.schema, name=each.name)))
    return sets


def _widened(test_set: TestSet, dataset: DatasetRef, slices: Sequence[KnownSlice] = ()) -> TestSet:
    """The test set with the labels that its task gains with the arrival."""
    is_slice = any(each.name == test_set.schema.name and each.of == dataset.task for each in slices)
    schema = test_set.schema
    return replace(test_set, schema=schema.with_labels(dataset.new_labels) if is_slice else dataset.widen(schema))


def _unanswered(sets: Sequence[TestSet], answered: Answers) -> list[TestSet]:
    """The rows without an answer, for each task that has such rows."""
    found = []
    for test_set in sets:
        answers = answered.get(test_set.schema.name, {})
        places = [place for place, digest in enumerate(test_set.rows["sha256"]) if digest not in answers]
        if places:
            found.append(replace(test_set, rows=test_set.rows.select(places)))
    return found


def _outcomes(test_set: TestSet, answers: Mapping[str, str]) -> Scores:
    given = [answers[digest] for digest in test_set.rows["sha256"]]
    return score_answers(test_set.schema.metric, given, right_answers(test_set.rows))


def _look_at(adapter: AdapterRef, folder: Path, parent: VersionRef | None, parent_folder: Path | None) -> AdapterFacts:
    from deal_core.adapter.state import adapter_norm

    return AdapterFacts(
        norm=adapter_norm(folder),
        parent_norm=adapter_norm(parent_folder) if parent_folder else None,
        is_changed=parent is None or parent.adapter_sha256 != adapter.sha256,
    )


def _base_accuracies(record: LineageRecord | None) -> dict[str, float]:
    if record is None:
        return {}
    pairs = zip(record.matrix.tasks, record.matrix.base, strict=True)
    return {name: value for name, value in pairs if value is not None}


@task(name="score", cache_policy=NO_CACHE)
def score_version(version: VersionRef, config: EvaluateConfig) -> VersionScores:
    """Score a registered version again on the frozen test rows of its own evaluation.

    A version without a reference for its live traffic gets one.
    """
    store = current_store()
    record, kept = read_record(store, version.adapter_uri), read_answers(store, version.adapter_uri)
    sets, unjudged = [], {}
    for known in record.tasks:
        try:
            answered = kept.now.get(known.schema.name, {}) if kept else {}
            sets += [answered_rows(test_set, answered) for test_set in load_test_sets(store, [known])]
        except TestRowsForgottenError as error:
            unjudged[known.schema.name] = str(error)
    scorer = Scorer(record.base, config)
    scorer.expect(sets)
    with borrowed_adapter(store, version) as folder:
        found = scorer.score(folder, sets)
    if not has_reference(store, version.adapter_uri):
        write_reference(store, version.adapter_uri, version.lineage, sets, found.evaluations)
    return VersionScores(
        accuracies=found.accuracies, recorded=record.accuracies(), num_rows=scorer.num_rows, unjudged=unjudged
    )
