"""One of the processes that train together; the launcher starts it as `python -m deal_core.training.ranks_rank JOB`.

Rank 0's standard output carries one JSON object a line, for the parent: what is logged at each step, and the result.
The end of standard input is the end of the parent, and of the rank.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import torch
from accelerate import PartialState
from datasets import Dataset, disable_progress_bars
from torch.distributed.elastic.multiprocessing.errors import record

from deal_core.base_model.load import load_base
from deal_core.errors import ConfigError
from deal_core.training.ranks_job import TrainingJob
from deal_core.training.ranks_lifeline import end_with_parent
from deal_core.training.train import OnLog, TrainingResult, train_adapter


@record
def main() -> None:
    """Train; what goes wrong is recorded for the launcher, which then ends the other ranks."""
    end_with_parent()
    disable_progress_bars()
    to_parent, state = _take_stdout(), PartialState(cpu=not torch.cuda.is_available())

    def send(message: Mapping[str, Any]) -> None:
        if state.is_main_process:
            to_parent.write(json.dumps(message) + "\n")
            to_parent.flush()

    job = TrainingJob.read(Path(sys.argv[1]))
    result = _train(job, lambda step, values: send({"step": step, "values": dict(values)}))
    send({"result": asdict(result)})
    state.destroy_process_group()


def _train(job: TrainingJob, on_log: OnLog) -> TrainingResult:
    base = load_base(job.base_source, job.cache_folder, precision=job.precision, quantize=job.train.quantize)
    if base.sha256 != job.base_sha256:
        raise ConfigError(f"The base model {job.base_source} has changed since the run began; start it again.")
    return train_adapter(
        base,
        parent_folder=job.parent_folder,
        rows=Dataset.from_parquet(str(job.rows_file), cache_dir=str(job.rows_file.parent)),
        task=job.task,
        old_tasks=job.old_tasks,
        strategy=job.strategy,
        adapter=job.adapter,
        method=job.method,
        train=job.train,
        output_folder=job.output_folder,
        checkpoint_folder=job.checkpoint_folder,
        on_log=on_log,
    )


def _take_stdout() -> TextIO:
    """Keep standard output for messages: what libraries print goes to standard error, which is the rank's log."""
    kept = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return kept


if __name__ == "__main__":
    main()
