"""MLflow as a mirror of the store: runs, logged models, registered versions and aliases, written best effort.

The store is the truth. What MLflow lacks is written by the lineage's next run, or by `deal server sync`. Every write
can be repeated, so MLflow may be away, or its database lost, at any time.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from pydantic import BaseModel

from deal_core.errors import DealError, IntegrityError, RegistryError, StoreError, in_one_line
from deal_core.evaluation.report import EvaluationReport
from deal_core.monitoring.report import LiveLook
from infra.mirror_note import is_over, read_note, waiting, write_note
from infra.promotions import Change, Move, PromotionLog
from infra.report.run_report import EVALUATION_FILE, LIVE_FILE, PAGE_FILE, REPORT_FILE
from infra.run_journal import Run, RunJournal
from infra.settings import TrackingSettings
from infra.store import keys
from infra.store.base import ObjectNotFoundError, ObjectStore, temporary_folder
from infra.versions import SCORES, Alias, Version, Versions
from tasks.lineage.decisions import promoted_by_hand
from tasks.lineage.record import read_record
from tasks.lineage.reports import read_page, read_report, write_report
from tasks.lineage.version_files import borrowed_adapter
from tasks.notices import Notice, announce

if TYPE_CHECKING:
    from infra.tracking.models import RegisteredLineage
    from infra.tracking.tracker import TrackedRun, Tracker

logger = logging.getLogger(__name__)

WITH_ROWS = (REPORT_FILE, PAGE_FILE)
"""Artifacts of a run that contain rows: gained and lost examples, and rows in quarantine. Code that logs rows under
another name adds the name here."""
ALIASES: tuple[Alias, ...] = get_args(Alias)
MIRRORING, MIRRORED = "deal.mirroring", "deal.mirrored"
"""Tags of the registered model: the number of the move whose aliases are being set, and of the one whose aliases were
set. If they differ, a write was interrupted, and no alias says what a person wants."""
BY_HAND = "MLflow"
"""The name in the promotion log for a person who moved the alias in MLflow."""


class Synced(BaseModel, frozen=True):
    """What a synchronisation wrote into MLflow."""

    lineage: str
    written: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    """What MLflow still lacks."""
    problem: str | None = None
    """Why it lacks that; None: it has everything."""
    promoted: str | None = None
    """The version that a person promoted by moving the alias in MLflow."""
    set_back: str | None = None
    """Why a move of the alias was not accepted; the alias is set back."""


def sync_lineage(store: ObjectStore, lineage: str) -> Synced:
    """Write what MLflow lacks of a lineage, in the store's order. The caller holds the lineage.

    First the rows that were forgotten are removed. Then a move of the alias `champion` by a person is looked at. An
    error is logged and returned, never raised: a mirror must not stop a lineage.
    """
    written: list[str] = []
    unreadable: list[str] = []
    hand: tuple[str | None, str | None] = (None, None)
    missing: tuple[str, ...] = ()
    problem = None
    try:
        tracker = _open()
        _forget(store, tracker, lineage)
        hand = _write_lineage(store, tracker, lineage, written, unreadable)
        problem = " ".join(unreadable) or None
        missing = waiting(store, lineage)
    except Exception as error:  # whatever it is: the store has everything, and a later call writes what is missing
        problem = in_one_line(error)
        known = isinstance(error, DealError)
        logger.log(
            logging.WARNING if known else logging.ERROR,
            "MLflow lacks entries of '%s'; the next run or deal server sync writes them: %s",
            lineage,
            problem,
            exc_info=None if known else error,
        )
        with suppress(DealError):  # a damaged entry: whoever needs it says so
            missing = waiting(store, lineage)
    return Synced(
        lineage=lineage,
        written=tuple(written),
        missing=missing,
        problem=problem if missing else None,
        promoted=hand[0],
        set_back=hand[1],
    )


def _open() -> Tracker:
    """Return MLflow's client.

    Raises:
        RegistryError: MLflow does not answer. One look tells; the client's own calls would be repeated for minutes.
    """
    from infra.tracking.client import require_answer
    from infra.tracking.tracker import Tracker

    settings = TrackingSettings()
    require_answer(settings.tracking_uri)
    return Tracker(settings)


def _forget(store: ObjectStore, tracker: Tracker, lineage: str) -> None:
    """Remove the rows of forgotten arrivals from MLflow, as `deal data delete` has ordered."""
    for info in list(store.list(keys.mlflow_forget_folder(lineage))):
        for run in tracker.find_all(lineage, store.get_bytes(info.key).decode()):
            run.remove_files(WITH_ROWS)
        store.delete(info.key)


def _write_lineage(
    store: ObjectStore, tracker: Tracker, lineage: str, written: list[str], unreadable: list[str]
) -> tuple[str | None, str | None]:
    """Write the missing entries; return the version that a person promoted in MLflow, or why a move is set back.

    Entries that were written are appended to `written`, and to `unreadable` why a version's files cannot be read: that
    version is left out, and the others are written.
    """
    versions, runs = Versions(store).all(lineage), {run.run_key: run for run in RunJournal(store).all(lineage)}
    if not versions and not runs:
        return None, None
    registered = tracker.models.read(lineage)
    note = set(read_note(store, lineage))
    if versions and not registered.entries:  # its database was lost
        note = set()
    hand = _follow_hand_move(store, lineage, registered)
    for run in runs.values():
        name = f"failed run {run.short_key}"
        if run.state == "failed" and name not in note and all(run.run_key != each.run_key for each in versions):
            _write_run(tracker, run)
            written.append(name)
            note.add(name)
    for version in versions:
        name = f"version {version.version}"
        if version.version not in registered.entries:
            try:
                _write_version(store, tracker, runs.get(version.run_key), version)
            except (StoreError, IntegrityError) as error:
                unreadable.append(in_one_line(error))
                continue
            written.append(name)
        note.add(name)
        report = f"report {version.version}"
        if report not in note and is_over(runs.get(version.run_key)):
            _write_report(store, tracker, version)
            written.append(report)
            note.add(report)
        if day := version.since.adapter_removed:
            removal = f"removal of adapter {version.version}"
            if removal not in note:
                _remove_adapter(tracker, lineage, version.version, day)
                written.append(removal)
                note.add(removal)
    last = PromotionLog(store).last(lineage)
    if last is not None and _write_aliases(store, tracker, lineage, last, written):
        note.add(f"move {last.number}")
    write_note(store, lineage, note)
    return hand


def start_run(run: Run) -> TrackedRun | None:
    """Start the MLflow run of an adaptation, so that its curves can be watched; None: MLflow does not answer."""
    try:
        return _begin(_open(), run)
    except RegistryError as error:
        logger.warning("The run is not shown in MLflow while it trains: %s", in_one_line(error))
        return None


def _begin(tracker: Tracker, run: Run) -> TrackedRun:
    tags = {
        "deal.task": run.task,
        "deal.dataset_sha256": run.dataset_sha256,
        "deal.base_sha256": run.base_sha256,
        "deal.parent_version": run.parent_version or "base",
    }
    tracked = tracker.start(run.lineage, run.run_key, name=run.task, params=run.params, tags=tags)
    tracked.log_dataset(run.task, run.dataset_sha256, run.dataset_uri, run.num_rows)
    return tracked


class LiveCurve:
    """The curves of a training: kept for the journal, and sent to MLflow while it answers."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._tracked = start_run(run)
        self._points: dict[str, list[tuple[int, float]]] = {}

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Add points."""
        for name, value in values.items():
            self._points.setdefault(name, []).append((step, float(value)))
        if self._tracked is not None:
            self._tracked.log(step, values)

    def keep(self, store: ObjectStore) -> None:
        """Write the points into the journal. What MLflow did not take is written with the version."""
        journal = RunJournal(store)
        run = journal.find(self._run.lineage, self._run.run_key) or self._run
        journal.add_curve(run, {name: tuple(points) for name, points in self._points.items()})
        if self._tracked is not None:
            with suppress(RegistryError):
                self._tracked.flush()


def _write_run(tracker: Tracker, run: Run) -> TrackedRun:
    """Write a run with its curves; end it unless a version follows."""
    tracked = _begin(tracker, run)
    steps: dict[int, dict[str, float]] = {}
    for name, points in run.curve.items():
        for step, value in points:
            steps.setdefault(step, {})[name] = value
    for step in sorted(steps):
        tracked.add(step, steps[step])
    tracked.flush()
    if run.state == "failed":
        tracked.end("FAILED")
    return tracked


def end_failed(run: Run) -> None:
    """End the MLflow run of an adaptation that failed. If MLflow is away, a later synchronisation does it."""
    try:
        _write_run(_open(), run)
    except RegistryError as error:
        logger.warning(
            "MLflow shows the run as unfinished until the next run or deal server sync: %s", in_one_line(error)
        )


def _write_version(store: ObjectStore, tracker: Tracker, run: Run | None, version: Version) -> None:
    """Write a version with its run, its report and its logged model."""
    if run is None:  # its journal was lost, which loses its settings and its curves
        run = Run(
            lineage=version.lineage,
            task=version.task,
            run_key=version.run_key,
            dataset_uri="unknown",
            dataset_sha256=version.dataset_sha256,
            num_rows={},
            base_sha256=version.base_sha256,
            parent_version=version.parent_version,
            params={},
            started=version.created,
        )
    tracked = _write_run(tracker, run.model_copy(update={"state": "finished"}))
    scores: dict[str, float | None] = {name: getattr(version, name) for name in SCORES}
    scores |= {f"accuracy/{name}": value for name, value in version.accuracies.items()}
    tracked.log_metrics({**scores, "arrival_accuracy": version.arrival_accuracy})
    settings = {"task": version.task, "strategy": version.strategy, **run.params}
    described: dict[str, Any] = {
        "sha256": version.adapter_sha256,
        "params": settings,
        "metrics": scores,
        "dataset": version.task,
        "dataset_sha256": version.dataset_sha256,
    }
    name = f"{version.lineage}-{version.task}"
    if version.since.adapter_removed:
        model_id = tracked.log_adapter(None, name, **described)
    else:
        with temporary_folder() as temporary, borrowed_adapter(store, version) as adapter:
            served = temporary / "model"
            _write_served_folder(store, adapter, served, version, tracked.run_id)
            model_id = tracked.log_adapter(served, name, **described)
    origin = f"continues version {version.parent_version}" if version.parent_version else "starts from the base model"
    verdict = "accepted" if version.accepted else "rejected: " + "; ".join(version.reasons)
    tracker.models.add(
        version.lineage,
        version.version,
        run_id=tracked.run_id,
        model_id=model_id,
        tags=_tags_of(version),
        description=f"Learned **{version.task}** with {version.strategy}; {origin}. Gate: {verdict}",
    )
    tracked.set_tags({"deal.version": version.version, "deal.gate": "accepted" if version.accepted else "rejected"})
    tracked.end("FINISHED")


def _tags_of(version: Version) -> dict[str, str]:
    """The tags of a version in MLflow, for people who search there. Nothing is read from them."""
    values = {
        "run_key": version.run_key,
        "task": version.task,
        "strategy": version.strategy,
        "gate": "accepted" if version.accepted else "rejected",
        "gate_reasons": " ".join(version.reasons),
        "parent_version": version.parent_version,
        "base_sha256": version.base_sha256,
        "dataset_sha256": version.dataset_sha256,
        "adapter_sha256": version.adapter_sha256,
        **{name: getattr(version, name) for name in SCORES},
    }
    return {f"deal.{name}": str(value) for name, value in values.items() if value not in (None, "")}


def _write_report(store: ObjectStore, tracker: Tracker, version: Version) -> None:
    """Write a version's report as artifacts and metrics of its run. A report whose rows were forgotten is left out."""
    try:
        evaluation = read_report(store, version, EVALUATION_FILE)
        report, page = read_page(store, version)
    except (ObjectNotFoundError, RegistryError):
        return
    tracked = tracker.find(version.lineage, version.run_key)
    if tracked is None:  # somebody has deleted the run
        return
    measured = EvaluationReport.from_json(evaluation)
    tracked.log_metrics(
        {
            "base_accuracy": measured.base_accuracy,
            "parent_accuracy_new_task": measured.parent_accuracy_new_task,
            **{f"forgetting/{name}": value for name, value in measured.matrix.forgetting_by_task.items()},
            "rows_per_second/train": report.training.rows_per_second,
        }
    )
    num_rows = {"ingest": report.quality.num_read, "evaluate": sum(measured.num_rows.values())}
    for stage, seconds in report.seconds.items():
        tracked.log_stage(stage, seconds, num_rows.get(stage))
    tracked.log_json(EVALUATION_FILE, evaluation)
    tracked.log_json(REPORT_FILE, report.model_dump(mode="json"))
    tracked.log_text(PAGE_FILE, page)


def write_look(
    store: ObjectStore, version: Version, live: LiveLook, metrics: Mapping[str, float | None], look: int
) -> None:
    """Keep a look at a version's live traffic with its report, and write its figures and its page into MLflow.

    The figures are in a run of their own, one step a look. A version without a report gets no page: its run was not
    completed, or its arrival was forgotten. An error of MLflow is logged.
    """
    from infra.tracking.client import KIND

    write_report(store, version, LIVE_FILE, live.to_json())
    key = hashlib.sha256(f"monitor {version.run_key}".encode()).hexdigest()
    tags = {KIND: "monitor", "deal.version": version.version}
    try:
        tracker = _open()
        with tracker.start(version.lineage, key, name=f"monitor version {version.version}", tags=tags) as run:
            run.log_metrics(metrics, step=look)
        own = tracker.find(version.lineage, version.run_key)
        if own is not None:
            own.log_text(PAGE_FILE, read_page(store, version)[1])
    except DealError as error:
        logger.warning("MLflow lacks a look at version %s: %s", version.version, in_one_line(error))


def _write_served_folder(store: ObjectStore, adapter: Path, target: Path, version: Version, run_id: str) -> None:
    """Write the folder that MLflow serves: the plain PEFT folder with its card, and MLflow's files."""
    from deal_core.evaluation.answering import SERVED_FILE
    from infra.served_model import write_served_folder
    from tasks.lineage.model_card import CARD_FILE, example_rows, served_version

    record = read_record(store, version.adapter_uri)
    write_served_folder(
        adapter,
        target,
        card=(adapter / CARD_FILE).read_text(encoding="utf-8"),
        served=served_version(record).to_json(),
        served_file=SERVED_FILE,
        example=example_rows(record),
        run_id=run_id,
        version=version.version,
    )


def _remove_adapter(tracker: Tracker, lineage: str, version: str, day: str) -> None:
    """Remove the files of a version whose adapter `deal data gc` removed. The entry stays."""
    from infra.tracking.models import REMOVED
    from infra.tracking.tracker import remove_model_files

    entry = tracker.models.read(lineage).entries.get(version)
    if entry is not None:
        tracker.models.tag_entry(lineage, entry, {REMOVED: day})
        if entry.model_id:
            tracker.models.tag_model([entry.model_id], {REMOVED: day})
            remove_model_files(tracker.client, entry.model_id)


def _write_aliases(store: ObjectStore, tracker: Tracker, lineage: str, last: Move, written: list[str]) -> bool:
    """Set the aliases by the promotion log; return whether all are set. False: MLflow lacks a version that has one.

    The tags around it tell whether a move of the alias is a person's.
    """
    registered = tracker.models.read(lineage)
    versions = Versions(store).all(lineage)
    wanted: dict[str, str] = {alias: version.version for version in versions for alias in version.aliases}
    number = str(last.number)
    is_set = registered.tags.get(MIRRORED) == registered.tags.get(MIRRORING) == number
    if is_set and all(registered.number_of(alias) == wanted.get(alias) for alias in ALIASES):
        return True
    tracker.models.tag(lineage, {MIRRORING: number})
    for alias in ALIASES:
        is_right = registered.number_of(alias) == wanted.get(alias) and (alias in registered.aliases) == (
            alias in wanted
        )
        if not is_right and wanted.get(alias, "") in {"", *registered.entries}:
            entry = registered.entries[wanted[alias]] if alias in wanted else None
            tracker.models.set_alias(lineage, alias, entry)
    if not registered.entries.keys() >= set(wanted.values()):
        return False
    tracker.models.tag(lineage, {MIRRORED: number})
    written.append(f"move {number}")
    return True


def _follow_hand_move(store: ObjectStore, lineage: str, registered: RegisteredLineage) -> tuple[str | None, str | None]:
    """Take a move of the alias `champion` in MLflow as a promotion by hand, if it may be one.

    It counts only if the log has not moved since its aliases were set, and if a command would accept the version now.
    Otherwise the log wins: `_write_aliases` sets the alias back, and a notice says why. After an interrupted write
    nobody can tell whose move it was, so it is set back without a word.

    Returns:
        The version that was promoted, and why a move is set back; at most one of them is not None.
    """
    log = PromotionLog(store)
    moves = log.moves(lineage)
    mirrored = registered.tags.get(MIRRORED)
    shown = next((move.champion for move in moves if str(move.number) == mirrored), None)
    chosen = registered.number_of("champion")
    if shown is None or registered.tags.get(MIRRORING) != mirrored or chosen == shown:
        return None, None
    champion = moves[-1].champion
    action = None
    if chosen is not None and moves[-1].number == int(mirrored or 0):
        action = promoted_by_hand(store, lineage, chosen)
    if chosen is not None and action is not None:
        change = Change(
            action=action,
            lineage=lineage,
            version=chosen,
            before=champion,
            champion=chosen,
            who=BY_HAND,
            why="the alias champion was moved to it in MLflow",
        )
        if log.add(moves[-1], change) is not None:
            version = Versions(store).find(lineage, chosen)
            if version is not None:
                announce("promoted" if action == "promoted" else "rolled-back", Notice.of(version, who=BY_HAND))
            return chosen, None
    what = f"moved to version {chosen}" if chosen else "moved away"
    why = (
        f"In MLflow the alias champion of '{lineage}' was {what}, which deal version promote and deal version rollback would refuse; "
        f"it is set back to version {champion}. deal version list --lineage {lineage} shows what may become champion."
    )
    serving = Versions(store).champion(lineage)
    if serving is not None:
        announce("alias-set-back", Notice.of(serving, reasons=(why,)))
    return None, why
