"""A training in a child process, for the Python API.

The child exists for two reasons. A training takes memory that a notebook would not get back, and a notebook's stop
must end it at a step, not inside one. And Prefect's embedded API, its signal handlers and its loggers belong to a
process of their own: the caller's stay as they are.

The parent writes the training as one line to the child's standard input, and keeps the pipe open: its end tells the
child that the parent is gone. The child answers with one JSON object a line: a finished stage, a remark, and last the
result or the error.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from importlib import import_module
from typing import TYPE_CHECKING, Any

from deal_core.errors import DealError

if TYPE_CHECKING:
    from deal_pipeline.training import Training
    from infra.settings import Place
    from tasks.progress import Reporter

# With -P, folders of the caller's working folder that are named like the project's packages are not imported.
CHILD = (sys.executable, "-P", "-m", "deal_pipeline.training_child")
NUM_LINES = 20
"""Last lines that a dead child has written, which are kept for the error."""


class TrainingDiedError(DealError):
    """The process of a training has ended without a result."""

    code = "training-died"


def train_in_child(training: Training, place: Place, reporter: Reporter) -> Any:
    """Run a training in a child process to its end, and return its result as plain values.

    An interrupt (Ctrl-C, or a notebook's stop) ends the child at its next step, and a second one at once. The same call
    goes on from there.

    Args:
        training: What is trained.
        place: The variables of the child.
        reporter: Gets every finished stage and every remark.

    Raises:
        DealError: The error of the training, of its own class and with its own code.
        TrainingDiedError: The child has ended without a result.
    """
    child = subprocess.Popen(
        CHILD,
        env=dict(place.variables),
        text=True,
        encoding="utf-8",
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C in a terminal reaches the parent alone, which passes it on
    )
    assert child.stdin is not None and child.stdout is not None and child.stderr is not None
    last_lines: deque[str] = deque(maxlen=NUM_LINES)
    listener = threading.Thread(target=last_lines.extend, args=(child.stderr,), daemon=True)
    listener.start()  # a full pipe would stop the child
    ending: Mapping[str, Any] = {}
    try:
        with suppress(BrokenPipeError):  # it has died, as its end tells
            child.stdin.write(training.model_dump_json() + "\n")
            child.stdin.flush()
        for line in child.stdout:
            message = json.loads(line)
            if "stage" in message:
                reporter.stage_finished(message["stage"], message["seconds"], message["detail"])
            elif "said" in message:
                reporter.said(message["said"])
            else:
                ending = message
        child.wait()
    except BaseException:
        _stop(child)
        raise
    finally:
        for pipe in (child.stdin, child.stdout):
            pipe.close()
        listener.join()
        child.stderr.close()
    if "result" in ending:
        return ending["result"]
    if "error" in ending:
        raise _error_of(**ending["error"])
    lines = "".join(last_lines).strip()
    raise TrainingDiedError(
        f"The process of the training has ended with code {child.returncode}, without a result; the same call goes on "
        f"from the last checkpoint. Its last lines: {lines or 'none'}"
    )


def _stop(child: subprocess.Popen[str]) -> None:
    """End a child at its next step; a second interrupt ends it at once."""
    with suppress(ProcessLookupError):
        child.send_signal(signal.SIGINT)
    try:
        assert child.stdout is not None
        for _ in child.stdout:  # a full pipe would stop it
            pass
        child.wait()
    except KeyboardInterrupt:
        child.kill()
        child.wait()
        raise


def _error_of(module: str, name: str, message: str, code: str) -> DealError:
    """Make the child's error again, whatever arguments its class was made with."""
    kind = getattr(import_module(module), name)
    error: DealError = kind.__new__(kind)
    DealError.__init__(error, message, code=code)
    return error


def _stop_with_parent() -> None:
    """Stop at the next step once the parent is gone."""
    sys.stdin.read()
    os.kill(os.getpid(), signal.SIGINT)


def main() -> None:
    """Run the training that the parent has written, and send the parent its stages, its remarks and its end."""
    pipe, lock = os.fdopen(os.dup(1), "w", encoding="utf-8"), threading.Lock()
    os.dup2(2, 1)  # what a library prints is no message

    def send(**message: Any) -> None:
        with lock, suppress(BrokenPipeError):  # the parent is gone, and the end of its pipe stops the training
            pipe.write(json.dumps(message) + "\n")
            pipe.flush()

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have started the parent with it ignored
    from pydantic import TypeAdapter

    from deal_pipeline.server.embedded import enter_home, explained
    from deal_pipeline.server.flow_run import STOPPED, run_flow
    from deal_pipeline.training import AnyTraining
    from tasks.progress import QuietReporter

    reporter = QuietReporter(
        lambda stage, seconds, detail: send(stage=stage, seconds=seconds, detail=detail),
        lambda message: send(said=message),
    )
    home = None
    try:
        training: Training = TypeAdapter(AnyTraining).validate_json(sys.stdin.readline())
        threading.Thread(target=_stop_with_parent, daemon=True).start()
        home = enter_home(None)
        result = run_flow(training.coroutine, home, reporter, trains=True)
        send(result=TypeAdapter(Any).dump_python(result, mode="json"))
    except KeyboardInterrupt:
        sys.exit(STOPPED)
    except Exception as failure:
        error = explained(failure, home)
        kind = type(error)
        send(error={"module": kind.__module__, "name": kind.__name__, "message": str(error), "code": error.code})


if __name__ == "__main__":
    main()
