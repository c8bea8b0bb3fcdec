"""Several processes that train one adapter together, each on its share of every batch.

The parent starts `deal_core.training.launcher`, which starts the ranks: `python -m deal_core.training.ranks JOB`. Every
rank calls `TrainingJob.run`. Rank 0 alone writes files and reports to the parent, one JSON object a line.
A rank ends when its standard input ends, because that is the end of the parent.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import disable_progress_bars
from pydantic import TypeAdapter
from torch.distributed.elastic.multiprocessing.errors import record

from deal_core import errors
from deal_core.base_model.load import load_base
from deal_core.errors import ConfigError, DealError, RankError
from deal_core.training.train import TrainingJob, TrainingResult
from deal_core.training.trainer import OnLog

END_SECONDS = 60.0
"""Time that the processes have to end before they are killed."""


def train_in_processes(job: TrainingJob, folder: Path, on_log: OnLog | None = None) -> TrainingResult:
    """Do what `train_adapter` does, with `job.setup.train.num_processes` processes on this machine.

    If one process dies, all end. If this process dies, they end too. A second call continues from the last complete
    checkpoint; the number of processes may differ.

    Args:
        job: The training job.
        folder: Folder for the job's file and the processes' logs; emptied first.
        on_log: As for `train_adapter`; an exception from it ends the processes.

    Raises:
        ConfigError: There are fewer CUDA devices than processes.
        RankError: A process died; the message names the rank and the last line of its log.
        DealError: A process raised this error on purpose.
    """
    num_processes = job.setup.train.num_processes
    require_devices(num_processes)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    job.write(folder / "job.json")
    command = [str(folder / "job.json"), str(num_processes), str(folder / "logs")]
    result = None
    with _launched(command, folder / "launcher.log") as messages:
        for message in messages:
            if "failure" in message:
                raise error_of(message["failure"], num_processes, folder)
            if "result" in message:
                result = TypeAdapter(TrainingResult).validate_python(message["result"])
            elif on_log is not None:
                on_log(message["step"], message["values"])
    if result is None:
        last = _last_words(folder / "launcher.log")
        raise RankError(f"The launcher of {num_processes} training processes died: {last} Start the run again.")
    return result


def require_devices(num_processes: int) -> None:
    """Refuse more processes than there are CUDA devices. On a machine without CUDA, processes share the CPU.

    Raises:
        ConfigError: There are fewer CUDA devices than processes.
    """
    num_devices = torch.cuda.device_count()
    if 0 < num_devices < num_processes:
        raise ConfigError(
            f"train.num_processes is {num_processes}, and this machine has {num_devices} CUDA devices; give at "
            "most one process for each."
        )


@contextmanager
def _launched(arguments: list[str], log_file: Path) -> Iterator[Iterator[dict[str, Any]]]:
    """Start the launcher and yield the processes' messages. At the end of the block the processes end.

    Launcher and ranks hold the reading end of a pipe, and only this process the writing end: they notice its death.
    """
    # the ranks import this same package and divide the CPU's cores
    paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // int(arguments[1]))),
        "PYTHONWARNINGS": "ignore::FutureWarning",  # else a library's warning may be the last line of a rank's log
        "ACCELERATE_USE_CPU": str(not torch.cuda.is_available()).lower(),
    }
    with log_file.open("wb") as log:
        launcher = subprocess.Popen(
            [sys.executable, "-m", "deal_core.training.launcher", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=environment,
            start_new_session=True,  # only this process handles a keyboard interrupt, at its next step
        )
    assert launcher.stdin is not None and launcher.stdout is not None
    lifeline = launcher.stdin

    def close_after() -> None:
        launcher.wait()
        with suppress(OSError):
            lifeline.close()

    # ranks that outlive the launcher would keep standard output open, and this process would wait forever
    threading.Thread(target=close_after, daemon=True).start()
    try:
        yield map(json.loads, launcher.stdout)
    finally:
        lifeline.close()
        with launcher.stdout:
            try:
                launcher.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                launcher.kill()


def error_of(failure: Mapping[str, Any], num_processes: int, folder: Path) -> DealError:
    """Turn the launcher's `failure` into the error that a rank raised on purpose, or a RankError about its death."""
    rank, exitcode, message = failure["rank"], failure["exitcode"], failure["message"]
    name, _, text = message.partition(": ")
    kind = getattr(errors, name, None)
    if isinstance(kind, type) and issubclass(kind, DealError):
        return kind(f"{text} (rank {rank} of {num_processes})")
    log = next(folder.glob(f"logs/*/attempt_*/{rank}/stderr.log"), folder / "launcher.log")
    death = f"was killed by {signal.Signals(-exitcode).name}" if exitcode < 0 else f"died with exit code {exitcode}"
    return RankError(
        f"Rank {rank} of the {num_processes} processes that train the adapter {death}, and the others were ended. Its "
        f"last words: {message or _last_words(log)} Its log: {log}. Start the run again: it continues from its last "
        "checkpoint."
    )


def _last_words(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "none."


def end_with_parent() -> None:
    """End this process at once when the other end of standard input closes.

    The kernel closes the pipes of a killed process; a killed process gives no other sign.
    """

    def wait() -> None:
        while os.read(0, 1):
            pass
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


@record
def run_rank(job_file: str) -> None:
    """Train as one rank. An error is recorded for the launcher, which then ends the other ranks."""
    end_with_parent()
    disable_progress_bars()
    # standard output is for messages: prints of libraries go to standard error, which is the rank's log
    to_parent = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    state = PartialState(cpu=not torch.cuda.is_available())

    def send(message: Mapping[str, Any]) -> None:
        if state.is_main_process:
            to_parent.write(json.dumps(message) + "\n")
            to_parent.flush()

    job = TrainingJob.read(Path(job_file))
    base = load_base(job.base_source, job.cache_folder, precision=job.precision, quantize=job.setup.train.quantize)
    if base.sha256 != job.base_sha256:
        raise ConfigError(f"The base model {job.base_source} has changed since the run began; start it again.")
    result = job.run(base, lambda step, values: send({"step": step, "values": dict(values)}))
    send({"result": asdict(result)})
    state.destroy_process_group()


if __name__ == "__main__":
    run_rank(sys.argv[1])
