"""Let a judge compare a version's free answers with the champion's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

from deal_core.config import MEASURED
from deal_core.evaluation.answer_scores import all_of, right_answers
from deal_core.evaluation.report import EvaluationReport, Judged
from deal_core.judging_config import GateConfig
from infra.judge import Judge, JudgeError, open_judge
from infra.store.base import ObjectStore
from tasks.adaptation.frozen_rows import first_rows, load_test_set, read_answers
from tasks.adaptation.ingest import new_task
from tasks.context import current_store
from tasks.lineage.record import KnownTask, read_record
from tasks.lineage.requests import find_renewal
from tasks.lineage.tombstones import forgotten_tests
from tasks.progress import advance
from tasks.references import AdapterRef, DatasetRef, VersionRef

NUM_AT_ONCE = 4
"""Rows that the judge is asked about at the same time."""
_PREFERS = {("A", "B"): 1.0, ("B", "A"): 0.0}
"""The two verdicts, with the version's answer first and with the champion's first → the version's score."""


def require_judge(config: GateConfig) -> None:
    """Raise ConfigError if the gate asks for a judge whose address or model is not set on this machine."""
    if config.judge != "none":
        open_judge()


@dataclass(frozen=True)
class _Pair:
    """One test row with both answers."""

    request: str
    references: Sequence[str]
    now: str
    before: str


def judge_version(
    report: EvaluationReport, parent: VersionRef, adapter: AdapterRef, dataset: DatasetRef, config: GateConfig
) -> EvaluationReport:
    """Return the report with the judge's figures for every task of free answers, and a note about each.

    The judge compares the answers that both versions gave to the same test rows, in both orders. A row whose question
    fails has no verdict; the note counts such rows and says why.
    """
    store, judge = current_store(), open_judge()
    pairs = dict(_pairs_of_tasks(store, parent, adapter, dataset, config.max_judged_rows))
    on_progress, total, done = advance("judge"), sum(map(len, pairs.values())), 0
    judged, notes = dict(report.judged), list(report.notes)
    for name, of_task in pairs.items():
        on_progress(done, total, name)
        judged[name], failures = _judge_task(judge, of_task)
        notes.append(_note(name, judged[name], failures))
        done += len(of_task)
    return replace(report, judged=judged, notes=tuple(notes))


def _pairs_of_tasks(
    store: ObjectStore, parent: VersionRef, adapter: AdapterRef, dataset: DatasetRef, max_rows: int
) -> Iterator[tuple[str, list[_Pair]]]:
    """The rows of each task of free answers that both versions answered, at most `max_rows` of a task."""
    from deal_core.data.prompts import readable_prompt

    kept, of_parent = read_answers(store, adapter.uri), read_answers(store, parent.adapter_uri).now
    for known in _tasks(store, parent, dataset):
        name = known.schema.name
        before = kept.before.get(name) or of_parent.get(name, {})
        is_written = not known.schema.labels and known.schema.metric not in MEASURED
        if not is_written or forgotten_tests(store, name, known.dataset_uri) is not None:
            continue
        test_set = load_test_set(store, known)
        now = kept.now.get(name, {})
        common = [place for place, digest in enumerate(test_set.rows["sha256"]) if digest in now and digest in before]
        rows = first_rows(test_set.rows.select(common), max_rows)
        yield (
            name,
            [
                _Pair(readable_prompt(known.schema, text), all_of(answers), now[key], before[key])
                for text, answers, key in zip(rows["input"], right_answers(rows), rows["sha256"], strict=True)
            ],
        )


def _tasks(store: ObjectStore, parent: VersionRef, dataset: DatasetRef) -> list[KnownTask]:
    """The tasks of the new version, with the test rows that judge them."""
    record = read_record(store, parent.adapter_uri)
    renewed = find_renewal(store, record, dataset).known
    tasks = [known.judged_by(dataset) if known == renewed else known for known in record.tasks]
    if record.task(dataset.task) is None:
        tasks.append(new_task(store, dataset, 1, 1))  # nothing is asked here, so the limits do not count
    return tasks


def _judge_task(judge: Judge, pairs: Sequence[_Pair]) -> tuple[Judged, Mapping[str, int]]:
    """The figures of one task, and the reasons of rows without a verdict."""
    with ThreadPoolExecutor(NUM_AT_ONCE) as pool:
        found = list(pool.map(partial(_score, judge), pairs))
    scores = tuple(each for each in found if not isinstance(each, JudgeError))
    failures = Counter(str(each) for each in found if isinstance(each, JudgeError))
    return Judged(model=judge.model, scores=scores, num_missing=failures.total()), failures


def _score(judge: Judge, pair: _Pair) -> float | JudgeError:
    """1 if the version's answer is better in both orders, 0 if the champion's is, else 0.5."""
    if pair.now.strip() == pair.before.strip():
        return 0.5
    try:
        verdicts = (
            judge.better(pair.request, pair.references, pair.now, pair.before),
            judge.better(pair.request, pair.references, pair.before, pair.now),
        )
    except JudgeError as error:
        return error
    return _PREFERS.get(verdicts, 0.5)


def _note(name: str, judged: Judged, failures: Mapping[str, int]) -> str:
    said = f"{name}: the judge {judged.model} gave no verdict"
    if judged.scores:
        said = (
            f"{name}: the judge {judged.model} prefers this version in {judged.num_won} of {len(judged.scores)} test "
            f"rows, the champion in {judged.num_lost}, and neither in {judged.num_even}"
        )
    if judged.num_missing:
        why = "; ".join(f"{number} because {reason}" for reason, number in failures.items())
        said += f". {judged.num_missing} rows have no verdict: {why}"
    return said
