"""Do one job: `python -m deal_core.training.main JOB.json`, in each of its processes.

torchrun, accelerate launch and SLURM start this module as it is. Rank 0 appends its progress to `progress.jsonl` beside
the job's file, one JSON object a line: the figures of each step, or the numbers of answered rows, and at the end the
result. A rank that raises an error of this project appends it too.

With `--end-with-input` a process ends when its standard input ends. A parent that keeps the other end open can so be
sure that no process outlives it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import disable_progress_bars
from torch.distributed.elastic.multiprocessing.errors import record

from deal_core.base_model.load import load_base
from deal_core.errors import ConfigError
from deal_core.training.elastic import LIFELINE, PROGRESS_FILE, appending, end_with_input
from deal_core.training.jobs import AnswerJob, Send, TrainingJob, read_job
from deal_core.training.trainer import OnCheckpoint


def run_job(job: TrainingJob | AnswerJob, send: Send, on_checkpoint: OnCheckpoint | None = None) -> None:
    """Do a job as one of its processes; `send` gets the messages of rank 0.

    Raises:
        ConfigError: The base model has changed since the job was written.
    """
    disable_progress_bars()
    os.environ.setdefault("ACCELERATE_USE_CPU", str(not torch.cuda.is_available()).lower())  # read by Trainer
    state = PartialState(cpu=not torch.cuda.is_available())

    def send_first(message: Mapping[str, Any]) -> None:
        if state.is_main_process:
            send(message)

    base = load_base(
        job.base_source,
        job.cache_folder,
        precision=job.precision,
        quantize=job.quantize,
        in_main_memory=job.shard == "base",
        receives=job.base_sha256 if job.shard == "base" and not state.is_main_process else None,
    )
    if base.sha256 != job.base_sha256:
        raise ConfigError(f"The base model {job.base_source} has changed since the run began; start it again.")
    send_first({"result": asdict(job.run(base, send_first, on_checkpoint))})


@record
def main(job_file: str, *options: str) -> None:
    """Do the job of a file. An error is recorded for the agent that started this process, which ends the others."""
    if LIFELINE in options:
        end_with_input()
    with appending(Path(job_file).with_name(PROGRESS_FILE)) as send:
        run_job(read_job(Path(job_file)), send)
    PartialState().destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
