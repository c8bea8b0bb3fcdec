"""A job whose files go through the object store: its machines share no folder.

    PREFIX/job.json         the job
    PREFIX/inputs/NAME      the files and folders that it reads
    PREFIX/checkpoints/     the checkpoints of a training, the files of all processes together
    PREFIX/adapter/         the adapter that was trained

`python -m infra.stored_job PREFIX` does what `deal_core.training.main` does with a file, and prints the progress.
torchrun starts it in pods without a shared volume, and a worker of Ray calls `work_on`.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import PartialState
from torch.distributed.elastic.multiprocessing.errors import record
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from deal_core.training.jobs import AnswerJob, Send, TrainingJob, read_job
from deal_core.training.main import run_job
from deal_core.training.trainer import COMPLETE, HISTORY_FILE, NUM_CHECKPOINTS
from infra.settings import HomeSettings, ServingSettings
from infra.store import keys
from infra.store.base import ObjectStore
from infra.store.opening import open_store

CHECKPOINT = f"{PREFIX_CHECKPOINT_DIR}-"


def upload_job(store: ObjectStore, job: TrainingJob | AnswerJob, prefix: str) -> None:
    """Store a job with what it reads. Checkpoints of an earlier try stay."""
    for name, path in job.inputs().items():
        key = f"{keys.job_inputs(prefix)}/{name}"
        if path.is_dir():
            store.upload_folder(path, key)
        else:
            store.upload_file(path, key)
    with tempfile.TemporaryDirectory() as folder:
        job.write(Path(folder) / "job.json")
        store.upload_file(Path(folder) / "job.json", f"{prefix}/job.json")


def download_result(store: ObjectStore, job: TrainingJob | AnswerJob, prefix: str) -> None:
    """Bring the adapter of a training to its output folder, and remove the job from the store."""
    if isinstance(job, TrainingJob):
        store.download_folder(f"{prefix}/adapter", job.output_folder)
    store.delete(prefix)


def work_on(prefix: str, send: Send) -> None:
    """Do a stored job as one of its processes. Each process has its own copies, on its own machine."""
    store = open_store()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store.download_file(f"{prefix}/job.json", folder / "job.json")
        store.download_folder(keys.job_inputs(prefix), folder)
        job = read_job(folder / "job.json").moved(folder)
        place = ServingSettings().base_model or job.base_source
        job = replace(job, cache_folder=HomeSettings().cache_dir, base_source=place)
        if isinstance(job, AnswerJob):
            run_job(job, send)
            return
        _fetch_checkpoint(store, prefix, job.checkpoint_folder)
        held: list[Mapping[str, Any]] = []

        def hold_result(message: Mapping[str, Any]) -> None:
            (held.append if "result" in message else send)(message)

        run_job(job, hold_result, lambda checkpoint: _store_checkpoint(store, prefix, checkpoint))
        if PartialState().is_main_process:
            store.upload_folder(job.output_folder, f"{prefix}/adapter")
        for message in held:  # whoever reads it finds the adapter
            send(message)


def _store_checkpoint(store: ObjectStore, prefix: str, checkpoint: Path) -> None:
    """Store a checkpoint: each process its own files, and the first one, at the end, that it is complete."""
    state, key = PartialState(), f"{prefix}/checkpoints/{checkpoint.name}"
    for path in sorted(checkpoint.rglob("*")):
        if path.is_file() and path.name != COMPLETE:
            store.upload_file(path, f"{key}/{path.relative_to(checkpoint).as_posix()}")
    state.wait_for_everyone()
    if state.is_main_process:
        store.upload_file(checkpoint.parent / HISTORY_FILE, f"{prefix}/checkpoints/{HISTORY_FILE}")
        store.upload_file(checkpoint / COMPLETE, f"{key}/{COMPLETE}")
        for step in _complete_steps(store, prefix)[:-NUM_CHECKPOINTS]:
            store.delete(f"{prefix}/checkpoints/{CHECKPOINT}{step}")


def _fetch_checkpoint(store: ObjectStore, prefix: str, folder: Path) -> None:
    """Bring the newest complete checkpoint to this machine, if there is one."""
    for step in _complete_steps(store, prefix)[-1:]:
        name = f"{CHECKPOINT}{step}"
        store.download_folder(f"{prefix}/checkpoints/{name}", folder / name)
        store.download_file(f"{prefix}/checkpoints/{HISTORY_FILE}", folder / HISTORY_FILE)


def _complete_steps(store: ObjectStore, prefix: str) -> list[int]:
    paths = [Path(info.key) for info in store.list(f"{prefix}/checkpoints")]
    return sorted(int(path.parent.name.removeprefix(CHECKPOINT)) for path in paths if path.name == COMPLETE)


@record
def main(prefix: str) -> None:
    """Do a stored job as one of the processes that torchrun starts."""

    def print_line(message: Mapping[str, Any]) -> None:
        sys.stdout.write(json.dumps(message) + "\n")
        sys.stdout.flush()

    work_on(prefix, print_line)
    PartialState().destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
