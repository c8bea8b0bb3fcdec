"""Run a `deal` command in a process of its own.

The caller's environment, event loop, log handlers and memory stay as they are, so this works in notebooks and servers.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from itertools import takewhile
from typing import IO, Any

COMMAND = (sys.executable, "-P", "-c", "from deal_pipeline.cli.app import main; main()")
"""The command `deal` of this Python environment, whatever PATH says. With -P, folders of the caller's working folder
that are named like the project's packages are not imported."""
REJECTED = 3
"""Exit code of a command whose version the gate has rejected. The command has a result all the same."""
NUM_LINES = 20
"""Lines of a failed command's messages that are kept for the error."""
Show = Callable[[str], None]


class CommandError(Exception):
    """A command has failed; the message says what was found, where, and what to do.

    Attributes:
        exit_code: 2: wrong use, such as a setting that is not valid. 1: another error. 130: stopped.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def run_command(
    arguments: Sequence[str], environment: Mapping[str, str], show: Show | None, stages: set[str] | None = None
) -> Any:
    """Run a command to its end and return its result, as plain values.

    An interrupt (Ctrl-C, or a notebook's stop) stops the command at its next step. The same call then goes on from
    there.

    Args:
        arguments: The command's name and options, without --json.
        environment: Variables in addition to the caller's.
        show: Called with a line for every finished stage and every remark; None: nothing is shown.
        stages: Receives the name of every finished stage, also of a command that fails.

    Raises:
        CommandError: The command has failed, or cannot be started.
    """
    command = Command(arguments, {**environment, "DEAL_STAGES": "1"}, show, stages)
    try:
        written = command.output.read()
        code = command.wait()
    except BaseException:
        end(command.process)
        command.wait()
        raise
    if code not in (0, REJECTED):
        raise command.error("The command has failed.")
    return json.loads(written)


class Command:
    """A command that runs and answers in JSON. Signals of the caller's terminal do not reach it.

    Its messages are one JSON object per line, or a library's text; `show` is called with those of stages and remarks.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        show: Show | None = None,
        stages: set[str] | None = None,
    ) -> None:
        try:
            self.process = subprocess.Popen(
                [*COMMAND, *arguments, "--json"],
                env={**os.environ, **environment},
                text=True,
                encoding="utf-8",
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
        except (OSError, ValueError) as error:  # such as a NUL in an argument, or an argument of a megabyte
            name = " ".join(takewhile(str.isalpha, arguments))
            raise CommandError(f"The command deal {name} cannot be started: {error}.", 1) from None
        assert self.process.stdout is not None and self.process.stderr is not None
        self.output = self.process.stdout
        self._show = show
        self._stages = set[str]() if stages is None else stages
        self._error = ""
        self._lines: deque[str] = deque(maxlen=NUM_LINES)
        self._listener = self.listen_to(self.process.stderr)

    def listen_to(self, stream: IO[str]) -> threading.Thread:
        """Read a stream to its end, in a thread: a full pipe would stop the command."""
        thread = threading.Thread(target=self._listen, args=(stream,), daemon=True)
        thread.start()
        return thread

    def wait(self) -> int:
        """Wait for the command's end, and until all its messages were shown; return its exit code."""
        code = self.process.wait()
        self._listener.join()
        return code

    def error(self, otherwise: str) -> CommandError:
        """Return the error of a command that has ended: its own message, or another one with its last lines."""
        code = self.wait()
        return CommandError(self._error or "\n".join([otherwise, *self._lines]), code)

    def _listen(self, stream: IO[str]) -> None:
        for line in stream:
            try:
                event = json.loads(line)
            except ValueError:
                event = None
            if not isinstance(event, dict):
                self._lines.append(line.rstrip())
                continue
            if "error" in event:
                self._error = str(event["error"])
                continue
            if "stage" in event:
                self._stages.add(event["stage"])
            if self._show is not None:
                with suppress(Exception):  # the command goes on, whatever the caller does with a line
                    self._show(_line(event))


def end(process: subprocess.Popen[str]) -> None:
    """Stop a command at its next step and wait for its end. A second interrupt ends it at once."""
    with suppress(ProcessLookupError):
        process.send_signal(2)
    try:
        process.wait()
    except KeyboardInterrupt:
        process.kill()
        process.wait()
        raise


def _line(event: Mapping[str, Any]) -> str:
    if "stage" in event:
        return f"{event['stage']:<9} {event['seconds']:6.1f} s  {event['detail']}"
    return str(event.get("said", ""))
