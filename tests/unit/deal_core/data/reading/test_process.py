"""A file that ends the process that reads it is refused, and that process has no secret and no life of its own.

The parsers have tests of their own; here files are read as every caller reads them.
"""

from __future__ import annotations

import gzip
import json
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from deal_core.data.answer_files import survey_rows
from deal_core.data.reading import readers
from deal_core.data.reading.readers import read_batches, read_head, read_rows
from deal_core.errors import DataValidationError, ReaderDiedError
from tests.hostile_parquet import ABORTS, odd_columns, repeated
from tests.parsed import parsed_rows

READS: dict[str, Callable[[Path], Any]] = {
    "head": read_head,
    "rows": lambda path: list(read_rows(path)),
    "survey": survey_rows,
}


NUM_LINES = 10_000


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    """A file that is much larger than what a pipe holds."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": f"{number} " + "word " * 100}) + "\n" for number in range(NUM_LINES)))
    return path


def reader() -> psutil.Process:
    """The process that reads a file for this process."""
    (found,) = [each for each in psutil.Process().children() if "deal_core.data.reading.child" in each.cmdline()]
    return found


@pytest.mark.parametrize("read", READS)
def test_a_file_that_ends_its_reader_is_refused_in_one_sentence(read: str) -> None:
    with pytest.raises(ReaderDiedError) as refused:
        READS[read](ABORTS)
    message = str(refused.value)
    assert message.startswith("abort.parquet ended the process that reads it (SIGABRT: ")
    assert message.endswith("write it again.") and message.isprintable() and len(message) < 300


def test_one_process_counts_the_rows_of_files_and_goes_on_after_one_that_ends_it(
    lines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[object] = []
    start = subprocess.Popen

    def note(*arguments: Any, **options: Any) -> Any:
        started.append(arguments)
        return start(*arguments, **options)

    monkeypatch.setattr(readers.subprocess, "Popen", note)
    table, notes, cut = tmp_path / "table.parquet", tmp_path / "notes.txt", tmp_path / "cut.jsonl.gz"
    pq.write_table(pa.table({"text": ["a"] * 7}), table)
    notes.write_text("x")
    cut.write_bytes(gzip.compress(b'{"text": "a"}\n' * 9)[:-9])
    paths = [lines, table, notes, ABORTS, tmp_path / "gone.csv", cut, lines]
    assert [*readers.count_rows(paths)] == [NUM_LINES, 7, None, None, None, None, NUM_LINES]
    assert len(started) == 2


def test_a_file_that_takes_too_much_memory_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"text": repeated("x" * 2**24, [0] * 4000)}), path, compression="zstd")
    assert path.stat().st_size < 10_000
    with pytest.raises(ReaderDiedError, match=r"rows\.parquet needs more memory than a file may take"):
        list(read_rows(path))


@pytest.mark.parametrize("name", odd_columns())
def test_any_type_of_arrow_arrives_as_it_was_read(name: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    try:
        pq.write_table(pa.table({"odd": odd_columns()[name], "text": ["a"] * 40}), path)
    except pa.ArrowException:
        pytest.skip("this version of Arrow does not write it")
    rows = [row for batch in read_batches(path, {"odd"}) for row in batch.rows()]
    wanted = list(parsed_rows(path))
    assert repr([row.values["odd"] for row in rows]) == repr([row.values["odd"] for row in wanted])
    assert repr([row.raw() for row in rows]) == repr([row.raw() for row in wanted])
    assert survey_rows(path).types == dict(zip(["odd", "text"], pq.read_schema(path).types, strict=True))


def test_any_value_of_json_arrives_as_it_was_read(tmp_path: Path) -> None:
    """Two halves of a pair that are no pair in the file do not become one on the way."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(
        b'{"a": "\\ud83d\xff", "b": "\\ud83d\\ude00", "c": 123456789012345678901234567890, "d": NaN, "e": -0.0}\n'
        b'{"a": "\\u0000\\u2028", "b": [1.0, 1, true, null, {"\\ud800": {}}], "c": 1e999}\n'
        b"\xff not JSON\n"
    )
    rows, wanted = list(read_rows(path)), list(parsed_rows(path))
    assert [repr(row.values) for row in rows] == [repr(row.values) for row in wanted]
    assert [row.fault for row in rows] == [row.fault for row in wanted]
    assert [row.raw() for row in rows[2:]] == [row.raw() for row in wanted[2:]] == ["\udcff not JSON"]
    assert rows[0].values["a"] == "\ud83d\udcff"


def test_the_reader_knows_no_secret_and_runs_nothing_of_the_folder(
    tmp_path: Path, lines: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "json.py").write_text("raise SystemExit('the folder was searched for modules')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DEAL_S3_SECRET_ACCESS_KEY", "a-planted-secret")
    batches = read_batches(lines)
    next(batches)
    names = set(reader().environ())
    batches.close()
    assert "PYTHONPATH" in names and not {name for name in names if name.startswith(("DEAL_", "AWS_", "HF_"))}


def test_the_reader_lives_as_long_as_its_iterator_whatever_becomes_of_the_file_or_the_terminal(lines: Path) -> None:
    batches = read_batches(lines)
    num_rows = len(next(batches))
    lines.unlink()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(reader().pid, number)
    assert os.getpgid(reader().pid) != os.getpgrp()
    for _ in range(2):
        num_rows += len(next(batches))
    process = reader()
    assert num_rows + sum(map(len, batches)) == NUM_LINES
    assert process.wait(timeout=60) is None or not process.is_running()


def test_the_reader_ends_with_an_iterator_that_is_closed(lines: Path) -> None:
    batches = read_batches(lines)
    next(batches)
    process = reader()
    batches.close()
    assert process.wait(timeout=60) is None or not process.is_running()


def test_the_reader_ends_when_the_process_dies_that_waits_for_it(lines: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from deal_core.data.reading.readers import read_batches\n"
        "batches = read_batches(Path(sys.argv[1])); next(batches); print('reads', flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(lines)], stdout=subprocess.PIPE, text=True) as waiting:
        assert waiting.stdout is not None and waiting.stdout.readline() == "reads\n"
        (process,) = psutil.Process(waiting.pid).children()
        waiting.kill()
        waiting.wait()
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.05)


def test_names_of_columns_that_fill_the_memory_are_refused(tmp_path: Path) -> None:
    """Who takes the frames has no limit of memory. Packed, these names take 100 kB."""
    path = tmp_path / "rows.jsonl.gz"
    with gzip.open(path, "wt", compresslevel=9) as file:
        for number in range(100):
            file.write(json.dumps({"text": "a", f"{number}" + "k" * 2**20: 1}) + "\n")
    with pytest.raises(DataValidationError, match="more than 64 MiB"):
        read_head(path)


def test_a_cell_outside_of_its_data_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process that reads a file may be confused by it and hand over a part that is damaged."""
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"text": ["one", "two"]}), path)
    batch = pa.RecordBatch.from_pydict({"text": ["one", "two"]})
    offsets, beyond = (struct.pack("<3i", 0, 3, end) for end in (6, 255))
    damaged = bytes(batch.serialize()).replace(offsets, beyond)
    assert damaged != bytes(batch.serialize())
    frames = [(b"S", bytes(batch.schema.serialize())), (b"A", damaged)]
    monkeypatch.setattr(readers, "_read_frames", lambda *_: (frame for frame in frames))
    with pytest.raises(ReaderDiedError, match="has cells outside of its data"):
        list(read_batches(path))
