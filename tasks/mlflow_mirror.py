"""MLflow as a mirror of the store: runs, logged models, registered versions and aliases, written best effort.

The store is the truth. What MLflow lacks is written by the lineage's next run, or by `deal server sync`. Every write
can be repeated, so MLflow may be away, or its database lost, at any time.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
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
from tasks.lineage.promotion import promoted_by_hand
from tasks.lineage.record import read_record
from tasks.lineage.reports import read_page, read_report, write_report
from tasks.lineage.version_files import CARD_FILE, borrowed_adapter
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
    """What was written."""
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
    hand: dict[str, str] = {}
    missing: tuple[str, ...] = ()
    try:
        tracker = _open()
        for info in list(store.list(keys.mlflow_forget_folder(lineage))):
            for tracked in tracker.find_all(lineage, store.get_bytes(info.key).decode()):
                tracked.remove_files(WITH_ROWS)
            store.delete(info.key)
        problem = _write_lineage(store, tracker, lineage, written, hand)
        missing = waiting(store, lineage)
    except Exception as error:  # whatever it is: the store has everything, and a later call writes what is missing
        problem = in_one_line(error)
        is_ours = isinstance(error, DealError)
        logger.log(
            logging.WARNING if is_ours else logging.ERROR,
            "MLflow lacks entries of '%s'; the next run or deal server sync writes them: %s",
            lineage,
            problem,
            exc_info=None if is_ours else error,
        )
        with suppress(DealError):  # a damaged entry: whoever needs it says so
            missing = waiting(store, lineage)
    return Synced(
        lineage=lineage, written=tuple(written), missing=missing, problem=problem if missing else None, **hand
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


def _write_lineage(
    store: ObjectStore, tracker: Tracker, lineage: str, written: list[str], hand: dict[str, str]
) -> str | None:
    """Write the missing entries and append their names to `written`; `hand` gets what `_follow_hand_move` returns.

    A version whose files cannot be read is left out, and the others are written. Return why it cannot be read.
    """
    runs = {run.run_key: run for run in RunJournal(store).all(lineage)}
    if not runs and not Versions(store).all(lineage):
        return None
    registered = tracker.models.read(lineage)
    hand |= _follow_hand_move(store, lineage, registered)
    versions = Versions(store).all(lineage)  # after the move, which changes their aliases
    is_lost = versions and not registered.entries  # MLflow's database
    note = set() if is_lost else set(read_note(store, lineage))
    unreadable: list[str] = []

    def done(entry: str) -> None:
        written.append(entry)
        note.add(entry)

    by_run = {version.run_key for version in versions}
    for run in runs.values():
        entry = f"failed run {run.short_key}"
        if run.state == "failed" and run.run_key not in by_run and entry not in note:
            _write_run(tracker, run)
            done(entry)
    for version in versions:
        entry, report = f"version {version.version}", f"report {version.version}"
        if version.version in registered.entries:
            note.add(entry)
        else:
            try:
                _write_version(store, tracker, runs.get(version.run_key), version)
            except (StoreError, IntegrityError) as error:
                unreadable.append(in_one_line(error))
                continue
            done(entry)
        if report not in note and is_over(runs.get(version.run_key)):
            _write_report(store, tracker, versions, version)
            done(report)
    registered = tracker.models.read(lineage)  # with the new entries
    for version in versions:
        removal = f"removal of adapter {version.version}"
        if version.since.adapter_removed and version.version in registered.entries and removal not in note:
            tracker.models.remove_files(lineage, registered.entries[version.version], version.since.adapter_removed)
            done(removal)
    last = PromotionLog(store).last(lineage)
    if last is not None and _write_aliases(tracker, registered, versions, last, written):
        note.add(f"move {last.number}")
    write_note(store, lineage, note)
    return " ".join(unreadable) or None


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
        self._points: dict[str, list[tuple[int, float]]] = {}
        self._tracked: TrackedRun | None = None
        try:
            self._tracked = _begin(_open(), run)
        except RegistryError as error:
            logger.warning("The run is not shown in MLflow while it trains: %s", in_one_line(error))

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
    for name, points in run.curve.items():
        for step, value in sorted(points):
            tracked.add(step, {name: value})
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
    """Write a version with its run and its logged model."""
    from deal_core.evaluation.answering import SERVED_FILE
    from infra.served_model import write_served_folder
    from tasks.lineage.model_card import example_rows, served_version

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
    shown = scores | {f"accuracy/{name}": value for name, value in version.accuracies.items()}
    shown |= {f"general/{name.replace(':', '/')}": value for name, value in version.general.items()}
    shown |= {f"debt/{name}": points for name, points in version.debts.items()}
    shown |= {"base_divergence": version.base_divergence}
    tracked.log_metrics({**shown, **_arrival_metrics(version)})
    described: dict[str, Any] = {
        "name": f"{version.lineage}-{version.task}",
        "sha256": version.adapter_sha256,
        "params": {"task": version.task, "strategy": version.strategy, **run.params},
        "metrics": shown,
        "dataset": version.task,
        "dataset_sha256": version.dataset_sha256,
    }
    if version.since.adapter_removed:
        model_id = tracked.log_adapter(None, **described)
    else:
        # the folder that MLflow serves: the plain PEFT folder with its card, and MLflow's files
        record = read_record(store, version)
        with temporary_folder() as temporary, borrowed_adapter(store, version) as adapter:
            write_served_folder(
                adapter,
                temporary / "model",
                card=(adapter / CARD_FILE).read_text(encoding="utf-8"),
                served=served_version(record).to_json(),
                served_file=SERVED_FILE,
                example=example_rows(record),
                run_id=tracked.run_id,
                version=version.version,
            )
            model_id = tracked.log_adapter(temporary / "model", **described)
    gate = "accepted" if version.accepted else "rejected"
    verdict = gate if version.accepted else f"{gate}: {'; '.join(version.reasons)}"
    # The tags are for people who search there. Nothing is read from them.
    facts = ("run_key", "kind", "task", "strategy", "parent_version", "base_sha256", "dataset_sha256", "adapter_sha256")
    tags = {name: getattr(version, name) for name in facts}
    tags |= {**scores, "gate": gate, "gate_reasons": " ".join(version.reasons)}
    tracker.models.add(
        version.lineage,
        version.version,
        run_id=tracked.run_id,
        model_id=model_id,
        tags={f"deal.{name}": str(value) for name, value in tags.items() if value not in (None, "")},
        description=f"Learned **{version.learned}** with {version.strategy}; {version.origin}. Gate: {verdict}",
    )
    tracked.set_tags({"deal.version": version.version, "deal.gate": gate})
    tracked.rename(f"{version.task}-v{version.version}")  # while it trained, it had no number
    tracked.end("FINISHED")


def _arrival_metrics(version: Version) -> dict[str, float]:
    """What the version before scored on the arrival, with its interval and its number of rows."""
    if version.arrival is None:
        return {}
    names = ("accuracy", "low", "high", "num_rows", "reference", "estimate")
    values = {f"arrival/{name}": getattr(version.arrival, name) for name in names}
    return {name: float(value) for name, value in values.items() if value is not None}


def _write_report(store: ObjectStore, tracker: Tracker, versions: Sequence[Version], version: Version) -> None:
    """Write a version's report as artifacts and metrics of its run. A report whose rows were forgotten is left out."""
    try:
        evaluation = read_report(store, version, EVALUATION_FILE)
        report, page = read_page(store, versions, version.version)
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
        run = tracker.start(version.lineage, key, name=f"monitor version {version.version}", tags=tags)
        try:
            run.log_metrics(metrics, step=look)
        finally:
            run.end()
        own = tracker.find(version.lineage, version.run_key)
        if own is not None:
            own.log_text(PAGE_FILE, read_page(store, Versions(store).all(version.lineage), version.version)[1])
    except DealError as error:
        logger.warning("MLflow lacks a look at version %s: %s", version.version, in_one_line(error))


def _write_aliases(
    tracker: Tracker, registered: RegisteredLineage, versions: Sequence[Version], last: Move, written: list[str]
) -> bool:
    """Set the aliases by the promotion log; return whether all are set. False: MLflow lacks a version that has one.

    The tags around it tell whether a move of the alias is a person's.
    """
    wanted: dict[str, str] = {alias: version.version for version in versions for alias in version.aliases}
    lineage, number = last.lineage, str(last.number)
    is_set = registered.tags.get(MIRRORED) == registered.tags.get(MIRRORING) == number
    if is_set and all(registered.number_of(alias) == wanted.get(alias) for alias in ALIASES):
        return True
    tracker.models.tag(lineage, {MIRRORING: number})
    for alias in ALIASES:
        version = wanted.get(alias)
        is_right = registered.number_of(alias) == version and (alias in registered.aliases) == (version is not None)
        if not is_right and (version is None or version in registered.entries):
            tracker.models.set_alias(lineage, alias, None if version is None else registered.entries[version])
    if not registered.entries.keys() >= set(wanted.values()):
        return False
    tracker.models.tag(lineage, {MIRRORED: number})
    written.append(f"move {number}")
    return True


def _follow_hand_move(store: ObjectStore, lineage: str, registered: RegisteredLineage) -> dict[str, str]:
    """Take a move of the alias `champion` in MLflow as a promotion by hand, if it may be one.

    It counts only if the log has not moved since its aliases were set, and if a command would accept the version now.
    Otherwise the log wins: `_write_aliases` sets the alias back, and a notice says why. After an interrupted write
    nobody can tell whose move it was, so it is set back without a word.

    Returns:
        Fields of `Synced`: `promoted`, or `set_back`; empty if the alias was not moved.
    """
    log = PromotionLog(store)
    moves = log.moves(lineage)
    mirrored = registered.tags.get(MIRRORED)
    shown = next((move.champion for move in moves if str(move.number) == mirrored), None)
    chosen = registered.number_of("champion")
    if shown is None or registered.tags.get(MIRRORING) != mirrored or chosen == shown:
        return {}
    last = moves[-1]
    is_newest = str(last.number) == mirrored
    action = promoted_by_hand(store, lineage, chosen) if chosen is not None and is_newest else None
    if chosen is not None and action is not None:
        change = Change(
            action=action,
            lineage=lineage,
            version=chosen,
            before=last.champion,
            champion=chosen,
            who=BY_HAND,
            why="the alias champion was moved to it in MLflow",
        )
        if log.add(last, change) is not None:
            version = Versions(store).find(lineage, chosen)
            if version is not None:
                announce(action, Notice.of(version, who=BY_HAND))
            return {"promoted": chosen}
    what = f"moved to version {chosen}" if chosen else "moved away"
    why = (
        f"In MLflow the alias champion of '{lineage}' was {what}, which deal version promote and deal version rollback "
        f"would refuse; it is set back to version {last.champion}. deal version list --lineage {lineage} shows what "
        "may become champion."
    )
    serving = Versions(store).champion(lineage)
    if serving is not None:
        announce("alias set back", Notice.of(serving, reasons=(why,)))
    return {"set_back": why}
