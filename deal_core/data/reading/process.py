"""Start the process that reads a file, and take its frames; see `deal_core.data.reading.child`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import IO, Literal, NamedTuple

import deal_core
from deal_core.data.reading.frames import HEADER, MAX_FRAME_BYTES, OUT_OF_MEMORY, as_json, from_json
from deal_core.data.reading.parsing import Kind
from deal_core.errors import DataValidationError, DealError, ReaderDiedError
from deal_core.safe_text import shorten

_PASSED_ON = ("PATH", "TMPDIR", "LD_LIBRARY_PATH", "PYTHONHOME", "LANG", "LC_ALL")
"""Variables of the environment that the process needs to start. All others stay here, and secrets with them."""
_SETTINGS = {
    "ARROW_DEFAULT_MEMORY_POOL": "system",  # the others reserve much more than a file needs
    "MALLOC_ARENA_MAX": "1",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "PYTHONDONTWRITEBYTECODE": "1",
}
_LAST_WORDS_BYTES = 4096
_PIPE_BYTES = 2**20


class Frame(NamedTuple):
    """A letter and some content."""

    letter: bytes
    content: bytes


def read_frames(path: Path, kind: Kind, task: Literal["look", "rows", "most"]) -> Generator[Frame]:
    """The frames of a file. The process ends with the iterator.

    Raises:
        DataValidationError: The process refuses the file.
        ReaderDiedError: The file ended the process.
        DealError: The process cannot be started.
    """
    request = as_json({"path": str(path), "kind": kind, "task": task}).decode()
    with tempfile.TemporaryFile() as words, _started(request, words) as process:
        try:
            yield from _frames_of(process, path, words)
        finally:
            process.kill()


def _started(request: str, words: IO[bytes]) -> subprocess.Popen[bytes]:
    # The path of this package comes first: the process has to be of the same version.
    root = str(Path(deal_core.__file__).parents[1])
    inherited = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    try:
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "deal_core.data.reading.child", request],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=words,
            env={**inherited, **_SETTINGS, "PYTHONPATH": root},
            process_group=0,  # a keyboard interrupt is for this process alone
            pipesize=_PIPE_BYTES,
        )
    except OSError as error:
        raise DealError(f"The process that reads files cannot be started ({error.strerror}); try again.") from error


def _frames_of(process: subprocess.Popen[bytes], path: Path, words: IO[bytes]) -> Iterator[Frame]:
    assert process.stdout is not None
    has_started = False
    while True:
        header = process.stdout.read(HEADER.size)
        letter, length = HEADER.unpack(header) if len(header) == HEADER.size else (b"", 0)
        content = process.stdout.read(length) if length <= MAX_FRAME_BYTES else b""
        if not letter or len(content) < length:
            process.stdout.close()
            raise _death(process.wait(), path, words, has_started)
        if letter == b"E":
            raise DataValidationError(str(from_json(content)))
        if letter == b".":
            return
        if letter == b"+":
            has_started = True
        else:
            yield Frame(letter, content)


def _death(status: int, path: Path, words: IO[bytes], has_started: bool) -> DealError:
    """The error of a process that ended before the end of its file."""
    size = words.seek(0, os.SEEK_END)
    words.seek(max(0, size - _LAST_WORDS_BYTES))
    lines = words.read().decode("utf-8", "replace").strip().splitlines()
    last = shorten(lines[-1].removeprefix("  what():").strip(), 160) if lines else ""
    if not has_started:
        return DealError(f"The process that reads files does not start ({last or status}); install deal again.")
    if status == OUT_OF_MEMORY or "bad_alloc" in " ".join(lines):
        return ReaderDiedError(
            f"{path.name} needs more memory than a file may take, so it is not read; write it with smaller row groups, "
            "or as JSON lines."
        )
    if status == -signal.SIGXCPU:
        return ReaderDiedError(
            f"{path.name} takes more processor time than a file of its size needs, so it is not read on; write it "
            "again as JSON lines without compression."
        )
    how = signal.Signals(-status).name if status < 0 else f"exit status {status}"
    return ReaderDiedError(
        f"{path.name} ended the process that reads it ({how}{': ' if last else ''}{last}), so it is damaged or was "
        "made to do harm; write it again."
    )
