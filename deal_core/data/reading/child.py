"""The process that reads a file: `python -m deal_core.data.reading.child [PATH, KIND, TASK]`, a text of JSON.

For the task "count" standard input has the path and the kind of each file that is counted.

A hostile file can end the process that reads it: a few bytes can ask a library for any memory, or end it from C++ where
no Python code can hinder that. So a file is read here, within limits, and `deal_core.data.reading.readers` takes what
is read. Standard output is a sequence of frames: a letter, the length of the content, and the content.

    "+"  nothing; the process has started and is about to open the file
    "J"  JSON: the head of the file, or the number of rows of the next file
    "S"  Arrow's schema of the file, or of the batches that follow
    "R"  JSON: a list of rows
    "A"  Arrow's record batch of some rows of the schema
    "E"  JSON: the sentence that refuses the file, and its code; it is the last frame
    "."  nothing; it is the last frame of a file that was read to its end
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import resource
import signal
import struct
import sys
import time
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from deal_core.data.reading import parsing
from deal_core.errors import DataValidationError

MAX_MEMORY_BYTES = 2**30
"""Memory that a file may take, beyond that of Python and Arrow."""
FREE_CPU_SECONDS, CPU_SECONDS_PER_MB = 25, 2
"""Processor time for a file of any size, and for each of its megabytes. A megabyte of text takes a twentieth of a
second. A megabyte of packed text takes twenty times as long."""
FREE_BYTES, UNPACKED_TIMES = 2**28, 1000
"""A file may have FREE_BYTES bytes of rows, or UNPACKED_TIMES its own size if that is more. A packed Parquet file may
take as many on the disk. The process that takes the rows has no limit of processor time; this limit protects it."""
MAX_FRAME_BYTES = 2**26
"""Largest frame: some rows, or the names of all columns. The process that takes it has no limit of memory."""
HEADER = struct.Struct(">cI")
"""A frame's letter and the length of its content."""
OUT_OF_MEMORY = 3
"""Exit status of a process that found no more memory."""
_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


def main(request: str) -> NoReturn:
    """Write the frames of a task ("head", "rows" or "count"), and end the process."""
    name, kind, task = json.loads(request)
    path = Path(name)
    # A keyboard's and a service's signals are for the process that waits for the frames. When it ends, so does its end
    # of the pipe, and this process with it.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    # Standard output is for frames alone: what a library prints goes to the errors.
    frames = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    status = 0
    try:
        if kind == "parquet":
            import deal_core.data.reading.parquet_rows  # noqa: F401  # what it takes does not count as the file's
        most_bytes = _set_limits(path)
        _send(frames, b"+")
        if task == "head":
            _head(path, kind, frames)
        elif task == "count":
            _count(frames)
        else:
            _rows(path, kind, frames, most_bytes)
        _send(frames, b".")
    except DataValidationError as error:
        _send_json(frames, b"E", [str(error), error.code])
    except MemoryError:
        status = OUT_OF_MEMORY
    except BrokenPipeError:  # nobody reads the frames any more
        status = 1
    os._exit(status)  # without the cleaning up of libraries that a file may have confused


def _set_limits(path: Path) -> int:
    """Limit this process; return the most bytes of rows that the file may have."""
    most_bytes = FREE_BYTES
    taken = math.ceil(time.process_time())  # by the files before
    with contextlib.suppress(OSError, ValueError):  # a file that is not there is refused when it is opened
        size = path.stat().st_size
        most_bytes = max(FREE_BYTES, UNPACKED_TIMES * size)
        _limit(resource.RLIMIT_FSIZE, most_bytes)
        _limit(resource.RLIMIT_CPU, taken + FREE_CPU_SECONDS + CPU_SECONDS_PER_MB * size // 10**6)
    _limit(resource.RLIMIT_CORE, 0)
    with contextlib.suppress(OSError):  # only Linux says what a process takes already
        num_pages = int(Path("/proc/self/statm").read_text().split()[0])
        _limit(resource.RLIMIT_AS, num_pages * resource.getpagesize() + MAX_MEMORY_BYTES)
    return most_bytes


def _limit(kind: int, most: int) -> None:
    hard = resource.getrlimit(kind)[1]
    resource.setrlimit(kind, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def _send(frames: BinaryIO, letter: bytes, content: bytes | memoryview = b"") -> None:
    if len(content) > MAX_FRAME_BYTES:
        raise DataValidationError(
            f"A row, or the columns' names, take more than {MAX_FRAME_BYTES // 2**20} MiB, so the file is not read; "
            "write it with shorter ones."
        )
    for piece in (memoryview(HEADER.pack(letter, len(content))), memoryview(content)):
        while piece:
            piece = piece[frames.write(piece) :]


def _send_json(frames: BinaryIO, letter: bytes, value: Any) -> None:
    _send(frames, letter, _as_json(value))


def _as_json(value: Any) -> bytes:
    # Not as escapes: two lone surrogates next to each other would be read back as one character.
    return _ENCODER.encode(value).encode("utf-8", "surrogatepass")


def _head(path: Path, kind: parsing.Kind, frames: BinaryIO) -> None:
    head = parsing.head(path, kind)
    if head.schema is not None:
        _send(frames, b"S", head.schema.serialize())
    _send_json(frames, b"J", [head.columns, head.examples, head.class_names, head.num_rows])


def _count(frames: BinaryIO) -> None:
    for name, kind in json.load(sys.stdin):
        num_rows = None
        if kind == "parquet":
            import deal_core.data.reading.parquet_rows  # noqa: F401
        _set_limits(Path(name))
        with contextlib.suppress(DataValidationError):
            if kind == "parquet":
                num_rows = parsing.head(Path(name), kind).num_rows
            elif kind is not None:
                num_rows = sum(map(len, parsing.parse(Path(name), kind)))
        _send_json(frames, b"J", num_rows)


def _rows(path: Path, kind: parsing.Kind, frames: BinaryIO, most_bytes: int) -> None:
    has_schema, num_bytes = False, 0
    for batch in parsing.parse(path, kind):
        if isinstance(batch, list):
            rows = [
                [row.number, row.values, row.line, row.fault, row.raw() if row.fault else None, row.doubt]
                for row in batch
            ]
            letter, content = b"R", memoryview(_as_json(rows))
        else:
            if not has_schema:
                _send(frames, b"S", batch.schema.serialize())
                has_schema = True
            letter, content = b"A", memoryview(batch.serialize())
        num_bytes += len(content)
        if num_bytes > most_bytes:
            raise DataValidationError(
                f"{path.name} unpacks to more than {UNPACKED_TIMES} times its size, which text does not. If the file "
                "is right, land it as unpacked JSON lines."
            )
        _send(frames, letter, content)


if __name__ == "__main__":
    main(sys.argv[1])
