"""A worker image has MLflow's client, but neither its server nor matplotlib: what a worker runs needs none of them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.adapting import BANK, PASS

ROOT = Path(__file__).resolve().parents[3]
OVERRIDES = ROOT / "infra" / "docker" / "worker-overrides.txt"
LEFT_OUT = {
    "flask": "flask",
    "flask-cors": "flask_cors",
    "graphene": "graphene",
    "gunicorn": "gunicorn",
    "huey": "huey",
    "matplotlib": "matplotlib",
    "skops": "skops",
}
"""Distributions that a worker image has not, and the module of each."""

BLOCK = f"import sys; sys.modules.update(dict.fromkeys({sorted(LEFT_OUT.values())}))"
"""A module that is None cannot be imported, and is not found."""


def python_without_them(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run Python without the modules that a worker image leaves out."""
    (folder / "sitecustomize.py").write_text(BLOCK)
    environment = {**os.environ, "PYTHONPATH": f"{folder}:{ROOT}", "DEAL_HOME": str(folder / "home")}
    return subprocess.run(
        [sys.executable, *command], env=environment, cwd=folder, capture_output=True, text=True, check=False
    )


def what_is_installed_with(lines: list[str]) -> set[str]:
    """The distributions that pip installs for these requirements, as far as this environment has them."""
    found, waiting = set[str](), [Requirement(line) for line in lines]
    while waiting:
        wanted = waiting.pop()
        if canonicalize_name(wanted.name) in found:
            continue
        found.add(canonicalize_name(wanted.name))
        try:
            needs = [Requirement(line) for line in requires(wanted.name) or ()]
        except PackageNotFoundError:
            continue
        extras = {"", *wanted.extras}
        waiting += [
            need for need in needs if not need.marker or any(need.marker.evaluate({"extra": name}) for name in extras)
        ]
    return found


def test_a_worker_image_installs_no_web_server_of_mlflow_and_no_matplotlib() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    plain = [*project["dependencies"], *project["optional-dependencies"]["kubernetes"]]
    overrides = [Requirement(line) for line in OVERRIDES.read_text().splitlines() if not line.startswith("#")]
    dropped = {each.name for each in overrides if each.marker and not each.marker.evaluate()}
    worker = [line for line in plain if Requirement(line).name not in dropped] + ["mlflow-skinny"]
    assert set(LEFT_OUT) <= what_is_installed_with(plain), "each of them comes with MLflow"
    assert not set(LEFT_OUT) & what_is_installed_with(worker)
    (install,) = re.findall(r"uv pip install.*?\nCOPY", (ROOT / "infra/docker/Dockerfile").read_text(), re.DOTALL)
    assert f"--override /tmp/{OVERRIDES.name}" in install and "mlflow-skinny" in install


@pytest.mark.nightly
def test_a_worker_loads_every_flow_and_writes_a_page_without_charts(tmp_path: Path) -> None:
    deployments = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]
    modules = sorted({each["entrypoint"].rpartition(".")[0] for each in deployments})
    code = f"""
import importlib
for name in {modules}: importlib.import_module(name)
from infra.report.page import render_page
from tests.report_sample import sample_evaluation, sample_report, sample_versions
page = render_page(sample_versions(), sample_report(), sample_evaluation())
assert "matplotlib was not installed where this page was written" in page and "<svg" not in page
"""
    done = python_without_them(tmp_path, "-c", code)
    assert done.returncode == 0, done.stderr


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("command", "remedy"), [("demo", "pip install matplotlib"), ("server up", "pip install mlflow")]
)
def test_what_needs_a_part_says_which(command: str, remedy: str, tmp_path: Path) -> None:
    done = python_without_them(tmp_path, "-c", "from deal_pipeline.cli import main; main()", *command.split())
    assert done.returncode == 2 and remedy in done.stderr and "Traceback" not in done.stderr, done.stderr


@pytest.mark.nightly
def test_a_worker_learns_a_file_and_makes_a_version(tmp_path: Path, tiny_base: Path) -> None:
    spec = {"lineage": "l", "base_model": str(tiny_base), "task": BANK, "gate": PASS, "train": {"max_steps": 2}}
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(spec))
    done = python_without_them(tmp_path, "-c", "from deal_pipeline.cli import main; main()", "adapt", "spec.yaml")
    assert done.returncode == 0 and "Version 1 of l is champion." in done.stdout, done.stdout + done.stderr
