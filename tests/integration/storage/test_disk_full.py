"""A full disk during an adaptation: one message, no incomplete version, and the next run continues."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.tiny_base import NO_LIMITS
from tests.adapting import BANK
from tests.printed import require_described


def spec_of(folder: Path, base: Path, **changes: Any) -> Path:
    path = folder / "spec.json"  # JSON is YAML
    train = {"max_steps": 2, "max_prompt_tokens": 192, "max_answer_tokens": 12, "checkpoint_steps": 1}
    path.write_text(json.dumps({"base_model": str(base), "task": BANK, "gate": NO_LIMITS, "train": train, **changes}))
    return path


COMMANDS = """
import io, json, os, shutil, subprocess, sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from deal_pipeline.cli.app import app

given = json.load(sys.stdin)
place = Path(given["place"])

def size(text):
    subprocess.run(["mount", "-o", f"remount,size={text}", str(place)], check=True)

def deal(*words):
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = app([*words, "--json"], standalone_mode=False)
    return {"code": code or 0, "out": out.getvalue(), "err": err.getvalue()}

subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(place)], check=True)
"""
FILL = (
    COMMANDS
    + """
for name, (variables, kilobytes) in given["cases"].items():
    os.environ.update(variables)
    lineage = ["--lineage", name]
    size(f"{kilobytes}k")
    full = deal("adapt", given["spec"], *lineage)
    size("64m")
    before = deal("version", "list", *lineage)
    again = deal("adapt", given["spec"], *lineage)
    versions, page = deal("version", "list", *lineage), deal("version", "show", "1", "--report", *lineage)
    print(json.dumps([name, full, before, again, versions, page]), flush=True)
    for variable in variables:
        del os.environ[variable]
    for path in place.iterdir():
        subprocess.run(["rm", "-rf", str(path)], check=True)
"""
)


def namespace() -> list[str]:
    """The prefix of a command with its own mounts. If the machine does not allow mounts, the test is skipped."""
    for words in (["unshare", "--mount"], ["unshare", "--user", "--map-root-user", "--mount"]):
        if shutil.which("unshare"):
            probe = [*words, "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
            if subprocess.run(probe, capture_output=True, check=False).returncode == 0:
                return words
    pytest.skip("this machine allows no mounts of one's own")


def on_small_disk(script: str, given: dict[str, Any]) -> list[Any]:
    """Run a script with mounts of its own; return what it prints, a JSON value a line."""
    done = subprocess.run(
        [*namespace(), sys.executable, "-c", script],
        input=json.dumps(given),
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ},
    )
    assert done.returncode == 0 and not done.stderr, done.stderr + done.stdout
    return [json.loads(line) for line in done.stdout.splitlines()]


AT_ZERO = (
    COMMANDS
    + """
home = place / "home"
shutil.copytree(given["home"], home)
shutil.rmtree(home / "logs", ignore_errors=True)
(home / "tmp" / "dead").mkdir(parents=True)
(home / "tmp" / "dead" / ".lock").touch()

def fill():
    with (place / "filler").open("ab", buffering=0) as filler:
        try:
            while True:
                filler.write(bytes(4096))
        except OSError:
            pass
    return shutil.disk_usage(place).free

for words in given["commands"]:
    print(json.dumps([fill(), deal(*words, "--home", str(home))]), flush=True)
"""
)


def test_on_a_disk_without_a_free_byte_the_status_is_shown_and_gc_makes_room(
    home: Path, copied_home: Path, tmp_path: Path
) -> None:
    place = tmp_path / "disk"
    place.mkdir()
    commands = [["status"], ["data", "gc", "--older-than", "0h", "--lineage", "l"], ["data", "gc"], ["status"]]
    done = on_small_disk(AT_ZERO, {"place": str(place), "home": str(home), "commands": commands})
    assert [free for free, _ in done] == [0] * len(commands)
    assert [(each["code"], each["err"]) for _, each in done] == [(0, "")] * len(commands), done
    status, of_lineage, of_all, after = (json.loads(each["out"]) for _, each in done)
    assert status["damaged"] == after["damaged"] == [] and [each["champion"] for each in after["lineages"]] == ["3"]
    assert "2" in [each["version"] for each in of_lineage["removals"]] and of_lineage["problems"] == {}
    assert [Path(each["address"]).name for each in of_all["removals"]] == ["dead"] and of_all["problems"] == {}


@pytest.mark.nightly
def test_a_disk_that_fills_up_at_any_stage_ends_the_run_with_one_message(
    tiny_base: Path, home: Path, tmp_path: Path
) -> None:
    place = tmp_path / "disk"
    place.mkdir()
    store, artifacts = {"DEAL_STORE_URI": place.as_uri()}, {"DEAL_ARTIFACT_URI": place.as_uri()}
    database = {"MLFLOW_TRACKING_URI": f"sqlite:///{place}/mlflow.db"}
    cases = {
        "rows": (store, 4),
        "adapter": (store, 48),
        "model": (artifacts, 4),
        "report": (artifacts, 64),
        "database": (database, 400),
    }
    given = {"place": str(place), "spec": str(spec_of(tmp_path, tiny_base)), "cases": cases}
    found = on_small_disk(FILL, given)
    assert [each[0] for each in found] == list(cases)
    for name, full, before, again, after, report in found:
        for command, done in {"adapt": again, "version list": after, "version show": report}.items():
            require_described(f"deal {command}", json.loads(done["out"]))
        is_mirror = name in ("model", "report", "database")  # MLflow's disk: nothing of the lineage needs it
        if is_mirror:
            assert full["code"] == 0 and json.loads(full["out"])["status"] == "promoted", (name, full)
        else:
            assert full["code"] == 1 and full["err"].count("\n") == 1, (name, full)
            message = json.loads(full["err"])["error"]
            assert f"The disk of {place}" in message and "MB are free" in message, (name, message)
            assert "not expected" not in message
        known = json.loads(before["out"]) if before["code"] == 0 else []
        assert [each["version"] for each in known] == ["1"] * is_mirror, (name, before)
        assert again["code"] == 0, (name, again)
        assert json.loads(again["out"])["status"] == ("repeat" if is_mirror else "promoted"), (name, again)
        assert [each["version"] for each in json.loads(after["out"])] == ["1"], (name, after)
        assert report["code"] == 0, (name, report)
