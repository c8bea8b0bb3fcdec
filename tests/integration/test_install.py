"""The project installs as a wheel and works outside the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("deal_core", "deal_pipeline", "flows", "infra", "tasks")
IGNORED = shutil.ignore_patterns(".*", "*.egg-info", "__pycache__", "build", "dist", "deal-home", "benchmark-work")

IMPORT_PACKAGES = """
import importlib, sys
target, *packages = sys.argv[1:]
sys.path.insert(0, target)
for name in packages:
    folders = list(importlib.import_module(name).__path__)
    assert folders == [f"{target}/{name.replace('.', '/')}"], f"{name} comes from {folders}"
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which the project was installed from a copy, because the build writes next to the sources."""
    folder = tmp_path_factory.mktemp("install")
    shutil.copytree(ROOT, folder / "copy", ignore=IGNORED)
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index",
         "--disable-pip-version-check", "--target", str(folder / "target"), str(folder / "copy")],
        check=True, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    return folder / "target"


def test_every_package_imports_from_outside_the_checkout(installed: Path, tmp_path: Path) -> None:
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]["packages"]
    result = subprocess.run(  # -I: no module comes from the working folder or PYTHONPATH
        [sys.executable, "-I", "-c", IMPORT_PACKAGES, str(installed), *packages],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr


def test_every_module_is_installed_and_nothing_else(installed: Path) -> None:
    tops = {path.name for path in installed.iterdir()}
    assert tops - {"bin", "share"} == {*PACKAGES, "deal_pipeline-0.1.0.dist-info"}
    for package in PACKAGES:
        source = {str(path.relative_to(ROOT)) for path in (ROOT / package).rglob("*.py")}
        assert {str(path.relative_to(installed)) for path in (installed / package).rglob("*.py")} == source


def test_what_a_server_is_told_is_installed(installed: Path) -> None:
    assert (installed / "share" / "deal-pipeline" / "prefect.yaml").is_file()
    templates = {path.name for path in (installed / "infra" / "work_pools").iterdir()}
    assert templates == {"process.json", "docker.json", "kubernetes.json"}


def test_the_example_data_is_installed(installed: Path) -> None:
    def files_in(folder: Path) -> set[str]:
        return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}

    assert files_in(installed / "flows/examples") == files_in(ROOT / "examples")


def test_the_installed_command_answers(installed: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    result = subprocess.run(
        [sys.executable, str(installed / "bin/deal"), "--help"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0 and "adapt" in result.stdout, result.stderr
    assert not list(tmp_path.iterdir())
