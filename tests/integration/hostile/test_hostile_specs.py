"""Hostile specs, task files, lineage files and names: each is refused with one plain line, or read without any effect.

Every case runs in this process, under a guard: ten seconds of processor time, 1 GB of memory, no file written outside
the test's folder, nothing on the screen that a terminal acts on.
"""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from typer.testing import CliRunner

from deal_core.errors import ConfigError, DealError
from deal_pipeline.cli.app import app
from deal_pipeline.server.status import _unusable_files
from infra.store.base import ObjectStore
from infra.store.opening import store_at
from tasks.data_files import local_files
from tasks.inbox import look, task_spec
from tasks.lineage.settings import read_lineages
from tasks.spec import AdaptSpec, TaskFieldsError, read_spec
from tests.in_process import put_back

MAX_SECONDS, MAX_BYTES = 10, 2**30
SECRET = "the secret outside"
WRITES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.link", "os.truncate", "shutil.rmtree")
RAW = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
ROWS = "text,label\n" + "".join(f"The parcel number {n} is late,{('late', 'lost')[n % 2]}\n" for n in range(40))

_watched: list[Path] = []
_written: list[str] = []


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watched or event not in (*WRITES, "open"):
        return
    if event == "open":
        mode, flags = arguments[1], arguments[2] or 0
        if not (any(each in mode for each in "wax+") if isinstance(mode, str) else flags & (os.O_WRONLY | os.O_RDWR)):
            return
    name = arguments[1 if event in ("os.symlink", "os.link") else 0]
    path = os.path.abspath(os.fsdecode(name)) if isinstance(name, str | bytes | os.PathLike) else "/dev/null"
    if event in ("os.remove", "os.rmdir") and arguments[1] != -1:  # the name is relative to an open folder
        path = os.path.join(os.readlink(f"/proc/self/fd/{arguments[1]}"), os.fsdecode(name))
    folder, last = os.path.split(path)
    path = os.path.realpath(path) if event == "open" else os.path.join(os.path.realpath(folder), last)
    if path != "/dev/null" and not Path(path).is_relative_to(_watched[0]):
        _written.append(f"{event} {path}")


sys.addaudithook(_note)


class Hung(BaseException):
    """A case that never ends."""


class Place(NamedTuple):
    """The folders of the cases."""

    folder: Path
    store: ObjectStore
    data: Path

    def deal(self, *arguments: str, code: int | None = None) -> str:
        """Call the command; return its output."""
        done = CliRunner().invoke(app, [*arguments, "--home", str(self.folder / "home")])
        assert done.exception is None or isinstance(done.exception, SystemExit), repr(done.exception)
        assert done.exit_code in ((0, 1, 2) if code is None else (code,)), done.output
        shown = str(done.output)
        assert "not expected" not in shown and "Traceback" not in shown, shown
        assert not RAW.search(shown), ascii(shown)
        assert SECRET not in shown and len(shown) < 20_000
        return shown


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """A home, a file of good rows, and a file next to the home that must not be read."""
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "tmp").mkdir()
    (folder / "secret.yaml").write_text(f"instruction: {SECRET}\n")
    (folder / "a.csv").write_text(ROWS)
    before = tempfile.tempdir
    with put_back():
        for name in [name for name in os.environ if name.startswith("DEAL_")]:
            del os.environ[name]
        os.environ["DEAL_HOME"] = str(folder / "home")
        tempfile.tempdir = str(folder / "tmp")
        found = Place(folder, store_at(str(folder / "home" / "store")), folder / "a.csv")
        found.deal("check", str(found.data), code=0)  # imports everything
        yield found
    tempfile.tempdir = before


@pytest.fixture(autouse=True)
def guard(place: Place) -> Iterator[None]:
    """End a case that hangs, and fail a case that uses too much or writes outside its folder."""

    def end(number: int, frame: object) -> None:
        raise Hung

    previous = signal.signal(signal.SIGALRM, end)
    signal.alarm(120)
    _watched[:], _written[:] = [place.folder], []
    started, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        yield
    finally:
        _watched.clear()
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
    assert time.process_time() - started < MAX_SECONDS
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MAX_BYTES
    assert not _written


@contextmanager
def refused(kind: type[DealError] = ConfigError) -> Iterator[None]:
    """Expect an error of this project: one short line without foreign content."""
    with pytest.raises(kind) as caught:
        yield
    message = str(caught.value)
    assert 20 < len(message) < 3000 and "\n" not in message, message
    assert SECRET not in message


# --- every field of a spec with values of other types


def _wrong_values() -> dict[str, tuple[str, str]]:
    """A section and a field with a value of a wrong type. The wrong types take turns."""
    wrong = {
        float: (".nan", ".inf", "-.inf", "true", "'3'", "1:30", "010", "1e999", "[1.0]", "9" * 400, "0x1F"),
        int: ("true", "'3'", "1:30", "010", "1.5", "1.0", ".inf", "9" * 400, "9" * 5000, "0b11", "[1]"),
        bool: ("1", "'true'", "'yes'", "0.0", "null", "[true]"),
        str: ("1", "true", "null", "[none]", '"\\x1b[31m"'),
        tuple: ("1", "q", "{q: 1}", "[null]", "!!set {q}"),
    }
    cases: dict[str, tuple[str, str]] = {}
    turn = 0
    for name, field in AdaptSpec.model_fields.items():
        if is_dataclass(field.default):
            for each in fields(field.default):
                kind = type(each.default) if each.default is not None else float
                if kind not in wrong:  # options of a plug-in, which the plug-in checks
                    continue
                cases[f"{name}.{each.name}"] = (name, f"{{{each.name}: {wrong[kind][turn % len(wrong[kind])]}}}")
                turn += 1
    for name in ("adapter", "deal", "train", "gate", "task", "data"):
        for number, text in enumerate(("3", "[a]", "text")):
            cases[f"{name} {number}"] = (name, text)
    for text in ("true", "1.0", "'1'", "2", "[1]"):
        cases[f"schema_version {text}"] = ("schema_version", text)
    for name in ("lineage", "base_model", "strategy"):
        for text in ("1", "true", "[a]", "{a: b}", "2026", "1e3"):
            cases[f"{name} {text}"] = (name, text)
    return cases


WRONG = _wrong_values()


@pytest.mark.parametrize("case", WRONG)
def test_a_field_takes_no_value_of_another_type(case: str, place: Place) -> None:
    section, value = WRONG[case]
    spec = place.folder / "wrong.yaml"
    task = "" if section == "task" else f"task: {{name: t, data: {place.data}}}\n"
    spec.write_text(f"{task}{section}: {value}\n")
    with refused():
        read_spec(spec)


# --- hostile YAML, in every YAML file

BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 30))
TRAPS: dict[str, bytes] = {
    "billion laughs": BOMB.encode(),
    "billion laughs as labels": f"{BOMB}labels: *a29\n".encode(),
    "merge bomb": (
        "a0: &a0 {x: 1}\n" + "".join(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}\n" for n in range(1, 12))
    ).encode(),
    "alias of itself": b"labels: &a [*a]\n",
    "merge of itself": b"columns: &a\n  <<: *a\n",
    "key twice": b"instruction: a\ninstruction: b\n",
    "key twice within": b"columns: {text: a, text: b}\n",
    "key twice, quoted": b"format: chat\n'format': chat\n",
    "python object": b"instruction: !!python/object/apply:os.system [touch /tmp/owned]\n",
    "python name": b"instruction: !!python/name:os.system ''\n",
    "local tag": b"instruction: !run x\n",
    "set": b"labels: !!set {a, b}\n",
    "binary": b"instruction: !!binary aGVsbG8=\n",
    "number by tag": b"instruction: !!int abc\n",
    "truth by tag": b"instruction: !!bool maybe\n",
    "time by tag": b"instruction: !!timestamp never\n",
    "deep list": b"labels: " + b"[" * 100_000,
    "deep list, closed": b"labels: " + b"[" * 300 + b"]" * 300,
    "deep mapping": b"columns: " + b"{a: " * 50_000,
    "deep block": b"- " * 100_000,
    "deep keys": b"? " * 100_000,
    "many keys": b"".join(b"key%d: 1\n" % n for n in range(6000)),
    "many anchors": b"".join(b"k%d: &a%d x\n" % (n, n) for n in range(6000)),
    "long text": b"instruction: " + b"x" * 2**19,
    "not UTF-8": b"instruction: \xff\xfe\n",
    "UTF-16": "instruction: a\n".encode("utf-16"),
    "raw escape": b"instruction: \x1b[31m\n",
    "raw NUL": b"instruction: a\0b\n",
    "NUL": b'instruction: "a\\0b"\n',
    "lone surrogate": b'labels: ["\\ud800", b]\n',
    "beyond Unicode": b'instruction: "\\UFFFFFFFF"\n',
    "no key": b"? [a, b]\n: c\n",
    "key of a number": b"1: x\n",
    "two documents": b"instruction: a\n---\ninstruction: b\n",
    "a list": b"- instruction\n",
    "a text": b"instruction\n",
    "unclosed": b"labels: [a, b\n",
    "tabs": b"\tinstruction: a\n",
    "unknown alias": b"instruction: *a\n",
    "huge version": b"%YAML " + b"9" * 5000 + b".1\n---\ninstruction: a\n",
    "huge number": b"instruction: " + b"9" * 5000 + b"\n",
    "huge hexadecimal number": b"labels: 0x" + b"f" * 5000 + b"\n",
    "JSON of the wrong kind": b'[{"instruction": "a"}]',
    "not YAML": bytes(range(256)),
    "gzip": b"\x1f\x8b\x08\0\0\0\0\0\0\3",
    "unknown keys": b"".join(b"no_such_key_%d: 1\n" % n for n in range(500)),
    "escape in a key": b'"\\x1b[31m[red]key": 1\n',
    "right to left in a key": '"\u202eyek": 1\n'.encode(),
}


@pytest.mark.parametrize("case", TRAPS)
def test_yaml_that_is_a_trap_is_refused_wherever_it_is_read(case: str, place: Place) -> None:
    spec = place.folder / "trap.yaml"
    spec.write_bytes(TRAPS[case])
    place.deal("check", str(place.data), "--spec", str(spec), code=2)
    place.store.put_bytes("inbox/trap/task.yaml", TRAPS[case])
    place.store.put_bytes("inbox/trap/a.csv", ROWS.encode())
    assert [info.key for info in look(place.store).arrivals] == ["inbox/trap/a.csv"]
    with refused(TaskFieldsError):
        task_spec(place.store, "inbox/trap/a.csv")
    place.store.put_bytes("lineages/trap.yaml", TRAPS[case])
    assert "trap" in read_lineages(place.store).problems
    place.store.delete("inbox")
    place.store.delete("lineages")


# --- other things in the place of a file


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


STANDS: dict[str, Callable[[Path], object]] = {
    "FIFO": _fifo,
    "socket": _socket,
    "endless device": lambda path: path.symlink_to("/dev/zero"),
    "terminal": lambda path: path.symlink_to("/dev/tty"),
    "folder": lambda path: path.mkdir(),
    "link to itself": lambda path: path.symlink_to(path.name),
    "link to nothing": lambda path: path.symlink_to("nothing"),
    "link upwards": lambda path: path.symlink_to(os.path.relpath(path.parents[4] / "secret.yaml", path.parent)),
    "link to the whole machine": lambda path: path.symlink_to("/etc/passwd"),
    "terabyte": lambda path: os.truncate(os.open(path, os.O_CREAT | os.O_WRONLY), 2**40),
}


@pytest.mark.parametrize("case", STANDS)
@pytest.mark.parametrize("name", ["task.yaml", "b.csv"])
def test_what_stands_in_a_files_place_holds_nobody_up(case: str, name: str, place: Place) -> None:
    place.store.put_bytes("inbox/t/a.csv", ROWS.encode())
    path = place.folder / "home" / "store" / "inbox" / "t" / name
    STANDS[case](path)
    is_nothing, is_file = case in ("folder", "link to nothing"), case == "terabyte"
    try:
        inbox = look(place.store)
        lands = ["inbox/t/b.csv"] if is_file and name == "b.csv" else []
        assert [info.key for info in inbox.arrivals] == ["inbox/t/a.csv", *lands]
        assert (name in " ".join(_unusable_files(place.store, inbox))) == (not is_nothing and not is_file)
        with refused(TaskFieldsError) if name == "task.yaml" and not is_nothing else nullcontext():
            assert task_spec(place.store, "inbox/t/a.csv").instruction is None
        if name == "b.csv" and not is_file:
            place.deal("check", str(place.data), "--test-data", place.store.uri_of("inbox/t/b.csv"), code=1)
        if not (name == "b.csv" and is_file) and "link" not in case:  # a person may name any regular file
            place.deal("check", str(place.data), "--test-data", str(path), code=1)
            place.deal("check", str(place.data), "--spec", str(path), code=2)
    finally:
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
        place.store.delete("inbox")


# --- names

NAMES = (
    "",
    " ",
    ".",
    "..",
    "../x",
    "../../../etc/passwd",
    "/etc/passwd",
    "a/b",
    "a\\b",
    "a/../b",
    "-rf",
    ".hidden",
    "a b",
    "a\nb",
    "a\tb",
    "a\0b",
    "a\x1b[31mb",
    "\x9b31m",
    "a\u202eb",
    "a\u2066b",
    "a\u200bb",
    "\xe9",
    "e\u0301",
    "\ufb01",
    "\uff41",
    "\u0430",
    "\u6771\u4eac",
    "\U0001f469\u200d\U0001f680",
    "a" * 65,
    "a" * 5000,
    "~",
    "~root",
    "$HOME",
    "$(touch x)",
    "`x`",
    "a;b",
    "a|b",
    "a&b",
    "a%00b",
    "a:b",
    "con:",
    "[red]a",
    "{name}",
    "%s",
    "'",
    '"',
    "a\r",
    "\ud800",
    "*",
    "?",
    "#",
    "null\x7f",
    "s3://bucket",
    "file:///etc",
    "@a",
)


@pytest.mark.parametrize("name", NAMES, ids=lambda name: ascii(name)[:30])
def test_a_name_that_could_do_anything_is_refused(name: str, place: Place) -> None:
    asks_command = NAMES.index(name) % 4 == 0 and "\0" not in name and "\ud800" not in name  # no shell passes them
    if asks_command:
        place.deal("check", str(place.data), f"--task={name}", code=2)
        place.deal("check", str(place.data), f"--lineage={name}", code=2)
    spec = place.folder / "names.yaml"
    for values in (
        {"task": {"name": name, "data": "a.csv"}},
        {"lineage": name, "task": {"name": "t", "data": "a.csv"}},
    ):
        spec.write_text(yaml.safe_dump(values), encoding="utf-8")
        with refused():
            read_spec(spec)
    spec.write_text(yaml.safe_dump({"lineage": name}), encoding="utf-8")
    if asks_command:
        place.deal("lineage", "apply", str(spec), code=2)
    assert not list(place.store.list("lineages"))


LABELS = (
    "\x1b[31mred",
    "\x1b]0;title\x07",
    "\x9b2J",
    "\u202eabc",
    "\u2066abc",
    "[red]x",
    "[/]",
    "[link=http://x]x[/link]",
    "\\[x",
    "a\x00b",
    "x" * 5000,
    "\r",
    "{text}",
    "%s",
    "\u200f",
    "\u2028",
    "\x7f",
    "\x08\x08\x08late",
    ":smiley:",
)


@pytest.mark.parametrize("label", LABELS, ids=lambda label: ascii(label)[:30])
def test_a_label_is_shown_and_does_nothing(label: str, place: Place) -> None:
    rows = place.folder / "labels.jsonl"
    rows.write_text("".join(json.dumps({"text": f"t {n}", "label": (label, "lost")[n % 2]}) + "\n" for n in range(40)))
    shown = place.deal("check", str(rows))
    plain = " ".join(shown.split())
    assert "lost" in plain or "bad" in plain
    for markup in ("[red]x", "[/]", "[link=http://x]x[/link]", ":smiley:"):
        assert label != markup or markup in plain
    place.deal("check", str(rows), "--json")
    spec = place.folder / "labels.yaml"
    spec.write_text(yaml.safe_dump({"task": {"name": "t", "data": "labels.jsonl", "labels": [label, "lost", "LOST"]}}))
    place.deal("check", str(rows), "--spec", str(spec), code=2)


def test_many_labels_are_counted_rather_than_shown(place: Place) -> None:
    spec = place.folder / "many.yaml"
    labels = ["late", "lost", *(f"label number {n}" for n in range(5000))]
    spec.write_text(yaml.safe_dump({"task": {"name": "t", "data": "a.csv", "labels": labels}}))
    shown = place.deal("check", str(place.data), "--spec", str(spec))
    assert "label number 17 and 4982 more" in " ".join(shown.split()) and len(shown) < 2500


FILES = (
    "\x1b[31mred.csv",
    "a\nb.csv",
    "a\tb.csv",
    "\u202evsc.csv",
    "[red]a.csv",
    "[b].csv",
    "-a.csv",
    "a;b.csv",
    "$(x).csv",
    "\xe9.csv",
    "e\u0301.csv",
    "\u6771.csv",
    "..csv",
    " .csv",
    "x" * 240 + ".csv",
    "%s.csv",
    "\x9b31m.csv",
    "a.csv\r",
)


@pytest.mark.parametrize("name", FILES, ids=lambda name: ascii(name)[:30])
def test_a_files_name_is_shown_and_does_nothing(name: str, place: Place) -> None:
    folder = place.folder / "files"
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(ROWS)
    place.deal("check", str(folder / name))
    place.deal("check", f"{folder / name}.missing", code=1)
    place.deal("check", str(place.data), "--spec", str(folder / name), code=2)
    landed = place.folder / "home" / "store" / "inbox" / "t" / name
    landed.parent.mkdir(parents=True, exist_ok=True)
    landed.write_text(ROWS)
    inbox = look(place.store)
    assert len(inbox.arrivals) + len(_unusable_files(place.store, inbox)) + name.startswith(".") == 1
    for info in inbox.arrivals:
        assert task_spec(place.store, info.key).name == "t"
        with local_files(place.store, place.store.uri_of(info.key)) as ((path, _),):
            assert path.is_file()
    place.deal("lineage", "list", code=0)
    landed.unlink()


ADDRESSES = (
    "a\0b",
    "~nobody-of-this-name/x.csv",
    "x" * 5000,
    "x/" * 3000,
    "/dev/zero",
    "/dev/stdin",
    "/proc/self/mem",
    "/",
    ".",
    "",
    "file:///dev/zero",
    "file://host/x.csv",
    "s3://bucket/x.csv",
    "http://127.0.0.1:1/x.csv",
    "://",
    "\ud800.csv",
    "file:///%00",
    "../../../../../../../../etc/shadow.csv",
    "a.csv/b.csv",
)


@pytest.mark.parametrize("address", ADDRESSES, ids=lambda address: ascii(address)[:30])
@pytest.mark.parametrize("field", ["test_data", "base_model"])
def test_an_address_of_no_file_is_refused(address: str, field: str, place: Place) -> None:
    task = {"name": "t", "data": "a.csv"}
    values = {"task": {**task, field: address}} if field == "test_data" else {"task": task, field: address}
    spec = place.folder / "address.yaml"
    spec.write_text(yaml.safe_dump(values), encoding="utf-8")
    if field == "test_data" and address != "":
        assert place.deal("check", str(place.data), "--spec", str(spec))
    else:
        with refused() if "\0" in address or "\ud800" in address else nullcontext():
            read_spec(spec)
