"""The process that reads one file: `python -m deal_core.data.reading.child REQUEST`.

A hostile file can end the process that reads it: a few bytes can ask a library for any memory, or end it from C++ where
no Python code can hinder that. So a file is read here, within limits, and `deal_core.data.reading.process` takes what
is read. Standard output is a sequence of frames: a letter, the length of the content, and the content.

    "+"  nothing; the process has started and is about to open the file
    "L"  JSON: a look at the file
    "S"  Arrow's schema of the file, or of the parts that follow
    "R"  JSON: a list of rows
    "A"  Arrow's record batch of some rows of the schema
    "N"  JSON: a number of rows that the file does not exceed
    "E"  JSON: the sentence that refuses the file; it is the last frame
    "."  nothing; it is the last frame of a file that was read to its end

The content is data in every case: nothing of it can be run, and the other side checks all of it.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn

from deal_core.data.reading import parsing
from deal_core.data.reading.frames import HEADER, OUT_OF_MEMORY, as_json
from deal_core.data.reading.lines import UNPACKED_TIMES
from deal_core.data.rows import RawRow
from deal_core.errors import DataValidationError

if TYPE_CHECKING:
    import pyarrow as pa

MAX_MEMORY_BYTES = 2**30
"""Memory that a file may take, beyond that of Python and Arrow."""
FREE_CPU_SECONDS, CPU_SECONDS_PER_MB = 25, 2
"""Processor time for a file of any size, and for each of its megabytes. A megabyte of text takes a twentieth of a
second, a packed one of text twenty times as long."""


def main(request: str) -> NoReturn:
    """Do what the request asks, write the frames, and end the process."""
    frames = _only_frames()
    values = json.loads(request)
    path, kind, task = Path(values["path"]), values["kind"], values["task"]
    status = 0
    try:
        if kind == "parquet":
            import deal_core.data.reading.parquet_rows  # noqa: F401  # what it takes does not count as the file's
        _set_limits(path, kind)
        _send(frames, b"+")
        {"look": _look, "rows": _rows, "most": _most}[task](path, kind, frames)
        _send(frames, b".")
    except DataValidationError as error:
        _send(frames, b"E", as_json(str(error)))
    except MemoryError:
        status = OUT_OF_MEMORY
    except BrokenPipeError:  # nobody reads the frames any more
        status = 1
    os._exit(status)  # without the cleaning up of libraries that a file may have confused


def _only_frames() -> BinaryIO:
    """Standard output for frames alone: what a library prints goes to the errors.

    A keyboard's and a service's signals are for the process that waits for the frames. When it ends, so does its end
    of the pipe, and this process with it.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    frames = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    return frames


def _set_limits(path: Path, kind: parsing.Kind) -> None:
    with contextlib.suppress(OSError, ValueError):  # a file that is not there is refused when it is opened
        size = path.stat().st_size
        _limit(resource.RLIMIT_FSIZE, max(parsing.FREE_BYTES, UNPACKED_TIMES[kind] * size))
        _limit(resource.RLIMIT_CPU, FREE_CPU_SECONDS + CPU_SECONDS_PER_MB * size // 10**6)
    _limit(resource.RLIMIT_CORE, 0)
    with contextlib.suppress(OSError):  # only Linux says what a process takes already
        num_pages = int(Path("/proc/self/statm").read_text().split()[0])
        _limit(resource.RLIMIT_AS, num_pages * resource.getpagesize() + MAX_MEMORY_BYTES)


def _limit(kind: int, most: int) -> None:
    hard = resource.getrlimit(kind)[1]
    resource.setrlimit(kind, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def _send(frames: BinaryIO, letter: bytes, content: bytes | memoryview = b"") -> None:
    for piece in (memoryview(HEADER.pack(letter, len(content))), memoryview(content)):
        while piece:
            piece = piece[frames.write(piece) :]


def _look(path: Path, kind: parsing.Kind, frames: BinaryIO) -> None:
    found = parsing.look(path, kind)
    if found.schema is not None:
        _send(frames, b"S", found.schema.serialize())
    values = [found.columns, found.examples, found.class_names, found.num_rows]
    _send(frames, b"L", as_json(values))


def _rows(path: Path, kind: parsing.Kind, frames: BinaryIO) -> None:
    schema: pa.Schema | None = None
    for part in parsing.parse(path, kind):
        if isinstance(part, list):
            _send(frames, b"R", as_json([_plain(row) for row in part]))
            continue
        if schema is None:
            schema = part.schema
            _send(frames, b"S", schema.serialize())
        _send(frames, b"A", part.serialize())


def _plain(row: RawRow) -> list[Any]:
    return [row.number, row.values, row.line, row.fault, None if row.whole is None else row.whole()]


def _most(path: Path, kind: parsing.Kind, frames: BinaryIO) -> None:
    _send(frames, b"N", as_json(parsing.most_rows(path, kind)))


if __name__ == "__main__":
    main(sys.argv[1])
