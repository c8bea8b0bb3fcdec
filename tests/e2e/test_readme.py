"""The commands that the README shows, as a reader would type them; on the tiny base, so that it takes seconds."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from deal_pipeline.cli.app import app
from tests.e2e.command import DEAL
from tests.in_process import put_back

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```sh\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
COMMANDS = [line.partition("#")[0].strip() for block in BLOCKS for line in block.splitlines()]
GATE_MAY_REJECT = (0, 3)
WAIT_SECONDS = 120

pytestmark = pytest.mark.e2e


def of(program: str) -> list[list[str]]:
    found = [shlex.split(command)[1:] for command in COMMANDS if command.startswith(f"{program} ")]
    assert found, f"the README shows no {program} command any more"
    return found


def test_the_two_commands_that_need_nothing_before_them_are_on_the_first_screen() -> None:
    first = [line.split("#") for line in BLOCKS[0].splitlines()]
    assert [command.strip() for command, _ in first] == ["make demo", "make test"]
    assert all("minutes" in comment for _, comment in first), "each says how long it takes"
    assert README.index(BLOCKS[0]) < README.index("\n".join(README.splitlines()[60:62])), "in the first sixty lines"
    assert "make test" in (ROOT / ".ci" / "run").read_text().splitlines()


@pytest.mark.parametrize("arguments", of("make"), ids=" ".join)
def test_make_knows_its_targets(arguments: list[str]) -> None:
    done = subprocess.run(["make", "-n", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def checkout(tiny_base: Path, tmp_path: Path) -> Iterator[Path]:
    """A folder with the examples, as in a checkout; their specs take the tiny base and every version passes."""
    folder = tmp_path / "work"
    shutil.copytree(ROOT / "examples", folder / "examples")
    for file in folder.glob("examples/*/spec.yaml"):
        spec = yaml.safe_load(file.read_text())
        spec |= {"base_model": str(tiny_base), "gate": {"min_gain_points": -100}}
        spec["train"] = {**spec.get("train", {}), "max_steps": 2}
        file.write_text(yaml.safe_dump(spec))
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(("DEAL_", "PREFECT_API", "MLFLOW_TRACKING"))]:
            patch.delenv(name)
        patch.chdir(folder)
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("DEAL_CACHE_DIR", str(folder / "cache"))
        yield folder


def run_here(*arguments: str) -> tuple[int, str, str]:
    with put_back():
        done = CliRunner().invoke(app, arguments)
    return done.exit_code, done.stdout, done.stderr


@pytest.mark.usefixtures("prefect_api")
def test_the_commands_run_in_the_order_of_the_page(checkout: Path) -> None:
    """They run in this process; tests/integration/package/test_python_api.py starts one that has an API of its own.

    Left out are `model fetch`, which downloads, and the servers, which have tests of their own.
    """
    for command in COMMANDS:
        program, *arguments = shlex.split(command) or [""]
        if program == "cp":
            shutil.copy(*arguments)
        if program != "deal" or arguments[0] in ("model", "ui", "serve"):
            continue
        code, out, err = run_here(*arguments)
        expected = GATE_MAY_REJECT if arguments[0] == "adapt" else (0,)
        assert code in expected, f"{command}: {err}"
        assert out
    first = json.loads(run_here("version", "list", "--lineage", "demo", "--json")[1])[0]
    assert (first["task"], first["accepted"]) == ("bank", True)


@pytest.mark.nightly
def test_ui_opens_the_page_that_shows_the_runs(home: Path, free_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The browser is a program that writes down the address it is given."""
    opened = home / "opened"
    os.mkfifo(opened)
    browser = home / "browser"
    browser.write_text(f'#!/bin/sh\necho "$1" > {opened}\n')
    browser.chmod(0o755)
    monkeypatch.setenv("BROWSER", f"{browser} %s")
    (arguments,) = (each for each in of("deal") if each[0] == "ui")
    command = [*DEAL, *arguments, "--port", str(free_port)]
    server = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    stopper = threading.Timer(WAIT_SECONDS, lambda: opened.write_text(""))
    stopper.start()
    try:
        url = opened.read_text().strip()
        assert url == f"http://127.0.0.1:{free_port}"
        with urllib.request.urlopen(url, timeout=WAIT_SECONDS) as page:
            assert "MLflow" in page.read().decode()
    finally:
        stopper.cancel()
        os.killpg(server.pid, signal.SIGINT)
        assert server.wait(WAIT_SECONDS) == 0
