"""What tests of the adapt flow share: two of the examples' domains as tasks, and one way to run the flow."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from benchmarks.tiny_base import EXAMPLES, NO_LIMITS
from flows.adapt import adapt
from flows.adapt_result import AdaptResult
from infra.branches import Head
from infra.report.run_report import EVALUATION_FILE, RunReport
from infra.store.opening import open_store
from infra.versions import Version, Versions
from tasks.adaptation.resume import find_parent
from tasks.lineage.history import find_version
from tasks.lineage.record import LineageRecord, read_record
from tasks.lineage.reports import read_page, read_report
from tasks.spec import AdaptSpec, parse

BANK = {
    "name": "bank",
    "data": str(EXAMPLES / "bank" / "train.jsonl"),
    "test_data": str(EXAMPLES / "bank" / "test.jsonl"),
    "instruction": "What is it about?",
}
CLINIC = {
    "name": "clinic",
    "data": str(EXAMPLES / "clinic" / "train.csv"),
    "test_data": str(EXAMPLES / "clinic" / "test.csv"),
    "columns": {"text": "note", "label": "finding"},
}
PASS: dict[str, Any] = dict(NO_LIMITS)
FAIL = {**PASS, "min_accuracy": 1.0}


def run(base: Path, task: dict[str, Any], *, again: bool = False, **settings: Any) -> AdaptResult:
    """Adapt lineage `l` to a task in three steps, behind a gate that passes everything; settings replace these."""
    values = {
        "lineage": "l",
        "base_model": str(base),
        "task": task,
        "gate": PASS,
        "train": {"max_steps": 3, "max_prompt_tokens": 192, "max_answer_tokens": 12, "checkpoint_steps": 0},
        **settings,
    }
    return asyncio.run(adapt(parse(AdaptSpec, values, "test"), again=again))


def next_parent() -> Version | None:
    """The version that lineage `l` continues next, after what a crash has interrupted is completed."""
    return asyncio.run(find_parent.fn(Head(lineage="l")))


def version_of(result: AdaptResult) -> Version:
    """The version that a run made or repeated."""
    return find_version(open_store(), result.lineage, result.version)


def record_of(result: AdaptResult) -> LineageRecord:
    """The record of a run's version."""
    return read_record(open_store(), version_of(result))


def page_of(result: AdaptResult) -> tuple[RunReport, str]:
    """The report of a run's version, and its page."""
    store = open_store()
    return read_page(store, Versions(store).all(result.lineage), result.version)


def evaluation_of(result: AdaptResult) -> Any:
    """The evaluation of a run's version, as its report has it."""
    return read_report(open_store(), version_of(result), EVALUATION_FILE)
