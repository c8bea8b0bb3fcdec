"""Start a job by what DEAL_LAUNCH names: this machine, a command such as torchrun, or a Ray cluster."""

from __future__ import annotations

import importlib.util
import shlex
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deal_core.errors import ConfigError
from infra.settings import LaunchSettings
from infra.store import keys
from infra.store.base import ObjectStore

if TYPE_CHECKING:
    from deal_core.training.jobs import AnswerJob, Send, TrainingJob


def is_in_this_process(num_processes: int) -> bool:
    """Whether a job of so many processes needs no launch: this process does it."""
    return num_processes == 1 and LaunchSettings().launch == "local"


def launch_job(
    store: ObjectStore, job: TrainingJob | AnswerJob, jobs_folder: str, folder: Path, on_message: Send
) -> Any:
    """Do a job in other processes and return its result. Errors are those of `run_in_processes`.

    Args:
        store: On Ray the job's files go through it.
        job: The job.
        jobs_folder: A folder in the store for it.
        folder: Folder for logs; emptied first.
        on_message: Gets the progress.

    Raises:
        ConfigError: Ray is not installed.
    """
    from deal_core.training.elastic import PROGRESS_FILE, run_in_processes, run_launcher

    settings = LaunchSettings()
    if settings.launch == "ray":
        from infra.stored_job import download_result, upload_job

        if importlib.util.find_spec("ray") is None:
            raise ConfigError("DEAL_LAUNCH is ray, which is not installed; pip install '.[ray]'.")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        prefix = f"{jobs_folder}/{job.kind}"
        try:
            upload_job(store, job, prefix)
            driver = [sys.executable, "-m", "infra.ray_driver", prefix, str(job.num_processes)]
            result = run_launcher([*driver, str(folder / PROGRESS_FILE)], job, folder, on_message)
        finally:
            store.delete(keys.job_inputs(prefix))  # they hold rows
        download_result(store, job, prefix)
        return result
    command = None
    if settings.launch == "torchrun":
        torchrun = f"{shlex.quote(sys.executable)} -m torch.distributed.run --standalone --nproc-per-node {{processes}}"
        command = shlex.split((settings.launch_command or torchrun).replace("{processes}", str(job.num_processes)))
    return run_in_processes(job, folder, on_message, command)
