"""Train the parent's adapter on one dataset, and store the result as a plain PEFT folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pydantic import ValidationError

from deal_core.adapter.files import digests_of, sha256_together
from deal_core.config import EvaluateConfig, TrainConfig
from deal_core.method_config import MethodConfig
from deal_core.regular_file import complete_file, flush_to_disk
from deal_core.strategies import strategy_class
from infra.settings import HomeSettings
from infra.store import keys
from infra.store.base import ObjectStore
from infra.tracking.tracker import TrackedRun, open_tracker
from tasks.adaptation.frozen_rows import answers_labels, spared_texts
from tasks.adaptation.ingest import tasks_after
from tasks.adaptation.manifests import read_manifest
from tasks.base import lend_base, release_base
from tasks.context import current_store, work_folder
from tasks.lineage.record import KnownTask, read_record
from tasks.lineage.requests import find_renewal
from tasks.lineage.version_files import borrowed_parent
from tasks.progress import advance
from tasks.references import AdaptationJob, AdapterRef, BaseRef, TrainedAdapter, TrainSummary

if TYPE_CHECKING:
    from deal_core.training.job import TextsFile, TrainingJob
    from deal_core.training.train import TrainingResult, TrainingSetup
    from deal_core.training.trainer import OnLog

SUMMARY_FILE = "training.json"
CHOSEN_FILE = "rows/chosen.parquet"
SELECTION_FILE = "selection.json"


class _LearnedRows(NamedTuple):
    """The rows that are trained on, and what was chosen, for people."""

    file: Path
    num_rows: int
    notes: tuple[str, ...] = ()


def train_version(job: AdaptationJob, method: MethodConfig, train: TrainConfig) -> TrainedAdapter:
    """Train the run's adapter. After a crash, training continues from the last checkpoint in the work folder.

    If `method.selection` is on, the rows are chosen first; a file in the work folder keeps the choice.
    `train.recentre_steps` follow the training.

    Raises:
        AdapterStateError: The parent's adapter does not fit the base model.
        ConfigError: A tool of `train.report_to` is not installed.
        IntegrityError: The parent's adapter is damaged; nothing is trained.
        RankError: One of several training processes died.
    """
    from deal_core.training.job import TrainingJob

    store = current_store()
    run, parent, dataset = job.run, job.parent, job.dataset
    folder = work_folder(run.lineage, run.short_key)
    if (summary := _finished(folder)) is None:
        tracked = open_tracker().run(run.tracking_id)
        setup = _setup(store, job, method, train)
        rows_file = folder / "rows" / keys.TRAIN_FILE
        store.download_file(f"{dataset.uri}/{keys.TRAIN_FILE}", rows_file)
        with borrowed_parent(store, parent) as parent_folder:
            learned = _choose(job.base, setup, _LearnedRows(rows_file, dataset.num_train), parent_folder, folder)
            training = TrainingJob(
                base_source=job.base.source,
                base_sha256=job.base.sha256,
                cache_folder=HomeSettings().cache_dir,
                rows_file=learned.file,
                old_texts=_old_texts(store, job, setup, folder / "texts"),
                setup=setup,
                parent_folder=parent_folder,
                output_folder=folder / "adapter",
                checkpoint_folder=folder / "checkpoints",
            )
            result = _train(training, job.base, folder, _on_log(tracked, train.num_steps(learned.num_rows)))
        recentred = _recentre(store, job, train, folder / "adapter") if train.recentre_steps else ()
        result = replace(result, notes=(*learned.notes, *result.notes, *recentred))
        tracked.flush()
        summary = TrainSummary(
            adapter_sha256=sha256_together(digests_of(folder / "adapter")), num_rows=learned.num_rows, **asdict(result)
        )
        flush_to_disk(folder / "adapter")
        with complete_file(folder / SUMMARY_FILE) as part:  # the last file: the adapter is complete
            part.write_text(summary.model_dump_json(), encoding="utf-8")
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


def _recentre(store: ObjectStore, job: AdaptationJob, train: TrainConfig, adapter: Path) -> tuple[str, ...]:
    """Let the adapter unlearn a preference for some labels, on texts that do not judge it; return notes."""
    from deal_core.training.recentre import recentre_adapter

    texts = spared_texts(store, [known for known in _tasks(store, job, train) if answers_labels(known.schema)])
    return recentre_adapter(lend_base(job.base), adapter, texts, train, advance("train"))


def _tasks(store: ObjectStore, job: AdaptationJob, train: TrainConfig) -> tuple[KnownTask, ...]:
    """All tasks of the version, each with the test rows that it is judged on."""
    dataset, record = job.dataset, read_record(store, job.parent.adapter_uri) if job.parent else None
    renewed = find_renewal(store, record, dataset).known
    return tasks_after(store, record, dataset, renewed, train.max_prompt_tokens, EvaluateConfig().max_new_tokens)


def _old_texts(store: ObjectStore, job: AdaptationJob, setup: TrainingSetup, folder: Path) -> tuple[TextsFile, ...]:
    """Write the texts of old tasks that the strategy may ask about to files in `folder`."""
    from deal_core.training.job import TextsFile

    if strategy_class(job.strategy).old_rows(setup.method) != "unused":
        return ()
    folder.mkdir(exist_ok=True)
    files = []
    olds = [known for known in _tasks(store, job, setup.train) if known.schema.name != setup.task.name]
    for number, each in enumerate(spared_texts(store, olds)):
        if len(each.rows):
            file = folder / f"{number}.parquet"
            each.rows.select_columns(["input", "output"]).to_parquet(file)
            files.append(
                TextsFile(
                    task=each.task,
                    file=file,
                    max_prompt_tokens=each.max_prompt_tokens,
                    max_new_tokens=each.max_new_tokens,
                )
            )
    return tuple(files)


def _setup(store: ObjectStore, job: AdaptationJob, method: MethodConfig, train: TrainConfig) -> TrainingSetup:
    from deal_core.training.train import TrainingSetup
    from deal_core.training.trainer import Reporting, require_installed

    require_installed(train.report_to)  # before the base model is loaded
    run, task = job.run, read_manifest(store, job.dataset.uri).task
    folder = HomeSettings().home / "tensorboard" / run.lineage / run.short_key
    reporting = Reporting(project=run.lineage, run=f"{run.lineage}-{task.name}-{run.short_key}", folder=folder)
    old_tasks = read_record(store, job.parent.adapter_uri).tasks if job.parent else ()
    return TrainingSetup(
        task=task,
        old_tasks=tuple(known.schema for known in old_tasks),
        strategy=job.strategy,
        adapter=job.adapter,
        method=method,
        train=train,
        reporting=reporting if train.report_to else None,
    )


def _choose(
    base: BaseRef, setup: TrainingSetup, every: _LearnedRows, parent_folder: Path | None, folder: Path
) -> _LearnedRows:
    """Choose the rows that are trained on, in this process before others start, and write them to CHOSEN_FILE.

    If the selection is off, the rows stay as they are.
    """
    from datasets import Dataset

    from deal_core.selection.choose import choose_rows

    if not setup.method.selection.is_on:
        return every
    report = advance("train")
    rows = Dataset.from_parquet(str(every.file), cache_dir=str(every.file.parent))
    chosen = choose_rows(
        rows,
        setup,
        lambda: lend_base(base),
        parent_folder=parent_folder,
        journal=folder / SELECTION_FILE,
        on_progress=lambda done, total: report(done, total, "choosing rows"),
    )
    rows.select(chosen.rows).to_parquet(folder / CHOSEN_FILE)
    return _LearnedRows(folder / CHOSEN_FILE, len(chosen.rows), chosen.notes)


def _train(training: TrainingJob, base: BaseRef, folder: Path, on_log: OnLog) -> TrainingResult:
    """Train in this process, or in several processes that each load the base model."""
    if training.setup.train.num_processes == 1:
        return training.run(lend_base(base), on_log)
    from deal_core.training.ranks import train_in_processes

    release_base()  # rank 0 needs the memory of this device
    return train_in_processes(training, folder / "ranks", on_log)


def _on_log(tracked: TrackedRun, total: int) -> Callable[[int, Mapping[str, float]], None]:
    report = advance("train", total)

    def on_log(step: int, values: Mapping[str, float]) -> None:
        tracked.log(step, {f"train/{name}": value for name, value in values.items()})
        report(step, detail=f"loss {values['loss']:.3f}" if "loss" in values else "")

    return on_log
