"""Hostile cases, all in one process: what each comes to, the processor time it takes, and the memory of all of them.

A family is a function that yields cases; `run_cases` runs those of any number of families as `deal check` would.
The process is killed at the first case that takes too long, wherever it hangs, and is named in what comes out.
"""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from infra.store.opening import open_store

MAX_SECONDS = 60
"""Of processor time. The slowest cases take what one process may take to read a file, and are refused then."""
MAX_BYTES = 2**30


@dataclass(frozen=True)
class Case:
    """One hostile file or spec."""

    name: str
    """Of the case, for who reads a failure."""
    file: str
    """Name of the file that is validated, taken from the case's own folder."""
    content: bytes | Callable[[], bytes] | None
    """What the file holds, or a function that makes it, as a bomb takes seconds; None where nothing makes it."""
    num_good: int = 0
    """So many good rows it has at least, which must be found."""
    spec: bytes | None = None
    """A spec to validate with."""
    task: str = "t"
    """Name of the task, where there is no spec."""


class Found(NamedTuple):
    """What a case came to."""

    name: str
    error: str | None
    """Kind of the error that was raised, None where none was."""
    is_ours: bool
    """Whether it is one of the project's own, which the commands show in one line."""
    message: str
    num_good: int
    seconds: float
    """Processor time, also of the processes that read the file."""
    peak_bytes: int
    """The largest the process has been so far. What a file takes to be read has a limit of its own."""


def run_cases(cases: Iterable[Case], folder: Path) -> list[Found]:
    """Write the files, validate them one after another in a process of their own, and say what was found.

    Raises:
        AssertionError: the process died; the message names the case.
    """
    lines = []
    for number, case in enumerate(cases):
        place = folder / f"{number:04}"
        place.mkdir()
        if case.content is not None:
            (place / case.file).write_bytes(case.content() if callable(case.content) else case.content)
        if case.spec is not None:
            (place / "spec.yaml").write_bytes(case.spec)
        spec = str(place / "spec.yaml") if case.spec is not None else None
        # as the system gives a command its arguments, whatever bytes a name has
        lines.append(json.dumps([case.name, str(place / case.file), spec, case.task]) + "\n")
    others = {name: value for name, value in os.environ.items() if not name.startswith(("DEAL_", "MLFLOW_"))}
    environment = {**others, "DEAL_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.hostile"],
        input="".join(lines),
        capture_output=True,
        text=True,
        env=environment,
        cwd=Path(__file__).parents[1],
    )
    found = [Found(*json.loads(line)) for line in done.stdout.splitlines()]
    if len(found) < len(lines):
        name = json.loads(lines[len(found)])[0]
        raise AssertionError(
            f"{name}: the process ended with {done.returncode} ({-signal.SIGPROF} is {MAX_SECONDS} s of processor "
            f"time): {done.stderr[-2000:]}"
        )
    return found


def _validate(file: str, spec: str | None, task: str) -> int:
    from deal_pipeline.cli.check import show_validation
    from tasks.validate import spec_to_check, validate

    outcome = validate(
        open_store(), *spec_to_check(open_store(), Path(file), spec=Path(spec) if spec else None, task=task)
    )
    json.dumps(outcome.model_dump(mode="json"), ensure_ascii=False, allow_nan=False)
    show_validation(outcome)
    return outcome.num_train + outcome.num_test


def _run(name: str, file: str, spec: str | None, task: str) -> Found:
    from deal_core.errors import DealError

    error: Exception | None = None
    num_good = 0
    started = _processor_time()
    signal.setitimer(signal.ITIMER_PROF, MAX_SECONDS)
    try:
        num_good = _validate(file, spec, task)
    except Exception as raised:
        error = raised
    signal.setitimer(signal.ITIMER_PROF, 0)
    return Found(
        name,
        type(error).__name__ if error else None,
        isinstance(error, DealError),
        str(error or ""),
        num_good,
        _processor_time() - started,
        _peak_bytes(),
    )


def _processor_time() -> float:
    return time.process_time() + sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])


def _peak_bytes() -> int:
    """Of this program alone: what `getrusage` tells begins with the process that started it."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def main() -> None:
    """Read cases as lines of JSON; write what each came to as soon as that is known."""
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends the process, also where no Python code runs
    resource.setrlimit(resource.RLIMIT_AS, (12 * 2**30, 12 * 2**30))  # what has no bound shall not take the machine
    for line in sys.stdin:
        given: list[Any] = json.loads(line)
        print(json.dumps(_run(*given)), flush=True)


if __name__ == "__main__":
    main()
