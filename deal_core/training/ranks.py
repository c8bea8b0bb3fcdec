"""Starts the processes of a job on this machine, reads their messages, and ends them with this process.

A launcher starts `python -m deal_core.training.main JOB`: PyTorch's elastic agent (`deal_core.training.launcher`), or a
command such as torchrun. Launcher and processes hold the reading end of a pipe, and only this process the writing end:
they notice its death.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from deal_core import errors
from deal_core.errors import ConfigError, DealError, RankError
from deal_core.training.jobs import AnswerJob, TrainingJob, read_result
from deal_core.training.messages import LIFELINE, Send

END_SECONDS = 60.0
"""Time that the processes have to end before they are killed."""


def run_in_processes(
    job: TrainingJob | AnswerJob,
    folder: Path,
    on_message: Send = lambda _: None,
    command: Sequence[str] | None = None,
) -> Any:
    """Do a job in `job.num_processes` processes, and return its result.

    If one process dies, all end. If this process dies, they end too. A second call for a training continues from the
    last complete checkpoint; the number of processes may differ.

    Args:
        job: The job.
        folder: Folder for the job's file and the processes' logs; emptied first.
        on_message: Gets the progress; an exception from it ends the processes.
        command: What starts the processes, such as torchrun with its options; None: PyTorch's agent on this machine.

    Raises:
        ConfigError: There are fewer CUDA devices than processes.
        RankError: A process died; the message names the rank and the last line of its log.
        DealError: A process raised this error on purpose.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    job.write(folder / "job.json")
    if command is None:
        require_devices(job.num_processes)
        agent = [sys.executable, "-m", "deal_core.training.launcher", str(job.num_processes), str(folder / "logs")]
        started = [*agent, str(folder / "job.json")]
    else:
        started = [*command, "-m", "deal_core.training.main", str(folder / "job.json"), LIFELINE]
    return run_launcher(started, job, folder, on_message)


def run_launcher(
    command: Sequence[str], job: TrainingJob | AnswerJob, folder: Path, on_message: Send = lambda _: None
) -> Any:
    """Run a command that does a job and writes messages, as `run_in_processes` does; `folder` gets its log."""
    result, last_step = None, 0
    with _launched(command, job.num_processes, folder / "launcher.log") as messages:
        for message in messages:
            if "failure" in message:
                raise error_of(message["failure"], job.num_processes, folder)
            if "result" in message:
                result = read_result(job, message["result"])
            elif (step := message.get("step")) is None or step > last_step:  # a restarted group tells its steps again
                last_step = step or last_step
                on_message(message)
    if result is None:
        last = _last_words(folder / "launcher.log")
        raise RankError(
            f"The launcher of {job.num_processes} processes died: {last} Its log: {folder / 'launcher.log'}. Start the "
            "run again."
        )
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
def _launched(command: Sequence[str], num_processes: int, log_file: Path) -> Iterator[Iterator[dict[str, Any]]]:
    """Start the launcher and yield the processes' messages. At the end of the block the processes end."""
    # the processes import this same package and divide the CPU's cores
    paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // num_processes)),
        "PYTHONWARNINGS": "ignore::FutureWarning",  # else a library's warning may be the last line of a rank's log
    }
    with log_file.open("wb") as log:
        launcher = subprocess.Popen(
            command,
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
        yield _messages(launcher.stdout)
    finally:
        lifeline.close()
        with launcher.stdout:
            try:
                launcher.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                launcher.kill()


def _messages(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """The messages among lines; a launcher may print others."""
    for line in lines:
        if line.startswith("{"):
            yield json.loads(line)


def error_of(failure: Mapping[str, Any], num_processes: int, folder: Path) -> DealError:
    """Turn a `failure` into the error that a rank raised on purpose, or a RankError about its death."""
    rank, exitcode, message = failure["rank"], failure.get("exitcode", 1), failure["message"]
    name, _, text = message.partition(": ")
    kind = getattr(errors, name, None)
    if isinstance(kind, type) and issubclass(kind, DealError):
        return kind(f"{text} (rank {rank} of {num_processes})")
    log = next(folder.glob(f"logs/*/attempt_*/{rank}/stderr.log"), folder / "launcher.log")
    death = f"was killed by {signal.Signals(-exitcode).name}" if exitcode < 0 else f"died with exit code {exitcode}"
    return RankError(
        f"Rank {rank} of the {num_processes} processes that do the job {death}, and the others were ended. Its "
        f"last words: {message or _last_words(log)} Its log: {log}. Start the run again: it continues from its last "
        "checkpoint."
    )


def _last_words(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "none."
