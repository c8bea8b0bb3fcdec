"""PyTorch's elastic agent, which starts the ranks of a job on this machine and ends them together.

`python -m deal_core.training.launcher NUM_PROCESSES LOG_FOLDER JOB`. The ranks begin after the launcher has started, so
it imports no more than the agent.
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

from deal_core.training.messages import LIFELINE


def launch(num_processes: int, log_folder: str, job_file: str) -> None:
    """Run the ranks to their end."""
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
        elastic_launch(config, sys.executable)("-m", "deal_core.training.main", job_file, LIFELINE)
    except ChildFailedError as error:
        sys.stdout.write(json.dumps({"failure": describe(error.failures)}) + "\n")
        sys.exit(1)


def describe(failures: Mapping[int, ProcessFailure]) -> dict[str, Any]:
    """Describe the rank whose death caused the others to die: its number, exit code and error message ("" if none).

    A killed rank leaves no error record, and the other ranks fail soon after, so a rank without a record comes first.
    A rank that died by SIGTERM comes last, because the agent ends the remaining ranks with SIGTERM. Of several records,
    the oldest is the cause.
    """

    def order(rank: int) -> tuple[int, float]:
        record = Path(failures[rank].error_file)
        if record.is_file():
            return 1, record.stat().st_mtime
        return (2 if failures[rank].exitcode == -signal.SIGTERM else 0), 0.0

    first = min(failures, key=order)
    failure = failures[first]
    message = failure.error_file_data["message"]["message"] if Path(failure.error_file).is_file() else ""
    return {"rank": first, "exitcode": failure.exitcode, "message": message}


if __name__ == "__main__":
    launch(int(sys.argv[1]), sys.argv[2], sys.argv[3])
