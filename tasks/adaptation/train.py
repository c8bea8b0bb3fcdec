"""Train: the parent's adapter continued on one dataset, as a plain PEFT folder in the store."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from prefect import task
from prefect.cache_policies import NO_CACHE

from deal_core.adapter.files import digests_of, sha256_together
from deal_core.config import MethodConfig, TrainConfig
from infra.settings import HomeSettings
from infra.store import keys
from infra.store.base import ObjectStore, complete_file
from infra.tracking.tracker import TrackedRun, open_tracker
from tasks.adaptation.ingest import read_manifest
from tasks.base import lend_base, release_base
from tasks.context import current_store, work_folder
from tasks.lineage.adapters import borrowed_parent
from tasks.lineage.record import read_record
from tasks.progress import advance
from tasks.references import AdaptationJob, AdapterRef, BaseRef, DatasetRef, TrainedAdapter, TrainSummary

if TYPE_CHECKING:
    from deal_core.training.train import OnLog, TrainingResult, TrainingSetup

SUMMARY_FILE = "training.json"


@task(name="train", cache_policy=NO_CACHE)
def train_version(job: AdaptationJob, method: MethodConfig, train: TrainConfig) -> TrainedAdapter:
    """Train the run's adapter; started again after a crash it goes on from where the work folder says.

    Raises:
        AdapterStateError: the parent's adapter does not fit the base model.
        IntegrityError: the parent's adapter is damaged; nothing is trained.
        RankError: one of several training processes died.
    """
    store = current_store()
    run, parent, dataset = job.run, job.parent, job.dataset
    folder = work_folder(run.lineage, run.short_key)
    if not (folder / SUMMARY_FILE).is_file():
        tracked = open_tracker().run(run.tracking_id)
        setup = _setup(store, job, method, train)
        rows_file, on_log = _fetch_rows(store, dataset, folder), _on_log(tracked, train.num_steps(dataset.num_train))
        with borrowed_parent(store, parent) as parent_folder:
            learn = _in_this_process if train.num_processes == 1 else _in_processes
            result = learn(job.base, setup, rows_file, parent_folder, folder, on_log)
        tracked.flush()
        _write_summary(folder, result)
    summary = TrainSummary.model_validate_json((folder / SUMMARY_FILE).read_bytes())
    uri = keys.adapter_uri(run.lineage, run.short_key)
    store.upload_folder(folder / "adapter", uri)
    reference = AdapterRef(
        lineage=run.lineage,
        run_key=run.run_key,
        uri=uri,
        sha256=summary.adapter_sha256,
        parent_version=parent.version if parent else None,
    )
    return TrainedAdapter(adapter=reference, summary=summary)


def _setup(store: ObjectStore, job: AdaptationJob, method: MethodConfig, train: TrainConfig) -> TrainingSetup:
    from deal_core.training.train import TrainingSetup

    old_tasks = read_record(store, job.parent.adapter_uri).tasks if job.parent else ()
    return TrainingSetup(
        task=read_manifest(store, job.dataset.uri).task, old_tasks=tuple(known.schema for known in old_tasks),
        strategy=job.strategy, adapter=job.adapter, method=method, train=train,
    )  # fmt: skip


def _in_this_process(
    base: BaseRef, setup: TrainingSetup, rows_file: Path, parent_folder: Path | None, folder: Path, on_log: OnLog
) -> TrainingResult:
    """Train here; the rows are mapped from disk rather than held in memory."""
    from datasets import Dataset

    from deal_core.training.train import train_adapter

    return train_adapter(
        lend_base(base), Dataset.from_parquet(str(rows_file), cache_dir=str(rows_file.parent)), setup,
        parent_folder=parent_folder, output_folder=folder / "adapter", checkpoint_folder=folder / "checkpoints",
        on_log=on_log,
    )  # fmt: skip


def _in_processes(
    base: BaseRef, setup: TrainingSetup, rows_file: Path, parent_folder: Path | None, folder: Path, on_log: OnLog
) -> TrainingResult:
    """Train with several processes, which load the base model themselves."""
    from deal_core.training.ranks import TrainingJob, train_in_processes

    release_base()  # rank 0 takes the device it is on
    job = TrainingJob(
        base_source=base.source, base_sha256=base.sha256, cache_folder=HomeSettings().cache_dir, rows_file=rows_file,
        setup=setup, parent_folder=parent_folder, output_folder=folder / "adapter",
        checkpoint_folder=folder / "checkpoints",
    )  # fmt: skip
    return train_in_processes(job, folder / "ranks", on_log)


def _fetch_rows(store: ObjectStore, dataset: DatasetRef, folder: Path) -> Path:
    path = folder / "rows" / "train.parquet"
    store.download_file(f"{dataset.uri}/{keys.TRAIN_FILE}", path)
    return path


def _on_log(tracked: TrackedRun, total: int) -> Callable[[int, Mapping[str, float]], None]:
    report = advance("train", total)

    def on_log(step: int, values: Mapping[str, float]) -> None:
        tracked.log(step, {f"train/{name}": value for name, value in values.items()})
        report(step, detail=f"loss {values['loss']:.3f}" if "loss" in values else "")

    return on_log


def _write_summary(folder: Path, result: TrainingResult) -> None:
    """Say, last of all, that the adapter in the work folder is complete."""
    summary = TrainSummary(adapter_sha256=sha256_together(digests_of(folder / "adapter")), **asdict(result))
    with complete_file(folder / SUMMARY_FILE) as part:
        part.write_text(summary.model_dump_json(), encoding="utf-8")
