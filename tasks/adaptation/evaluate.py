"""Evaluate a version on the frozen test rows of every task of its lineage."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING

from prefect import task

from deal_core.adapter.files import PROOF_FILE
from deal_core.evaluation.accuracy_matrix import AccuracyMatrix
from deal_core.evaluation.interval import CellScore, score_text
from deal_core.evaluation.metrics import right_answers, score_answers
from deal_core.evaluation.report import AdapterFacts, AddedRows, Debt, EvaluationReport, Scores, mean_score
from deal_core.evaluation.significance import PairedDrop
from deal_core.safe_text import listed
from infra.store.base import ObjectStore
from infra.store.keys import dataset_sha256
from infra.store.opening import open_store
from infra.versions import Version, Versions, descent
from tasks.adaptation.general import measure_general
from tasks.adaptation.run import STAGE, AdaptationRun
from tasks.lineage.datasets import read_manifest
from tasks.lineage.frozen_rows import (
    Answers,
    KeptAnswers,
    TestSet,
    answered_rows,
    keep_answers,
    load_added,
    load_test_set,
    read_answers,
    within_budget,
)
from tasks.lineage.record import KnownTask, read_record
from tasks.lineage.requests import is_renewal_asked
from tasks.lineage.tombstones import TestRowsForgottenError, forgotten_tests
from tasks.lineage.version_files import borrowed_adapter
from tasks.monitoring.rows import has_reference, write_reference
from tasks.progress import staged
from tasks.references import DatasetRef, TrainedAdapter, VersionScores

if TYPE_CHECKING:
    from datasets import Dataset

    from tasks.scorer import Scored, Scorer


def _describe(report: EvaluationReport) -> str:
    scores = [f"{name} {score_text(share, report.num_rows.get(name))}" for name, share in report.accuracies.items()]
    return f"in %: {'; '.join(scores)}"


@task(name="evaluate", **STAGE)
@staged("evaluate", _describe)
def evaluate_version(
    adaptation: AdaptationRun, trained: TrainedAdapter, notes: tuple[str, ...] = ()
) -> EvaluationReport:
    """Score the new adapter on every task, and the base model and the parent on a new task.

    A known task keeps its first prompts and lengths; `train.max_answer_tokens` applies to new tasks only. The rows of a
    known task are frozen, so the base's accuracies come from the record and the parent's answers from the store. The
    parent is asked only rows without a stored answer. Test rows that the version adds to its task are asked of all
    three, and scored apart.

    If a task's test rows were forgotten, the arrival's test rows replace them. Other tasks whose test rows were
    forgotten are then not judged, and keep the parent's figure. If test rows are renewed, the rows before stay as a
    slice. If a task gains labels, the new version is asked with the new labels and the parent without them, as each of
    them serves.
    """
    from tasks.scorer import Processes, Scorer, collapse_notes

    store = open_store()
    processes = Processes(adaptation.spec.train.num_processes, adaptation.jobs_folder, adaptation.folder / "answers")
    scorer = Scorer(store, adaptation.base, processes=processes)
    asked = _rows_to_ask(store, adaptation, scorer)
    scores = _score(scorer, asked, adaptation, trained)
    # Store the answers for the next version's comparison, and the reference for live traffic.
    before = scores.on_parent.answers if adaptation.record else scores.on_base.answers
    completed = {test_set.schema.name: scores.answered[test_set.schema.name] for test_set in asked.unanswered}
    answers = KeptAnswers(now=scores.now_answers, before=before | completed, answerer=scorer.answerer)
    keep_answers(store, trained.uri, answers)
    judging = [test_set for test_set in asked.all if test_set.schema.name not in asked.slices]
    write_reference(store, trained.uri, adaptation.lineage, judging, scores.now.evaluations)
    general = measure_general(store, scorer, adaptation, trained)
    (own,) = (test_set for test_set in asked.all if test_set.schema.name == adaptation.dataset.task)
    divergence = scorer.divergence_from_base(trained.folder, own)
    if proof := scorer.prove(trained.folder, [own, *(test_set for test_set in judging if test_set is not own)]):
        store.put_bytes(f"{trained.uri}/{PROOF_FILE}", json.dumps(proof.to_json()).encode())
    of_rows = (*asked.notes, *_length_notes(scorer, own, adaptation.dataset), *collapse_notes(scores.now))
    notes = (*notes, *of_rows, *general.notes)
    report = _report(store, adaptation, asked, scores, scorer.num_rows, notes, scorer.answerer)
    return replace(report, general=general.scores, base_divergence=divergence)


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """The test rows of an evaluation."""

    old: list[TestSet]
    """Of the tasks and slices that the parent knows, as the parent is asked."""
    new: list[TestSet]
    """Of a task that is new, or whose test rows are renewed."""
    kept: KeptAnswers
    """The parent's stored answers; none without a parent, or if they were forgotten."""
    answered: Answers
    """Those of them that the same model gave in the same way."""
    unanswered: list[TestSet]
    """The rows of `old` without one."""
    all: list[TestSet]
    """As the new version is asked: with the labels that its task gains."""
    added: TestSet | None
    """The rows that the new version adds to those of its task."""
    slices: dict[str, str]
    """For each slice its task."""
    unjudged: tuple[str, ...]
    """Tasks without test rows."""
    notes: tuple[str, ...]


def _rows_to_ask(store: ObjectStore, adaptation: AdaptationRun, scorer: Scorer) -> _Asked:
    record, renewal, dataset = adaptation.record, adaptation.renewal, adaptation.dataset
    slices = {part.name: part.of for part in renewal.slices}
    notes: list[str] = []

    def is_lost(task: KnownTask) -> bool:
        return forgotten_tests(store, task.schema.name, task.grown().test_uris) is not None

    # Only an arrival that replaces forgotten test rows of its own task may leave other tasks unjudged.
    unjudged: list[str] = []
    if record and renewal.known and is_lost(renewal.known):
        unjudged = [task.schema.name for task in record.tasks if task != renewal.known and is_lost(task)]
    old: list[TestSet] = []
    if record:
        judged = [task for task in record.tasks if task != renewal.known and task.schema.name not in unjudged]
        old = [load_test_set(store, task.grown()) for task in judged]
        for part in renewal.slices:  # asked as their tasks are; those whose rows were forgotten are left out
            whole = record.task(part.of)
            assert whole is not None, "a slice is of a task that was learned"
            if forgotten_tests(store, part.of, part.test_uris) is None:
                test_set = load_test_set(store, replace(whole, tests=part.tests))
                old.append(replace(test_set, schema=replace(test_set.schema, name=part.name)))

    added = [load_added(store, task) for task in adaptation.tasks if task.added is not None]
    new: list[TestSet] = []
    if renewal.known is not None:
        new = [_widened(load_test_set(store, renewal.known.judged_by(dataset)), dataset, slices)]
    elif record is None or (known := record.task(dataset.task)) is None:
        new = [load_test_set(store, task) for task in adaptation.tasks if task.schema.name == dataset.task]
    elif adaptation.consolidation is None:
        notes += _notes_on_known_task(store, record.lineage, known, dataset)
    notes += [
        f"{name} was not judged, because its test rows were forgotten; its figure is the parent's. Land test rows of "
        f"{name}, and it is judged again"
        for name in unjudged
    ]
    old = within_budget(old, dataset.task, adaptation.spec.evaluate.max_old_rows)

    # Only answers of one answerer are compared, so that no difference comes from its arithmetic or its stop tokens.
    kept = read_answers(store, adaptation.parent.adapter_uri) if adaptation.parent else KeptAnswers({}, {})
    answered = kept.now if kept.answerer == scorer.answerer else {}
    if scorer.engine is not None:
        notes.append(f"the test rows were answered by {scorer.engine}")
    if renewal.new_slice is not None:
        answered = {**answered, renewal.new_slice: answered.get(dataset.task, {})}
    unanswered = []
    for test_set in old:
        answers = answered.get(test_set.schema.name, {})
        places = [place for place, digest in enumerate(test_set.rows["sha256"]) if digest not in answers]
        if places:
            unanswered.append(replace(test_set, rows=test_set.rows.select(places)))
    return _Asked(
        old=old,
        new=new,
        kept=kept,
        answered=answered,
        unanswered=unanswered,
        all=[*(_widened(test_set, dataset, slices) for test_set in old), *new],
        added=added[0] if added else None,
        slices=slices,
        unjudged=tuple(unjudged),
        notes=tuple(notes),
    )


def _notes_on_known_task(store: ObjectStore, lineage: str, known: KnownTask, dataset: DatasetRef) -> Iterator[str]:
    """Notes about unused test rows of an arrival, and about labels that came after the test rows were frozen."""
    is_frozen = dataset.sha256 in map(dataset_sha256, known.grown().test_uris)
    if dataset.num_test and not is_frozen and read_manifest(store, dataset.uri).split == "given":
        yield (
            f"{dataset.task} stays judged by its {known.grown().num_test} test rows; the {dataset.num_test} test rows "
            "of this arrival are neither learned nor asked"
        )
    if not dataset.num_test and is_renewal_asked(store, lineage, known):
        yield f"new test rows of {dataset.task} were asked for, but this arrival has none; the next one may bring them"
    if dataset.new_labels:
        yield (
            f"{dataset.task} gains the labels {listed(dataset.new_labels)}: its frozen test rows have none of them, "
            "so no figure shows how well they are learned"
        )


def _widened(test_set: TestSet, dataset: DatasetRef, slices: Mapping[str, str]) -> TestSet:
    """The test set with the labels that its task gains with the arrival."""
    schema = test_set.schema
    is_slice = slices.get(schema.name) == dataset.task
    return replace(test_set, schema=schema.with_labels(dataset.new_labels) if is_slice else dataset.widen(schema))


@dataclass(frozen=True, kw_only=True)
class _Scores:
    """What the base model, the parent and the new version scored."""

    on_base: Scored
    on_parent: Scored
    """On the new rows; empty without a parent."""
    now: Scored
    now_answers: Answers
    """The new version's answers, to the rows that are added too."""
    answered: Answers
    """The parent's answers to all of the old rows."""
    added: AddedRows | None
    """On the rows that are added."""
    facts: AdapterFacts


def _score(scorer: Scorer, asked: _Asked, adaptation: AdaptationRun, trained: TrainedAdapter) -> _Scores:
    from deal_core.adapter.state import adapter_norm
    from tasks.scorer import Scored

    answered, before = asked.answered, adaptation.parent_folder
    new = asked.new if before else []
    to_added = [asked.added] if asked.added else []  # asked of the base model, the parent and the new version
    scorer.expect(asked.new, new, asked.unanswered, asked.all, to_added, to_added, to_added)
    added, answers_to_added = None, Answers()
    if asked.added is not None:  # first, as the numbers of rows are those of the last rows that were asked
        name = asked.added.schema.name
        base, parent, own = (scorer.score(folder, to_added) for folder in (None, before, trained.folder))
        answers_to_added = own.answers
        added = AddedRows(
            num_rows=len(asked.added.rows),
            accuracy=own.accuracies[name],
            parent_accuracy=parent.accuracies[name],
            base_accuracy=base.accuracies[name],
        )
    on_base = scorer.score(None, asked.new, general=True)
    of_parent = [*new, *asked.unanswered]
    given = scorer.score(before, of_parent) if of_parent else Scored({}, {}, None)
    for name in (test_set.schema.name for test_set in asked.unanswered):
        answered = {**answered, name: answered.get(name, {}) | given.answers[name]}
    now = scorer.score(trained.folder, asked.all, general=True, explain=True)
    facts = AdapterFacts(
        norm=adapter_norm(trained.folder),
        parent_norm=adapter_norm(before) if before else None,
        is_changed=adaptation.parent is None or adaptation.parent.adapter_sha256 != trained.sha256,
    )
    return _Scores(
        on_base=on_base,
        on_parent=given.only(new),
        now=now,
        now_answers=now.answers | {name: now.answers[name] | more for name, more in answers_to_added.items()},
        answered=answered,
        added=added,
        facts=facts,
    )


def _length_notes(scorer: Scorer, own: TestSet, dataset: DatasetRef) -> Iterator[str]:
    """Notes about right answers of the arrival's task that are longer than the answers may be."""
    if num_too_long := scorer.count_too_long(own, right_answers(own.rows)):
        effect = "so no answer can match them" if own.schema.metric == "exact" else "so answers to them are cut"
        yield (
            f"{num_too_long} of {len(own.rows)} test answers of {dataset.task} are longer than "
            f"train.max_answer_tokens allows, {effect}"
        )
    if scorer.count_too_long(own, dataset.new_labels):
        yield (
            f"new labels of {dataset.task} are longer than the train.max_answer_tokens of its first arrival allows, so "
            "no version can answer with them"
        )


def _report(
    store: ObjectStore,
    adaptation: AdaptationRun,
    asked: _Asked,
    scores: _Scores,
    num_rows: dict[str, int],
    notes: tuple[str, ...],
    answerer: str,
) -> EvaluationReport:
    learned, record, renewal = adaptation.dataset.task, adaptation.record, adaptation.renewal
    now, on_parent = scores.now, scores.on_parent
    # The parent on the rows that the new version was asked: computed from its answers, since it may have been judged by
    # more of them. Tasks that nobody could ask keep the figure of its record.
    earlier: dict[str, Scores] = {}
    for test_set in asked.old:
        name = test_set.schema.name
        earlier[name] = _scores_of(test_set, test_set.rows, scores.answered[name])
    parent_accuracies = (record.accuracies() if record else {}) | {
        name: sum(outcomes) / len(outcomes) for name, outcomes in earlier.items()
    }
    for name in asked.slices.keys() - now.accuracies.keys():  # its rows were forgotten
        parent_accuracies.pop(name, None)
    carried = {name: parent_accuracies.pop(name) for name in asked.unjudged}

    (known,) = (task for task in adaptation.tasks if task.schema.name == learned)
    base_accuracy = scores.on_base.accuracies.get(learned, known.base_accuracy)
    if base_accuracy is None:
        assert record is not None, "a new task was asked of the base model"
        base_accuracy = record.base_accuracies()[learned]
    parent_accuracy = (parent_accuracies | on_parent.accuracies).get(learned)
    matrix = record.matrix if record else AccuracyMatrix()
    if renewal.known is not None:
        parent_accuracies |= on_parent.accuracies
        notes = (*notes, renewal.note(adaptation.dataset))
        if renewal.new_slice is not None:
            matrix = matrix.with_slice(learned, renewal.new_slice)
        matrix = matrix.remeasured(
            learned,
            base_accuracy=base_accuracy,
            last_accuracy=on_parent.accuracies[learned],
            num_rows=num_rows[learned],
        )
    now_known = {**carried, **now.accuracies}
    on_fewer = {
        task.schema.name: cells
        for task in adaptation.tasks
        if (cells := _on_fewer(task, now.outcomes.get(task.schema.name, ())))
    }
    if adaptation.consolidation is not None:
        matrix = matrix.with_consolidation(now_known, num_rows, on_fewer)
    else:
        matrix = matrix.with_row(
            learned,
            now_known,
            base_accuracy=base_accuracy,
            parent_accuracy=parent_accuracy,
            num_rows=num_rows,
            on_fewer=on_fewer,
        )
    if (added := scores.added) is not None:
        figures = (added.accuracy, added.parent_accuracy, added.base_accuracy)
        own, parent, base = (score_text(share, added.num_rows) for share in figures)
        notes = (
            *notes,
            f"{learned} gains {added.num_rows} test rows, which judge from the next version on: this version {own}; "
            f"the version before {parent}; the base model {base}",
        )
    return EvaluationReport(
        task=learned,
        num_rows=num_rows,
        notes=notes,
        accuracies=now.accuracies,
        outcomes=now.outcomes,
        perplexity=now.perplexity,
        parent_accuracies=parent_accuracies,
        parent_outcomes={**earlier, **on_parent.outcomes},
        base_accuracy=base_accuracy,
        base_perplexity=scores.on_base.perplexity,
        parent_accuracy_new_task=parent_accuracy,
        matrix=matrix,
        debts=_debts(store, adaptation, asked, now.answers, matrix, answerer),
        added=added,
        is_consolidation=adaptation.consolidation is not None,
        adapter=scores.facts,
        majority_rate=now.evaluations[learned].majority_rate,
        metrics={test_set.schema.name: test_set.schema.metric for test_set in asked.all},
        slices=asked.slices,
        labels={name: evaluation.labels for name, evaluation in now.evaluations.items() if evaluation.labels},
    )


def _on_fewer(task: KnownTask, outcomes: Scores) -> tuple[CellScore, ...]:
    """The version's scores on the test rows that the task had before each growth; none if not all rows were asked."""
    if len(outcomes) != task.num_test:
        return ()
    sizes = list(accumulate(part.num_rows for part in task.tests[:-1]))
    return tuple(CellScore(mean_score(outcomes[:size]), size) for size in sizes if size)


def _debts(
    store: ObjectStore, adaptation: AdaptationRun, asked: _Asked, now: Answers, matrix: AccuracyMatrix, answerer: str
) -> dict[str, Debt]:
    """What each task has lost since it was learned, by the answers to the rows that both versions were asked."""
    debts = {}
    newest_first = descent(Versions(store).all(adaptation.lineage), adaptation.parent)
    before_last = len(matrix.rows) - 2  # the parent's row
    rows_of = {test_set.schema.name: test_set for test_set in asked.all}
    kept_of = {adaptation.parent.version: asked.kept} if adaptation.parent else {}
    for name, row in matrix.learned_best().items():
        if name not in now:
            continue  # nobody could ask it
        since, test_set, paired = newest_first[before_last - row], rows_of[name], None
        if since.version not in kept_of:
            kept_of[since.version] = read_answers(store, since.adapter_uri)
        kept = kept_of[since.version]
        then = kept.now.get(name, {}) if kept.answerer == answerer else {}
        places = [place for place, digest in enumerate(test_set.rows["sha256"]) if digest in then]
        if places:
            rows = test_set.rows.select(places)
            paired = PairedDrop.of(*(_scores_of(test_set, rows, answers) for answers in (then, now[name])))
        column = matrix.tasks.index(name)
        points = 100 * ((matrix.rows[row][column] or 0.0) - (matrix.rows[-1][column] or 0.0))
        debts[name] = Debt(since=since.version, points=paired.points if paired else points, paired=paired)
    return debts


def _scores_of(test_set: TestSet, rows: Dataset, answers: Mapping[str, str]) -> Scores:
    """The score of each of a task's rows, by the answers to them."""
    in_order = [answers[digest] for digest in rows["sha256"]]
    return score_answers(test_set.schema.metric, in_order, right_answers(rows))


def answer_again(store: ObjectStore, version: Version, wanted: Answers) -> KeptAnswers:
    """Let a registered version answer those of its own test rows that another version has answered (`wanted`)."""
    from tasks.scorer import Scorer

    record = read_record(store, version)
    sets = []
    for known in record.tasks:
        answered = wanted.get(known.schema.name, {})
        if answered and forgotten_tests(store, known.schema.name, known.test_uris) is None:
            test_set = load_test_set(store, known)
            places = [place for place, digest in enumerate(test_set.rows["sha256"]) if digest in answered]
            if places:
                sets.append(replace(test_set, rows=test_set.rows.select(places)))
    if not sets:
        return KeptAnswers({}, {})
    scorer = Scorer(store, record.base)
    scorer.expect(sets)
    with borrowed_adapter(store, version) as folder:
        return KeptAnswers(scorer.score(folder, sets).answers, {}, answerer=scorer.answerer)


def score_version(store: ObjectStore, version: Version) -> VersionScores:
    """Score a registered version again on the frozen test rows of its own evaluation.

    A version without a reference for its live traffic gets one.
    """
    from tasks.scorer import Scorer

    record, answered = read_record(store, version), read_answers(store, version.adapter_uri).now
    sets, unjudged = [], {}
    for known in record.tasks:
        try:
            sets.append(answered_rows(load_test_set(store, known), answered.get(known.schema.name, {})))
        except TestRowsForgottenError as error:
            unjudged[known.schema.name] = str(error)
    scorer = Scorer(store, record.base)
    scorer.expect(sets)
    with borrowed_adapter(store, version) as folder:
        scored = scorer.score(folder, sets)
    if not has_reference(store, version.adapter_uri):
        write_reference(store, version.adapter_uri, version.lineage, sets, scored.evaluations)
    return VersionScores(
        accuracies=scored.accuracies, recorded=record.accuracies(), num_rows=scorer.num_rows, unjudged=unjudged
    )
