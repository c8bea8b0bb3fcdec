"""One adaptation: what its stages share."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from deal_core.config import AdapterConfig
from deal_core.data.schema import TaskSchema
from infra.run_journal import Run
from infra.versions import Version
from tasks.context import current_store, work_folder
from tasks.lineage.choices import choose_spared
from tasks.lineage.datasets import read_manifest
from tasks.lineage.frozen_rows import Answers, read_answers
from tasks.lineage.record import KnownTask, LineageRecord
from tasks.lineage.requests import Renewal, find_renewal
from tasks.lineage.version_files import fetch_adapter
from tasks.references import ArrivalScore, BaseRef, DatasetRef, Spared
from tasks.spec import AdaptSpec


@dataclass(frozen=True, kw_only=True)
class AdaptationRun:
    """What the stages from training to report work with. It is made once; no stage reads or downloads it again."""

    spec: AdaptSpec
    run: Run
    """The run's entry in the journal."""
    dataset: DatasetRef
    schema: TaskSchema
    """The schema of the dataset's task."""
    base: BaseRef
    adapter: AdapterConfig
    """Shape of the lineage's adapter."""
    strategy: str
    config_sha256: str
    """Digest of all settings that can change the result."""
    parent: Version | None
    """The champion, which the new version continues; None: it starts from the base model. So for the next two."""
    record: LineageRecord | None
    parent_folder: Path | None
    """A copy of the parent's adapter on this machine, compared with its digests."""
    parent_answers: Answers
    """The parent's answers to the test rows of its tasks; empty without a parent, or if they were forgotten."""
    tasks: tuple[KnownTask, ...]
    """All tasks of the new version, each with the test rows that judge it."""
    renewal: Renewal
    """What the arrival does to the test rows of its task."""
    spared: Spared
    tested: ArrivalScore | None
    """The champion's score on the arrival's rows; None: it was not asked."""
    requeued_sha256: str | None
    """Digest of the dataset of the version whose arrival is learned again; None: no version is replaced."""

    @property
    def lineage(self) -> str:
        """The lineage that learns."""
        return self.run.lineage

    @property
    def run_key(self) -> str:
        """The run's identity."""
        return self.run.run_key

    @property
    def folder(self) -> Path:
        """The folder of the run's checkpoints and results on this machine."""
        return work_folder(self.run.lineage, self.run.short_key)


def prepare(
    spec: AdaptSpec,
    run: Run,
    dataset: DatasetRef,
    base: BaseRef,
    *,
    adapter: AdapterConfig,
    strategy: str,
    config_sha256: str,
    parent: Version | None,
    record: LineageRecord | None,
    tested: ArrivalScore | None,
    requeued_sha256: str | None,
) -> AdaptationRun:
    """Gather what the stages of a run work with, and copy the parent's adapter to this machine.

    Raises:
        IntegrityError: The parent's adapter is damaged.
        ObjectNotFoundError: The parent's adapter is missing.
    """
    store = current_store()
    schema, renewal = read_manifest(store, dataset.uri).task, find_renewal(store, record, dataset)
    parent_folder = None
    if parent is not None:
        parent_folder = work_folder(run.lineage, run.short_key) / "parent"
        shutil.rmtree(parent_folder, ignore_errors=True)  # of an earlier try, which may be incomplete or damaged
        fetch_adapter(store, parent, parent_folder)
    return AdaptationRun(
        spec=spec,
        run=run,
        dataset=dataset,
        schema=schema,
        base=base,
        adapter=adapter,
        strategy=strategy,
        config_sha256=config_sha256,
        parent=parent,
        record=record,
        parent_folder=parent_folder,
        parent_answers=read_answers(store, parent.adapter_uri).now if parent else {},
        tasks=_tasks_after(record, dataset, schema, renewal.known, spec),
        renewal=renewal,
        spared=choose_spared(spec, strategy, record),
        tested=tested,
        requeued_sha256=requeued_sha256,
    )


def _tasks_after(
    before: LineageRecord | None, dataset: DatasetRef, schema: TaskSchema, renewed: KnownTask | None, spec: AdaptSpec
) -> tuple[KnownTask, ...]:
    """Return the tasks that a version knows after it learned the dataset, each with the test rows that judge it.

    A new task has the dataset's `schema` and test rows, and the limits of `spec`. `renewed` is the task whose test rows
    the dataset's replace.
    """
    known = before.tasks if before else ()
    if before is None or before.task(dataset.task) is None:
        new = KnownTask(
            schema=schema,
            dataset_uri=dataset.uri,
            num_test=dataset.num_test,
            max_prompt_tokens=spec.train.max_prompt_tokens,
            max_new_tokens=spec.evaluate.max_new_tokens,
        )
        known = (*known, new)
    known = tuple(task.judged_by(dataset) if task == renewed else task for task in known)
    return tuple(replace(task, schema=dataset.widen(task.schema)) for task in known)
