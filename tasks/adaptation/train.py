"""Train the parent's adapter on one dataset, and store the result as a plain PEFT folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefect import task
from pydantic import ValidationError

from deal_core.adapter.files import digests_of, sha256_together
from deal_core.regular_file import complete_file, flush_to_disk
from infra.launch import is_in_this_process, launch_job
from infra.settings import HomeSettings, LaunchSettings
from infra.store import keys
from infra.store.base import ObjectStore
from infra.store.opening import open_store
from tasks.adaptation.consolidate import gather_rows
from tasks.adaptation.run import STAGE, AdaptationRun
from tasks.base import cached_base, release_base
from tasks.lineage.datasets import read_manifest
from tasks.mlflow_mirror import LiveCurve
from tasks.progress import advance, staged
from tasks.references import TrainedAdapter, TrainSummary

if TYPE_CHECKING:
    from deal_core.training.jobs import Send, TrainingJob
    from deal_core.training.train import TrainingResult, TrainingSetup

CONSOLIDATION_STRATEGY = "seq_lora"
"""The strategy of a consolidation's training: plain LoRA."""
SUMMARY_FILE = "training.json"
CHOSEN_FILE = "rows/chosen.parquet"
SELECTION_FILE = "selection.json"


def _describe(trained: TrainedAdapter) -> str:
    summary = trained.summary
    resumed = f", resumed from step {summary.resumed_from_step}" if summary.resumed_from_step is not None else ""
    losses = [loss for _, loss in summary.losses]
    course = f", loss {losses[0]:.2f} → {losses[-1]:.2f}" if losses else ""
    return f"{summary.num_steps} steps, {summary.rows_per_second:.1f} rows/s{course}{resumed}"


@task(name="train", **STAGE)
@staged("train", _describe)
def train_version(adaptation: AdaptationRun) -> TrainedAdapter:
    """Train the run's adapter. After a crash, training continues from the last checkpoint in the work folder.

    A consolidation is plain LoRA on the rows of all tasks together, and hands on the rows that the parent kept.

    If `method.selection` is on, the rows are chosen first; a file in the work folder keeps the choice.

    Raises:
        AdapterStateError: The parent's adapter does not fit the base model.
        IntegrityError: The parent's adapter is damaged; nothing is trained.
        RankError: One of several training processes died.
    """
    from deal_core.training.jobs import train_within_memory

    store, folder, train = open_store(), adaptation.folder, adaptation.spec.train
    launching = LaunchSettings()
    if (summary := _finished(folder)) is None:
        training, num_rows, notes = (_alone if adaptation.consolidation is None else _together)(store, adaptation)
        curve = LiveCurve(adaptation.run)
        try:
            on_message = _on_message(curve, train.num_steps(num_rows))
            result = train_within_memory(training, lambda job: _train(store, job, adaptation, on_message))
        finally:
            curve.keep(store)
        result = replace(result, notes=(*notes, *result.notes))
        summary = TrainSummary(
            adapter_sha256=sha256_together(digests_of(folder / "adapter")),
            num_rows=num_rows,
            launch=launching.launch,
            shard=launching.shard,
            **asdict(result),
        )
        flush_to_disk(folder / "adapter")
        with complete_file(folder / SUMMARY_FILE) as part:  # the last file: the adapter is complete
            part.write_text(summary.model_dump_json(), encoding="utf-8")
    uri = adaptation.adapter_uri
    store.upload_folder(folder / "adapter", uri)
    return TrainedAdapter(folder=folder / "adapter", uri=uri, sha256=summary.adapter_sha256, summary=summary)


def _finished(folder: Path) -> TrainSummary | None:
    """The summary of a training that an earlier try has finished; None: there is none, so train or go on.

    After a power cut a file may have lost its content.
    """
    if not (folder / SUMMARY_FILE).is_file():
        return None
    try:
        summary = TrainSummary.model_validate_json((folder / SUMMARY_FILE).read_bytes())
        if summary.adapter_sha256 == sha256_together(digests_of(folder / "adapter")):
            return summary
    except (ValidationError, OSError):
        pass
    (folder / SUMMARY_FILE).unlink()
    return None


def _alone(store: ObjectStore, adaptation: AdaptationRun) -> tuple[TrainingJob, int, tuple[str, ...]]:
    """The training on one arrival, the number of its rows, and notes about their choice."""
    from deal_core.training.train import TrainingSetup

    folder, dataset_uri = adaptation.folder, adaptation.dataset.uri
    setup = TrainingSetup(
        task=read_manifest(store, dataset_uri).task,
        old_tasks=tuple(known.schema for known in adaptation.record.tasks) if adaptation.record else (),
        strategy=adaptation.strategy,
        adapter=adaptation.adapter,
        method=adaptation.spec.method,
        train=adaptation.spec.train,
    )
    rows_file = folder / "rows" / keys.TRAIN_FILE
    store.download_file(f"{dataset_uri}/{keys.TRAIN_FILE}", rows_file)
    rows_file, num_rows, notes = _choose(adaptation, setup, rows_file)
    return _job(adaptation, setup, rows_file, adaptation.parent_folder), num_rows, notes


def _together(store: ObjectStore, adaptation: AdaptationRun) -> tuple[TrainingJob, int, tuple[str, ...]]:
    """The training of a consolidation, the number of its rows, and notes about them."""
    from deal_core.method_config import MethodConfig
    from deal_core.training.train import KeptSource, TrainingSetup

    plan, record, parent_folder = adaptation.consolidation, adaptation.record, adaptation.parent_folder
    assert plan is not None and record is not None and parent_folder is not None, "there is a champion"
    first, *others = gather_rows(store, plan, record, adaptation.folder)
    setup = TrainingSetup(
        task=first.task,
        strategy=CONSOLIDATION_STRATEGY,
        adapter=adaptation.adapter,
        method=MethodConfig(),
        train=adaptation.spec.train,
    )
    learned = tuple(known.schema for known in record.tasks if known.schema.name in plan.kept)
    job = replace(
        _job(adaptation, setup, first.rows_file, parent_folder if plan.start == "champion" else None),
        joined=tuple(others),
        kept=KeptSource(folder=parent_folder, learned=learned),
    )
    return job, plan.num_rows, plan.notes


def _job(adaptation: AdaptationRun, setup: TrainingSetup, rows_file: Path, parent_folder: Path | None) -> TrainingJob:
    from deal_core.training.jobs import TrainingJob

    return TrainingJob(
        base_source=adaptation.base.source,
        base_sha256=adaptation.base.sha256,
        cache_folder=HomeSettings().cache_dir,
        rows_file=rows_file,
        setup=setup,
        parent_folder=parent_folder,
        output_folder=adaptation.folder / "adapter",
        checkpoint_folder=adaptation.folder / "checkpoints",
        shard=LaunchSettings().shard,
    )


def _choose(adaptation: AdaptationRun, setup: TrainingSetup, rows_file: Path) -> tuple[Path, int, tuple[str, ...]]:
    """Return the file of the rows that are trained on, their number, and notes about the choice.

    Rows are chosen in this process before others start. If the selection is off, all of them stay.
    """
    from datasets import Dataset

    from deal_core.selection.choose import choose_rows

    if not setup.method.selection.is_on:
        return rows_file, adaptation.dataset.num_train, ()
    report = advance("train")
    rows = Dataset.from_parquet(str(rows_file), cache_dir=str(rows_file.parent))
    chosen = choose_rows(
        rows,
        setup,
        lambda: cached_base(adaptation.base),
        parent_folder=adaptation.parent_folder,
        journal=adaptation.folder / SELECTION_FILE,
        on_progress=lambda done, total: report(done, total, "choosing rows"),
    )
    rows.select(chosen.rows).to_parquet(adaptation.folder / CHOSEN_FILE)
    return adaptation.folder / CHOSEN_FILE, len(chosen.rows), chosen.notes


def _train(store: ObjectStore, training: TrainingJob, adaptation: AdaptationRun, on_message: Send) -> TrainingResult:
    """Train in this process, or in others that each load the base model."""
    from deal_core.training.train import TrainingResult

    if is_in_this_process(training.num_processes):
        result = training.run(cached_base(adaptation.base), on_message)
        assert isinstance(result, TrainingResult)
        return result
    release_base()  # rank 0 needs the memory of this device
    result = launch_job(store, training, adaptation.jobs_folder, adaptation.folder / "ranks", on_message)
    assert isinstance(result, TrainingResult)
    return result


def _on_message(curve: LiveCurve, total: int) -> Send:
    report = advance("train", total)

    def on_message(message: Mapping[str, Any]) -> None:
        if (step := message.get("step")) is None:
            return
        values: Mapping[str, float] = message["values"]
        curve.log(step, {f"train/{name}": value for name, value in values.items()})
        report(step, detail=f"loss {values['loss']:.3f}" if "loss" in values else "")

    return on_message
