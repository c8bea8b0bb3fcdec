"""Starts the processes of a job on this machine, reads their progress, and ends them with this process.

A launcher starts the ranks, each `python -m deal_core.training.main JOB`: PyTorch's elastic agent, which `python -m
deal_core.training.elastic` runs, or a command such as torchrun. Rank 0 appends its progress and its result to a file
beside the job's. Launcher and ranks hold the reading end of a pipe, and only this process the writing end: they notice
its death. The ranks begin after the launcher has imported this module, so it imports no jobs.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from deal_core import errors
from deal_core.errors import ConfigError, DealError, RankError

if TYPE_CHECKING:
    from deal_core.training.jobs import AnswerJob, Send, TrainingJob

PROGRESS_FILE = "progress.jsonl"
"""Beside a job's file: a JSON object a line, the figures of each step or the numbers of answered rows. The last line is
the result, or an error of this project that a rank raised."""
LIFELINE = "--end-with-input"
"""Option of a process: it ends when its standard input ends."""
READ_SECONDS = 0.02
"""Time between two looks at the progress."""
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
        started = [sys.executable, "-m", __name__, str(job.num_processes), str(folder / "job.json")]
    else:
        started = [*command, "-m", "deal_core.training.main", str(folder / "job.json"), LIFELINE]
    return run_launcher(started, job, folder, on_message)


def run_launcher(
    command: Sequence[str], job: TrainingJob | AnswerJob, folder: Path, on_message: Send = lambda _: None
) -> Any:
    """Run a command that does a job, as `run_in_processes` does; `folder` has its progress and its log."""
    from deal_core.training.jobs import read_result

    result, last_step = None, 0
    with _launched(command, job.num_processes, folder) as messages:
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
def _launched(command: Sequence[str], num_processes: int, folder: Path) -> Iterator[Iterator[dict[str, Any]]]:
    """Start the launcher and yield the progress of its ranks. At the end of the block the processes end."""
    # the processes import this same package and divide the CPU's cores
    paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // num_processes)),
        "PYTHONWARNINGS": "ignore::FutureWarning",  # else a library's warning may be the last line of a rank's log
    }
    (folder / PROGRESS_FILE).touch()
    with (folder / "launcher.log").open("wb") as log:
        launcher = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,  # only this process handles a keyboard interrupt, at its next step
        )
    assert launcher.stdin is not None
    try:
        yield _progress(folder / PROGRESS_FILE, launcher)
    finally:
        launcher.stdin.close()
        try:
            launcher.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            launcher.kill()


def _progress(file: Path, launcher: subprocess.Popen[bytes]) -> Iterator[dict[str, Any]]:
    """Yield the lines of a file as they are appended, until the launcher has ended."""
    line = ""
    with file.open(encoding="utf-8") as stream:
        while True:
            has_ended = launcher.poll() is not None  # asked first, so that what was written before the end is read
            while part := stream.readline():
                line += part
                if line.endswith("\n"):  # else the rest is still being written
                    yield json.loads(line)
                    line = ""
            if has_ended:
                return
            time.sleep(READ_SECONDS)


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


@contextmanager
def appending(file: Path) -> Iterator[Send]:
    """Yield what appends messages to the file of the progress. An error of this project that ends the block is one."""
    with file.open("a", encoding="utf-8") as stream:

        def send(message: Mapping[str, Any]) -> None:
            stream.write(json.dumps(message) + "\n")
            stream.flush()

        try:
            yield send
        except DealError as error:
            send(failure_of(error))
            raise


def failure_of(error: DealError) -> dict[str, Any]:
    """The message about an error that this process raised on purpose."""
    return {"failure": {"rank": int(os.environ.get("RANK", 0)), "message": f"{type(error).__name__}: {error}"}}


def end_with_input() -> None:
    """End this process at once when the other end of standard input closes.

    The kernel closes the pipes of a killed process; a killed process gives no other sign.
    """

    def wait() -> None:
        while os.read(0, 1):
            pass
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def launch(num_processes: int, job_file: Path) -> None:
    """Run the ranks of a job by PyTorch's elastic agent, which ends all of them when one has died."""
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_processes,
        run_id="ranks",
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",  # a port that is free
        local_addr="127.0.0.1",
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(log_dir=str(job_file.parent / "logs"), redirects=Std.ALL),
    )
    try:
        elastic_launch(config, sys.executable)("-m", "deal_core.training.main", str(job_file), LIFELINE)
    except ChildFailedError as error:
        with appending(job_file.with_name(PROGRESS_FILE)) as send:
            send({"failure": describe(error.failures)})
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
    launch(int(sys.argv[1]), Path(sys.argv[2]))
