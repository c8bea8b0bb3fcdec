"""Train with several processes, and hear from them as from one."""

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
from pathlib import Path
from typing import IO, Any

import torch
from pydantic import TypeAdapter

from deal_core import errors
from deal_core.errors import ConfigError, DealError, RankError
from deal_core.training.ranks_job import TrainingJob
from deal_core.training.train import OnLog, TrainingResult

END_SECONDS = 60.0
"""How long the processes have to end when they are told to, before they are killed."""


def train_in_processes(job: TrainingJob, folder: Path, on_log: OnLog | None = None) -> TrainingResult:
    """Do what `train_adapter` does, with `job.train.num_processes` processes on this machine.

    When one of them dies all end; when this process dies, they end too. Called again it goes on from the last complete
    checkpoint, whatever the number of processes was and is.

    Args:
        job: What to train.
        folder: For the job's file and the processes' logs; emptied first.
        on_log: As for `train_adapter`; what it raises ends the processes.

    Raises:
        ConfigError: There are fewer CUDA devices than processes.
        RankError: A process died; it names the rank and its last words.
        DealError: What a process raised on purpose.
    """
    num_processes = job.train.num_processes
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
    """Refuse more processes than there are CUDA devices; without any the processes share the CPU.

    Raises:
        ConfigError: There are fewer.
    """
    num_devices = torch.cuda.device_count()
    if 0 < num_devices < num_processes:
        raise ConfigError(
            f"train.num_processes is {num_processes}, and this machine has {num_devices} CUDA devices; give at "
            "most one process for each."
        )


@contextmanager
def _launched(arguments: list[str], log_file: Path) -> Iterator[Iterator[dict[str, Any]]]:
    """Start the launcher and give what the processes say; when the block is left they end.

    Launcher and ranks hold the reading end of a pipe whose other end this process has alone: they see it die.
    """
    with log_file.open("wb") as log:
        launcher = subprocess.Popen(
            [sys.executable, "-m", "deal_core.training.ranks_launcher", *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=_environment(int(arguments[1])),
            start_new_session=True,  # an interrupt from the keyboard is this process's to handle, at its next step
        )  # fmt: skip
    assert launcher.stdin is not None and launcher.stdout is not None
    # ranks that outlive their launcher would keep standard output open, and this process waiting
    threading.Thread(target=_close_after, args=(launcher, launcher.stdin), daemon=True).start()
    try:
        yield map(json.loads, launcher.stdout)
    finally:
        launcher.stdin.close()
        with launcher.stdout:
            try:
                launcher.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                launcher.kill()


def _close_after(launcher: subprocess.Popen[str], lifeline: IO[str]) -> None:
    launcher.wait()
    with suppress(OSError):
        lifeline.close()


def _environment(num_processes: int) -> dict[str, str]:
    """The ranks find this package wherever the parent found it, and share the CPU's cores."""
    paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // num_processes)),
        "PYTHONWARNINGS": "ignore::FutureWarning",  # of libraries to each other; they would be a rank's last words
        "ACCELERATE_USE_CPU": str(not torch.cuda.is_available()).lower(),
    }


def error_of(failure: Mapping[str, Any], num_processes: int, folder: Path) -> DealError:
    """Return what a rank raised on purpose, or one error that says how it died; `failure` is the launcher's."""
    rank, exitcode, message = failure["rank"], failure["exitcode"], failure["message"]
    kind, _, text = message.partition(": ")
    known = getattr(errors, kind, None)
    if isinstance(known, type) and issubclass(known, DealError):
        return known(f"{text} (rank {rank} of {num_processes})")
    log = next(folder.glob(f"logs/*/attempt_*/{rank}/stderr.log"), folder / "launcher.log")
    killed = f"was killed by {signal.Signals(-exitcode).name}" if exitcode < 0 else f"died with exit code {exitcode}"
    return RankError(
        f"Rank {rank} of the {num_processes} processes that train the adapter {killed}, and the others were ended. Its "
        f"last words: {message or _last_words(log)} Its log: {log}. Started again, the run goes on from its last "
        "checkpoint."
    )


def _last_words(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "none."
