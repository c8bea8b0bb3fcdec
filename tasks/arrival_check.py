"""The champion answers an arrival of a task that it knows, before anything is trained on it.

`deal_core.evaluation.arrival_check` judges the answers. This module finds the rows: those of the arrival that the line
has not learned, and those of the reference. torch is imported when there is a row to ask.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import pyarrow as pa

from deal_core.data.reading.readers import read_batches
from deal_core.data.row_checks import RowChecker
from deal_core.data.rows import stored_input_digest
from deal_core.data.schema import REFERENCES, REJECTED, ROW_SCHEMA, TaskSchema, label_key
from deal_core.data.shapes import recognise
from deal_core.errors import DataValidationError, StoreError
from deal_core.evaluation.arrival_check import (
    MAX_REFERENCE,
    AnsweredRows,
    judge_arrival,
    surest_contradictions,
)
from deal_core.evaluation.metrics import right_answers, score_answers
from deal_core.safe_text import shorten
from infra.settings import HomeSettings
from infra.store.base import ObjectNotFoundError, ObjectStore, temporary_folder
from infra.store.keys import TEST_FILE, TRAIN_FILE
from infra.versions import Version, Versions, descent
from tasks.data_files import local_files
from tasks.lineage.datasets import learned_inputs, read_manifest
from tasks.lineage.frozen_rows import TestSet, first_rows, load_test_set, read_answers, read_test_rows
from tasks.lineage.record import KnownTask, LineageRecord, read_record
from tasks.lineage.tombstones import find_tombstone, forgotten_tests
from tasks.lineage.version_files import borrowed_adapter, reading_beside
from tasks.monitoring.rows import read_reference
from tasks.references import Contradiction, DatasetRef, ScoredArrival
from tasks.spec import AdaptSpec, TaskSpec
from tasks.task_schema import choose_schema, frozen_tests

if TYPE_CHECKING:
    from tasks.scorer import Processes

MAX_ASKED_ROWS = 1000
"""Rows of an arrival that the champion answers, at most: the score is then within 3 points of that of all rows, with
95 % confidence."""
NUM_CONTRADICTIONS = 3
SCORES_FILE = "arrival.json"
"""A file next to the adapter: what the champion before it scored on each row of its arrival. It names no row."""


@dataclass(frozen=True, kw_only=True)
class AskedArrival:
    """An arrival of a task that the champion knows, with rows to ask."""

    spec: AdaptSpec
    champion: Version
    record: LineageRecord
    """The champion's."""
    known: KnownTask
    """The task as the champion has learned it."""
    line: Sequence[Version]
    """The champion and the versions that it descends from, the newest first."""
    schema: TaskSchema
    """The task's, with the names of the file's columns."""
    rows: pa.Table
    """The rows that can be asked."""
    num_rows: int
    """All rows of the arrival."""
    num_learned: int
    """Those that the line has learned."""


def score_arrival(
    store: ObjectStore,
    spec: AdaptSpec,
    dataset: DatasetRef,
    champion: Version,
    record: LineageRecord,
    jobs_folder: str,
) -> ScoredArrival | None:
    """Score the version that a run continues, which has the record, on the rows of the run's arrival.

    None: the task is new, its test rows were forgotten and the arrival brings others, or no row can be asked.
    `jobs_folder` is the folder in the store for the jobs of several processes.
    """
    files = [TRAIN_FILE, *([TEST_FILE] if dataset.num_test else [])]
    columns = (*ROW_SCHEMA.names, REFERENCES.name, REJECTED.name)
    tables = [read_test_rows(store, dataset.uri, columns, file=file) for file in files]
    rows = pa.concat_tables(tables, promote_options="default")
    arrival = _ask(store, spec, champion, record, read_manifest(store, dataset.uri).task, rows)
    if arrival is None:
        return None
    from tasks.scorer import Processes

    with temporary_folder() as folder:
        return score_rows(store, arrival, Processes(spec.train.num_processes, jobs_folder, folder))


def find_landed(store: ObjectStore, spec: AdaptSpec, rows: Sequence[pa.RecordBatch]) -> AskedArrival | None:
    """Find what the lineage's champion would be asked of good rows (GOOD_ROWS) that are not stored.

    None: it does not know the task, no row can be asked, or its base model is not on this machine.
    """
    champion = Versions(store).champion(spec.lineage)
    if champion is None or not rows:
        return None
    record, table = read_record(store, champion), pa.Table.from_batches(rows)
    digests = pa.array([digest.hex() for digest in table["digest"].to_pylist()])
    table = table.append_column("sha256", digests).select([*ROW_SCHEMA.names, REFERENCES.name, REJECTED.name])
    arrival = _ask(store, spec, champion, record, choose_schema(store, spec.task, record), table)
    if arrival is None:
        return None
    from deal_core.base_model.load import find_config

    is_here = find_config(record.base.source, HomeSettings().cache_dir).folder is not None
    return arrival if is_here else None


def _ask(
    store: ObjectStore,
    spec: AdaptSpec,
    champion: Version,
    record: LineageRecord,
    schema: TaskSchema,
    table: pa.Table,
) -> AskedArrival | None:
    name = spec.task.name
    known, line = record.task(name), descent(Versions(store).all(record.lineage), champion)
    if known is None or forgotten_tests(store, name, known.test_uris) is not None:
        return None
    kind, labels = known.schema.format, {label_key(label) for label in known.schema.labels}
    assert kind != "auto", "a task that was learned has a format"
    learned, tests = learned_inputs(store, line, name), frozen_tests(store, record, known).inputs
    digests = [stored_input_digest(kind, text) for text in table["input"].to_pylist()]
    is_asked = [
        digest not in learned and digest not in tests and (not labels or label_key(output) in labels)
        for digest, output in zip(digests, table["output"].to_pylist(), strict=True)
    ]
    if not any(is_asked):
        return None
    return AskedArrival(
        spec=spec,
        champion=champion,
        record=record,
        known=known,
        line=line,
        schema=schema,
        rows=table.filter(pa.array(is_asked)),
        num_rows=len(table),
        num_learned=sum(digest in learned for digest in digests),
    )


def score_rows(store: ObjectStore, arrival: AskedArrival, processes: Processes | None = None) -> ScoredArrival:
    """Let the champion answer the rows that are asked, and judge its answers."""
    from datasets import Dataset

    from tasks.scorer import Scorer

    known, gate = arrival.known, arrival.spec.gate
    rows = first_rows(Dataset(arrival.rows), MAX_ASKED_ROWS)
    # It is asked as it serves: with the labels that it knows.
    asked = TestSet(
        schema=known.schema,
        rows=rows,
        max_prompt_tokens=known.max_prompt_tokens,
        max_new_tokens=known.max_new_tokens,
    )
    with borrowed_adapter(store, arrival.champion) as folder:
        scorer = Scorer(store, arrival.record.base, stage="test", processes=processes)
        scorer.expect([asked])
        evaluation = scorer.score(folder, [asked]).evaluations[known.schema.name]
    answered = AnsweredRows(
        scores=evaluation.outcomes, confidences=tuple(each.confidence for each in evaluation.confidences)
    )
    calibration = _test_rows(store, arrival.champion, known)
    reference = [*calibration.scores]
    reference += _newest_arrivals(store, arrival.line, known.schema.name, MAX_REFERENCE - len(reference))
    score = judge_arrival(answered, reference=reference, calibration=calibration, drop_points=gate.arrival_drop_points)
    if gate.arrival == "off":
        score = replace(score, verdict="as expected")
    score = replace(score, of_rows=arrival.num_rows, num_learned=arrival.num_learned)
    contradictions: tuple[Contradiction, ...] = ()
    if score.verdict == "labels disagree":
        places = surest_contradictions(answered, NUM_CONTRADICTIONS)
        shown = [
            Contradiction(
                sha256=rows[place]["sha256"],
                text=shorten(rows[place]["input"]),
                label=shorten(rows[place]["output"]),
                answer=shorten(evaluation.answers[place]),
            )
            for place in places
        ]
        contradictions = _with_places(store, arrival.spec.task, arrival.schema, shown)
    return ScoredArrival(
        version=arrival.champion.version,
        score=score,
        scores=tuple(answered.scores),
        has_labels=bool(known.schema.labels),
        contradictions=contradictions,
    )


def _test_rows(store: ObjectStore, champion: Version, known: KnownTask) -> AnsweredRows:
    """The champion's scores on the task's test rows that it has answered, and its confidences where all are known."""
    name, rows = known.schema.name, load_test_set(store, known).rows
    answers = read_answers(store, champion.adapter_uri).now.get(name, {})
    rows = rows.select([place for place, digest in enumerate(rows["sha256"]) if digest in answers])
    digests: list[str] = list(rows["sha256"])
    scores = score_answers(known.schema.metric, [answers[digest] for digest in digests], right_answers(rows))
    confidences: dict[str, float] = {}
    with suppress(StoreError):  # without it nothing is estimated, which is no reason to stop the lineage
        frame = read_reference(store, champion.adapter_uri)
        if frame is not None:
            own = frame[frame["task"] == name].dropna(subset=["confidence"])
            confidences = dict(zip(own["id"], own["confidence"].astype(float), strict=True))
    if not confidences.keys() >= {*digests}:
        return AnsweredRows(scores=scores)
    return AnsweredRows(scores=scores, confidences=[confidences[digest] for digest in digests])


def _newest_arrivals(store: ObjectStore, newest_first: Sequence[Version], task: str, num_rows: int) -> list[float]:
    """The scores on the newest arrivals of a task that a line has learned, each before it was learned.

    Arrivals that were deleted are left out, and so are those whose labels disagreed, whoever let them go on.
    """
    scores: list[float] = []
    for version in newest_first:
        if len(scores) >= num_rows:
            break
        arrival = version.arrival
        if version.task != task or arrival is None or arrival.is_released or arrival.verdict == "labels disagree":
            continue
        if find_tombstone(store, task, [version.dataset_sha256]) is None:
            scores += read_scores(store, version.adapter_uri)[: num_rows - len(scores)]
    return scores


def keep_scores(store: ObjectStore, adapter_uri: str, scores: Sequence[float]) -> None:
    """Store the scores of an arrival's rows next to the adapter that learns it."""
    values = {"schema_version": 1, "scores": [*scores]}
    store.put_bytes(f"{adapter_uri}/{SCORES_FILE}", json.dumps(values).encode())


def read_scores(store: ObjectStore, adapter_uri: str) -> list[float]:
    """Read the scores of the arrival that a version has learned; there may be none."""
    try:
        with reading_beside(store, adapter_uri, SCORES_FILE):
            return [float(score) for score in json.loads(store.get_bytes(f"{adapter_uri}/{SCORES_FILE}"))["scores"]]
    except ObjectNotFoundError:
        return []


def _with_places(
    store: ObjectStore, arrival: TaskSpec, schema: TaskSchema, shown: Sequence[Contradiction]
) -> tuple[Contradiction, ...]:
    """Say in which row of which file each row stands. The files are read once more, as datasets keep no numbers."""
    wanted, places = {each.sha256 for each in shown}, dict[str, tuple[str, int]]()
    with (
        suppress(DataValidationError, StoreError),  # a file that is gone meanwhile has no rows to look at
        local_files(store, arrival.data) as sources,
        local_files(store, arrival.test_data or ()) as tests,
    ):
        for file in (*sources, *tests):
            checker = RowChecker(schema, recognise(file.path, schema), sys.maxsize)
            for batch in read_batches(file.path):
                good = checker.check(batch).good
                numbers = batch.numbers(good.column("place").to_pylist())
                for digest, number in zip(good.column("digest").to_pylist(), numbers, strict=True):
                    if digest.hex() in wanted:
                        places.setdefault(digest.hex(), (file.name, number))
    return tuple(
        each.model_copy(update=dict(zip(("file", "row"), places.get(each.sha256, (None, None)), strict=True)))
        for each in shown
    )


def remark_on(tested: ScoredArrival) -> str:
    """Say what was found, and which rows contradict the champion, without a text of a row."""
    rows: dict[str | None, list[str]] = {}
    for row in tested.contradictions:
        if row.row is not None:
            rows.setdefault(row.file, []).append(str(row.row))
    places = [f"{'rows' if numbers[1:] else 'row'} {', '.join(numbers)} of {file}" for file, numbers in rows.items()]
    look = f" Look at {' and '.join(places)}." if places else ""
    return f"{tested.sentence}{look}"
