"""Starts the ranks and watches them, as `python -m deal_core.training.ranks_launcher JOB NUM_PROCESSES LOG_FOLDER`.

When one dies PyTorch's elastic agent ends the others; which one died first, and how, goes to standard output as JSON.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch


def main() -> None:
    """Run the ranks to their end."""
    job_file, num_processes, log_folder = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    outputs = {rank: Std.ERR if rank == 0 else Std.ALL for rank in range(num_processes)}
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_processes,
        run_id="ranks",
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",  # a port that is free
        local_addr="127.0.0.1",
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(log_dir=log_folder, redirects=outputs),
    )
    try:
        elastic_launch(config, sys.executable)("-m", "deal_core.training.ranks_rank", job_file)
    except ChildFailedError as error:
        sys.stdout.write(json.dumps({"failure": describe(error.failures)}) + "\n")
        sys.exit(1)


def describe(failures: Mapping[int, ProcessFailure]) -> dict[str, Any]:
    """Say which rank died first, with which exit code, and what it raised (empty where it raised nothing)."""
    rank, failure = first_to_fail(failures)
    message = failure.error_file_data["message"]["message"] if _recorded(failure) else ""
    return {"rank": rank, "exitcode": failure.exitcode, "message": message}


def first_to_fail(failures: Mapping[int, ProcessFailure]) -> tuple[int, ProcessFailure]:
    """The rank whose death was the cause of the others'.

    A rank that is killed leaves no record, and the others soon fail for lack of it; SIGTERM is what the agent ends
    the rest with. Among records the older one is the cause.
    """

    def order(item: tuple[int, ProcessFailure]) -> tuple[int, float]:
        failure = item[1]
        if _recorded(failure):
            return 1, Path(failure.error_file).stat().st_mtime
        return (2 if failure.exitcode == -signal.SIGTERM else 0), 0.0

    return min(failures.items(), key=order)


def _recorded(failure: ProcessFailure) -> bool:
    return Path(failure.error_file).is_file()


if __name__ == "__main__":
    main()
