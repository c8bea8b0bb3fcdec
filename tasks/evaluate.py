"""Evaluate: a version's answers on the frozen test rows of every task its lineage knows."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow.parquet as pq
from prefect import task
from prefect.cache_policies import NO_CACHE

from deal_core.config import EvaluateConfig
from deal_core.data.schema import TaskSchema
from deal_core.gate import EvaluationReport
from deal_core.metrics import AccuracyMatrix
from infra.object_store import ObjectStore
from tasks.answers import Answers, KeptAnswers, keep_answers
from tasks.base import lend_base
from tasks.ingest import read_manifest
from tasks.progress import advance
from tasks.record import LineageRecord, read_record
from tasks.references import AdapterRef, BaseRef, DatasetRef, VersionRef, VersionScores
from tasks.services import borrowed_folder, borrowed_parent, current_store

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True, kw_only=True)
class TestSet:
    """The frozen test rows of one task."""

    schema: TaskSchema
    rows: Dataset
    max_prompt_tokens: int
    max_new_tokens: int


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
    """Score the new adapter on every task, and the base model and the parent on a task that is new.

    A task that the lineage knows is asked as when it was new, whatever `config` says of the length of answers.

    On tasks that the lineage knows, the base's and the parent's accuracies stand in the record: the rows are frozen.
    """
    store = current_store()
    record = read_record(store, parent.adapter_uri) if parent else None
    sets = load_test_sets(store, record)
    new = []
    if record is None or record.task(dataset.task) is None:
        schema = read_manifest(store, dataset.uri).task
        new = [load_test_set(store, schema, dataset.uri, max_prompt_tokens, config.max_new_tokens)]
    scorer = Scorer(base, config)
    scorer.expect(new, new if parent else [], [*sets, *new])
    with borrowed_parent(store, parent) as parent_folder, borrowed_folder(store, adapter.uri) as folder:
        on_base = scorer.accuracies(None, new)
        on_parent = scorer.accuracies(parent_folder, new) if parent else {}
        before = scorer.answers
        accuracies = scorer.accuracies(folder, [*sets, *new])
    keep_answers(store, adapter.uri, KeptAnswers(now=scorer.answers, before=before))
    parent_accuracies = record.accuracies() if record else {}
    base_accuracy = (_base_accuracies(record) | on_base)[dataset.task]
    parent_accuracy = (parent_accuracies | on_parent).get(dataset.task)
    matrix = record.matrix if record else AccuracyMatrix()
    return EvaluationReport(
        task=dataset.task,
        accuracies=accuracies,
        parent_accuracies=parent_accuracies,
        base_accuracy=base_accuracy,
        parent_accuracy_new_task=parent_accuracy,
        num_rows=scorer.num_rows,
        matrix=matrix.with_row(
            dataset.task, accuracies, base_accuracy=base_accuracy, parent_accuracy=parent_accuracy
        ),
        notes=notes,
    )


class Scorer:
    """Scores adapters on test sets, and reports how far it is."""

    def __init__(self, base: BaseRef, config: EvaluateConfig) -> None:
        self._base = lend_base(base)
        self._config = config
        self._report = advance("evaluate")
        self._total = 0
        self._done = 0
        self.num_rows: dict[str, int] = {}
        self.answers: Answers = {}
        """Of the adapter that was scored last."""

    def expect(self, *passes: Sequence[TestSet]) -> None:
        """Announce the test sets that will be scored, so that progress has a total."""
        self._total = sum(len(test_set.rows) for sets in passes for test_set in sets)

    def accuracies(self, adapter_folder: Path | None, sets: Sequence[TestSet]) -> dict[str, float]:
        """Accuracy of one adapter (None: the untouched base model) on each test set, by task name."""
        from deal_core.adapter.state import adapter_on
        from deal_core.evaluate import evaluate_task

        result = {}
        self.answers = {}
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
                result[evaluation.task] = evaluation.accuracy
                self.num_rows[evaluation.task] = evaluation.num_rows
                self.answers[evaluation.task] = dict(zip(test_set.rows["sha256"], evaluation.answers, strict=True))
        return result

    def _advance(self, name: str, num_rows: int) -> None:
        self._done += num_rows
        self._report(self._done, self._total, name)


def load_test_sets(store: ObjectStore, record: LineageRecord | None) -> list[TestSet]:
    """The test sets of every task a lineage knows, in order of first arrival."""
    return [
        load_test_set(store, known.schema, known.dataset_uri, known.max_prompt_tokens, known.max_new_tokens)
        for known in (record.tasks if record else ())
    ]


def load_test_set(
    store: ObjectStore, schema: TaskSchema, dataset_uri: str, max_prompt_tokens: int, max_new_tokens: int
) -> TestSet:
    """The test rows of one dataset."""
    from datasets import Dataset

    with tempfile.TemporaryDirectory(prefix="deal-") as temporary:
        path = Path(temporary) / "test.parquet"
        store.download_file(f"{dataset_uri}/test.parquet", path)
        rows = Dataset(pq.read_table(path, memory_map=False))
    return TestSet(schema=schema, rows=rows, max_prompt_tokens=max_prompt_tokens, max_new_tokens=max_new_tokens)


def _base_accuracies(record: LineageRecord | None) -> dict[str, float]:
    if record is None:
        return {}
    pairs = zip(record.matrix.tasks, record.matrix.base, strict=True)
    return {name: value for name, value in pairs if value is not None}


@task(name="score", cache_policy=NO_CACHE)
def score_version(version: VersionRef, config: EvaluateConfig) -> VersionScores:
    """Score a registered version afresh on the frozen test rows of every task it knows."""
    store = current_store()
    record = read_record(store, version.adapter_uri)
    sets = load_test_sets(store, record)
    scorer = Scorer(record.base, config)
    scorer.expect(sets)
    with borrowed_folder(store, version.adapter_uri) as folder:
        accuracies = scorer.accuracies(folder, sets)
    return VersionScores(accuracies=accuracies, recorded=record.accuracies(), num_rows=scorer.num_rows)
