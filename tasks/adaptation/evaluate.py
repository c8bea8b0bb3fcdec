"""Evaluate a version on the frozen test rows of every task of its lineage."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from prefect import task

from deal_core.evaluation.accuracy_matrix import AccuracyMatrix
from deal_core.evaluation.metrics import right_answers, score_answers
from deal_core.evaluation.report import AdapterFacts, EvaluationReport, Scores
from deal_core.safe_text import listed
from infra.store.base import ObjectStore
from infra.store.keys import dataset_sha256
from infra.versions import Version
from tasks.adaptation.adaptation import AdaptationRun
from tasks.adaptation.stages import STAGE
from tasks.context import current_store
from tasks.lineage.datasets import read_manifest
from tasks.lineage.frozen_rows import (
    Answers,
    KeptAnswers,
    TestSet,
    answered_rows,
    arrival_rows,
    judging_rows,
    keep_answers,
    load_test_set,
    num_judging_of,
    read_answers,
    within_budget,
)
from tasks.lineage.record import KnownSlice, KnownTask, LineageRecord, read_record
from tasks.lineage.requests import Renewal, is_renewal_asked
from tasks.lineage.tombstones import TestRowsForgottenError, forgotten_tests
from tasks.lineage.version_files import borrowed_adapter
from tasks.monitoring.rows import has_reference, write_reference
from tasks.references import ArrivalScore, BaseRef, DatasetRef, Spared, TrainedAdapter, VersionScores

if TYPE_CHECKING:
    from tasks.adaptation.scorer import Scored, Scorer


MAX_TESTED_ROWS = 1000
"""Rows of an arrival on which the champion is scored before the training, at most: the score is then within 3 points of
that of all rows, with 95 % confidence."""


@task(name="evaluate", **STAGE)
def evaluate_version(
    adaptation: AdaptationRun, trained: TrainedAdapter, notes: tuple[str, ...] = ()
) -> EvaluationReport:
    """Score the new adapter on every task, and the base model and the parent on a new task.

    A known task keeps its first prompts and lengths; `evaluate.max_new_tokens` applies to new tasks only. The rows of a
    known task are frozen, so the base's accuracies come from the record and the parent's answers from the store. The
    parent is asked only rows without a stored answer.

    If a task's test rows were forgotten, the arrival's test rows replace them. Other tasks whose test rows were
    forgotten are then not judged, and keep the parent's figure. If test rows are renewed, the rows before stay as a
    slice. If a task gains labels, the new version is asked with the new labels and the parent without them, as each of
    them serves. The rows that tasks spare do not count.
    """
    from tasks.adaptation.scorer import Scorer, collapse_notes

    store = current_store()
    asked = _rows_to_ask(store, adaptation)
    scorer = Scorer(adaptation.base)
    found = _score(scorer, asked, adaptation, trained)
    _keep(store, adaptation, trained.uri, asked, found)
    notes = (*notes, *asked.notes, *_length_notes(scorer, asked, adaptation.dataset), *collapse_notes(found.now))
    return _report(adaptation.dataset, asked, found, scorer.num_rows, notes)


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """The test rows of an evaluation."""

    record: LineageRecord | None
    """The parent's record; None: it is the lineage's first version."""
    renewal: Renewal
    old: list[TestSet]
    """Of the tasks and slices that the parent knows, as the parent is asked."""
    new: list[TestSet]
    """Of a task that is new, or whose test rows are renewed."""
    answered: Answers
    """The parent's stored answers."""
    unanswered: list[TestSet]
    """The rows of `old` without one."""
    all: list[TestSet]
    """As the new version is asked: with the labels that its task gains."""
    unjudged: tuple[str, ...]
    """Tasks without test rows."""
    notes: tuple[str, ...]

    @property
    def slices(self) -> dict[str, str]:
        """For each slice its task."""
        return {each.name: each.of for each in self.renewal.slices}


def _rows_to_ask(store: ObjectStore, adaptation: AdaptationRun) -> _Asked:
    record, renewal, dataset, spared = adaptation.record, adaptation.renewal, adaptation.dataset, adaptation.spared
    unjudged = _unjudged(store, record, renewal)
    old = (
        [
            load_test_set(store, known)
            for known in record.tasks
            if known != renewal.known and known.schema.name not in unjudged
        ]
        if record
        else []
    )
    old += _slice_sets(store, record, renewal.slices) if record else []
    new: list[TestSet] = []
    notes: tuple[str, ...] = ()
    if renewal.known is not None:
        new = [_widened(load_test_set(store, renewal.known.judged_by(dataset)), dataset)]
    elif record is None or (known := record.task(dataset.task)) is None:
        new = [load_test_set(store, next(task for task in adaptation.tasks if task.schema.name == dataset.task))]
    else:
        notes = tuple(_notes_on_known_task(store, record.lineage, known, dataset))
    newly = [each for each in old if record and record.spared != spared]
    notes += tuple(_notes_on_spared([*newly, *new], spared))
    notes += tuple(
        f"{name} was not judged, because its test rows were forgotten; its figure is the parent's. Land test rows of "
        f"{name}, and it is judged again"
        for name in unjudged
    )
    new = [judging_rows(each, spared) for each in new]
    old = [judging_rows(each, spared) for each in old]
    old = within_budget(old, dataset.task, adaptation.spec.evaluate.max_old_rows)
    answered = adaptation.parent_answers
    if renewal.new_slice is not None:
        answered = {**answered, renewal.new_slice: answered.get(dataset.task, {})}
    return _Asked(
        record=record,
        renewal=renewal,
        old=old,
        new=new,
        answered=answered,
        unanswered=_unanswered(old, answered),
        all=[*(_widened(each, dataset, renewal.slices) for each in old), *new],
        notes=notes,
        unjudged=unjudged,
    )


def _unjudged(store: ObjectStore, record: LineageRecord | None, renewal: Renewal) -> tuple[str, ...]:
    """The tasks without test rows, if the arrival replaces forgotten test rows of its own task; else none may be."""

    def is_lost(known: KnownTask) -> bool:
        return forgotten_tests(store, known.schema.name, known.dataset_uri) is not None

    if record is None or renewal.known is None or not is_lost(renewal.known):
        return ()
    return tuple(known.schema.name for known in record.tasks if known != renewal.known and is_lost(known))


def _notes_on_spared(sets: Iterable[TestSet], spared: Spared) -> Iterator[str]:
    for each in sets:
        num_rows, name = len(each.rows), each.schema.name
        num_judging = num_judging_of(each.schema, num_rows, spared)
        if num_judging < num_rows:
            yield f"{num_judging} of {num_rows} test rows of {name} judge; the texts of the others may teach"


@dataclass(frozen=True, kw_only=True)
class _Found:
    """What the base model, the parent and the new version scored."""

    on_base: Scored
    on_parent: Scored
    """On the new rows; empty without a parent."""
    now: Scored
    answered: Answers
    """The parent's answers to all of the old rows."""
    facts: AdapterFacts


def _score(scorer: Scorer, asked: _Asked, adaptation: AdaptationRun, trained: TrainedAdapter) -> _Found:
    from deal_core.adapter.state import adapter_norm
    from tasks.adaptation.scorer import Scored

    answered, before = asked.answered, adaptation.parent_folder
    scorer.expect(asked.new, [*asked.new, *asked.unanswered] if before else [], asked.all)
    on_base = scorer.score(None, asked.new, general=True)
    on_parent = scorer.score(before, asked.new) if before else Scored({}, {}, None)
    if asked.unanswered:
        more = scorer.score(before, asked.unanswered).answers
        answered = answered | {name: answered.get(name, {}) | answers for name, answers in more.items()}
    now = scorer.score(trained.folder, asked.all, general=True, explain=True)
    facts = AdapterFacts(
        norm=adapter_norm(trained.folder),
        parent_norm=adapter_norm(before) if before else None,
        is_changed=adaptation.parent is None or adaptation.parent.adapter_sha256 != trained.sha256,
    )
    return _Found(on_base=on_base, on_parent=on_parent, now=now, answered=answered, facts=facts)


def _keep(store: ObjectStore, adaptation: AdaptationRun, adapter_uri: str, asked: _Asked, found: _Found) -> None:
    """Store the answers, and the reference for live traffic."""
    before = found.on_parent.answers if asked.record else found.on_base.answers
    completed = {each.schema.name: found.answered[each.schema.name] for each in asked.unanswered}
    keep_answers(store, adapter_uri, KeptAnswers(now=found.now.answers, before=before | completed))
    judging = [each for each in asked.all if each.schema.name not in asked.slices]
    write_reference(store, adapter_uri, adaptation.lineage, judging, found.now.evaluations)


def _length_notes(scorer: Scorer, asked: _Asked, dataset: DatasetRef) -> Iterator[str]:
    """Notes about right answers that are longer than the answers may be."""
    (own,) = (each for each in asked.all if each.schema.name == dataset.task)
    if num_too_long := scorer.count_too_long(own, right_answers(own.rows)):
        effect = "so no answer can match them" if own.schema.metric == "exact" else "so answers to them are cut"
        yield (
            f"{num_too_long} of {len(own.rows)} test answers of {dataset.task} are longer than "
            f"evaluate.max_new_tokens allows, {effect}"
        )
    if scorer.count_too_long(own, dataset.new_labels):
        yield (
            f"new labels of {dataset.task} are longer than the evaluate.max_new_tokens of its first arrival allows, so "
            "no version can answer with them"
        )


def _report(
    dataset: DatasetRef, asked: _Asked, found: _Found, num_rows: dict[str, int], notes: tuple[str, ...]
) -> EvaluationReport:
    record, renewal, now = asked.record, asked.renewal, found.now
    earlier = {each.schema.name: _outcomes(each, found.answered[each.schema.name]) for each in asked.old}
    parent_accuracies = (record.accuracies() if record else {}) | {
        name: sum(outcomes) / len(outcomes) for name, outcomes in earlier.items()
    }
    for each in renewal.slices:
        if each.name not in now.accuracies:  # its rows were forgotten
            parent_accuracies.pop(each.name, None)
    carried = {name: parent_accuracies.pop(name) for name in asked.unjudged}
    base_accuracy = ((record.base_accuracies() if record else {}) | found.on_base.accuracies)[dataset.task]
    parent_accuracy = (parent_accuracies | found.on_parent.accuracies).get(dataset.task)
    matrix = record.matrix if record else AccuracyMatrix()
    if renewal.known is not None:
        parent_accuracies |= found.on_parent.accuracies
        notes = (*notes, renewal.note(dataset))
        if renewal.new_slice is not None:
            matrix = matrix.with_slice(dataset.task, renewal.new_slice)
        matrix = matrix.remeasured(
            dataset.task, base_accuracy=base_accuracy, last_accuracy=found.on_parent.accuracies[dataset.task]
        )
    return EvaluationReport(
        task=dataset.task,
        num_rows=num_rows,
        notes=notes,
        accuracies=now.accuracies,
        outcomes=now.outcomes,
        perplexity=now.perplexity,
        parent_accuracies=parent_accuracies,
        parent_outcomes={**earlier, **found.on_parent.outcomes},
        base_accuracy=base_accuracy,
        base_perplexity=found.on_base.perplexity,
        parent_accuracy_new_task=parent_accuracy,
        matrix=matrix.with_row(
            dataset.task, {**carried, **now.accuracies}, base_accuracy=base_accuracy, parent_accuracy=parent_accuracy
        ),
        adapter=found.facts,
        majority_rate=now.evaluations[dataset.task].majority_rate,
        metrics={each.schema.name: each.schema.metric for each in asked.all},
        slices=asked.slices,
        labels={name: each.labels for name, each in now.evaluations.items() if each.labels},
    )


def _notes_on_known_task(store: ObjectStore, lineage: str, known: KnownTask, dataset: DatasetRef) -> Iterator[str]:
    """Notes about unused test rows of an arrival, and about labels that came after the test rows were frozen."""
    is_frozen = dataset_sha256(known.dataset_uri) == dataset.sha256
    if dataset.num_test and not is_frozen and read_manifest(store, dataset.uri).split == "given":
        yield (
            f"{dataset.task} stays judged by the {known.num_test} test rows of its first arrival; the "
            f"{dataset.num_test} test rows of this arrival are neither learned nor asked"
        )
    if not dataset.num_test and is_renewal_asked(store, lineage, known):
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
            found = load_test_set(store, replace(known, dataset_uri=each.dataset_uri))
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


def score_arrival(base: BaseRef, champion: Version, record: LineageRecord, dataset: DatasetRef) -> ArrivalScore | None:
    """Score the champion, which has the record, on an arrival's training rows, before anything is trained on them.

    It is asked as it serves: with the labels that it knows. Of more than MAX_TESTED_ROWS rows, those with the smallest
    digests are asked.

    Returns:
        The score; None: the task is new, or its test rows were forgotten and the arrival brings new ones.
    """
    from tasks.adaptation.scorer import Scorer

    store = current_store()
    known = record.task(dataset.task)
    if known is None or forgotten_tests(store, dataset.task, known.dataset_uri) is not None:
        return None
    rows = arrival_rows(store, known, dataset.uri, MAX_TESTED_ROWS)
    scorer = Scorer(base, stage="test")
    scorer.expect([rows])
    with borrowed_adapter(store, champion) as folder:
        found = scorer.score(folder, [rows])
    return ArrivalScore(accuracy=found.accuracies[dataset.task], num_rows=len(rows.rows), of_rows=dataset.num_train)


def score_version(version: Version) -> VersionScores:
    """Score a registered version again on the frozen test rows of its own evaluation.

    A version without a reference for its live traffic gets one.
    """
    from tasks.adaptation.scorer import Scorer

    store = current_store()
    record, answered = read_record(store, version.adapter_uri), read_answers(store, version.adapter_uri).now
    sets, unjudged = [], {}
    for known in record.tasks:
        try:
            judging = judging_rows(load_test_set(store, known), record.spared)
            sets.append(answered_rows(judging, answered.get(known.schema.name, {})))
        except TestRowsForgottenError as error:
            unjudged[known.schema.name] = str(error)
    scorer = Scorer(record.base)
    scorer.expect(sets)
    with borrowed_adapter(store, version) as folder:
        found = scorer.score(folder, sets)
    if not has_reference(store, version.adapter_uri):
        write_reference(store, version.adapter_uri, version.lineage, sets, found.evaluations)
    return VersionScores(
        accuracies=found.accuracies, recorded=record.accuracies(), num_rows=scorer.num_rows, unjudged=unjudged
    )
