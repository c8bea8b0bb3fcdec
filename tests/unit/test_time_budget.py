"""`make nightly` ends in time and says what it left out."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.time_budget import STACKS

ROOT = Path(__file__).parents[2]
STACK_TESTS = ["test_longer"] * len(STACKS) + ["test_shorter"] * len(STACKS)
IN_PROCESSES = ("--numprocesses=2", "--no-loadscope-reorder")
TESTS = """
import time

import pytest

@pytest.mark.nightly(minutes=300)
def test_long():
    pass

def test_short():
    pass

def test_without_its_program():
    pytest.skip("there is no such program")
"""
AN_HOUR_LATER = """
def test_that_takes_an_hour(monkeypatch):
    now = time.time()
    time.time = lambda: now + 3600

def test_thereafter():
    pass
"""
FAILS = """
def test_that_fails():
    assert False
"""
OF_A_STACK = """
import os, time

import pytest

def note_process():
    time.sleep(0.2)
    with open("processes", "a") as file:
        print(os.environ.get("PYTEST_XDIST_WORKER"), file=file)

@pytest.mark.nightly(minutes=2)
def test_shorter():
    note_process()

@pytest.mark.nightly(minutes=3)
def test_longer():
    note_process()
"""


def run(folder: Path, tests: str, *arguments: str) -> tuple[int, list[str], list[str]]:
    """Run tests in a process of their own: the exit code, the tests that ran, and what was said to be left out."""
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = nightly\n")
    (folder / "test_it.py").write_text(tests)
    for name in STACKS:
        (folder / name).write_text(OF_A_STACK)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-v", "-p", "xdist", "-p", "tests.time_budget", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    during, _, after = done.stdout.partition("tests that were left out: ")
    ran = re.findall(r"test_\w+\.py::(\w+)\S* (?:PASSED|FAILED)", during)
    ran += re.findall(r"(?:PASSED|FAILED) test_\w+\.py::(\w+)", during)
    said = after.splitlines() or [done.stdout + done.stderr]
    return done.returncode, ran, [said[0].rstrip(" ="), *(line for line in said[1:] if line.startswith("test_it"))]


def test_stacks_come_first_then_short_tests_and_what_would_not_end_in_time_is_named(tmp_path: Path) -> None:
    code, ran, said = run(tmp_path, TESTS + AN_HOUR_LATER, "--minutes=30")
    assert (code, ran) == (0, [*STACK_TESTS, "test_short", "test_that_takes_an_hour"])
    count, long, thereafter, without = said
    assert count == "3" and re.fullmatch(r"test_it\.py::test_long: it may take 300 min, and 0\.0 were left", long)
    assert thereafter == "test_it.py::test_thereafter: it may take 1 min, and 0.0 were left"
    assert without == "test_it.py::test_without_its_program: there is no such program"


def test_several_processes_leave_out_and_say_the_same_and_a_failure_fails_the_run(tmp_path: Path) -> None:
    code, ran, said = run(tmp_path, TESTS + FAILS, "--minutes=200", *IN_PROCESSES)
    assert (code, sorted(ran)) == (1, sorted([*STACK_TESTS, "test_short", "test_that_fails"]))
    assert said[0] == "2"
    processes = (tmp_path / "processes").read_text().split()
    assert len(processes) == len(STACK_TESTS) and len({*processes}) == 1, "one process takes all stacks"
    assert re.fullmatch(r"test_it\.py::test_long: it may take 300 min, and (1\d\d\.\d|200\.0) were left", said[1])


def test_without_the_option_everything_runs_in_its_place(tmp_path: Path) -> None:
    code, ran, said = run(tmp_path, TESTS)
    num_before = sum(name < "test_it.py" for name in STACKS)
    before, after = (["test_shorter", "test_longer"] * number for number in (num_before, len(STACKS) - num_before))
    assert (code, ran) == (0, [*before, "test_long", "test_short", *after])
    assert "left out" not in said[0]
