"""Only regular files are read, and a FIFO, socket or device in a file's place does not block a reader."""

from __future__ import annotations

import gzip
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from deal_core.data.reading.lines import open_bytes, sha256_of_input
from deal_core.data.reading.readers import read_head
from deal_core.errors import DataValidationError
from deal_core.regular_file import IrregularFileError, complete_file, open_regular, read_start


@pytest.fixture(autouse=True)
def alarm() -> Iterator[None]:
    """A reader that waits is stopped, and its test fails."""

    def end(number: int, frame: object) -> None:
        raise AssertionError("it hangs")

    previous = signal.signal(signal.SIGALRM, end)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)


def make(kind: str, path: Path) -> Path:
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))
    elif kind == "device":
        path.symlink_to("/dev/zero")
    return path


@pytest.mark.parametrize("kind", ["FIFO", "socket", "device"])
def test_what_is_no_regular_file_is_refused_at_once(kind: str, tmp_path: Path) -> None:
    path = make(kind, tmp_path / "a.csv")
    with pytest.raises(IrregularFileError, match=f"it is a {kind}, and only regular files are read"):
        open_regular(path)
    for read in (open_bytes, sha256_of_input, read_head):
        with pytest.raises(DataValidationError, match=f"it is a {kind}"):
            read(path)


def test_a_fifo_that_takes_the_files_place_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make("FIFO", tmp_path / "a.csv")
    regular = os.stat(__file__)
    monkeypatch.setattr(os, "stat", lambda *_, **__: regular)  # as it was a moment ago
    with pytest.raises(IrregularFileError):
        open_regular(path)


def test_a_link_to_a_regular_file_is_read_and_only_its_start_where_asked(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abcdef")
    (tmp_path / "b").symlink_to("a")
    assert read_start(tmp_path / "b", 3) == b"abc"
    assert read_start(tmp_path / "b", 9) == b"abcdef"


def test_packed_files_leave_none_open(tmp_path: Path) -> None:
    path = tmp_path / "a.csv.gz"
    path.write_bytes(gzip.compress(b"text,label\n"))
    before = len(os.listdir("/proc/self/fd"))
    with open_bytes(path) as file:
        assert file.read() == b"text,label\n"
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "new" / "file"
    for error in (None, ValueError):
        with suppress(ValueError), complete_file(target) as part:
            part.write_text(f"{error}")
            if error is not None:
                raise error
    assert target.read_text() == "None" and [each.name for each in target.parent.iterdir()] == ["file"]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(IsADirectoryError), complete_file(Path(".")) as part:
        part.touch()
    assert [each.name for each in tmp_path.iterdir()] == ["new"]


def test_the_content_is_on_the_disk_before_the_name_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    replace = os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: done.append("flushed"))
    monkeypatch.setattr(os, "replace", lambda *paths: (done.append("named"), replace(*paths)))
    with complete_file(tmp_path / "a") as part:
        part.write_text("x")
    assert done == ["flushed", "named"]
