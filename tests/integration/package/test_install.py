"""The project installs as a wheel and works outside the checkout."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[3]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
PACKAGES = ("deal_core", "deal_pipeline", "flows", "infra", "tasks")
IGNORED = shutil.ignore_patterns(
    ".*", "*.egg-info", "__pycache__", "build", "dist", "deal-home", "demo-home", "benchmark-work"
)

NOT_IN_THE_TESTS = {"bitsandbytes", "setuptools"}
"""The first needs a GPU, and pip freeze leaves out the second."""

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
    """A folder with the installed wheel, which is built from a copy, because a build writes next to the sources."""
    folder = tmp_path_factory.mktemp("install")
    shutil.copytree(ROOT, folder / "copy", ignore=IGNORED)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(folder / "copy")]
    subprocess.run([*pip, *build], check=True, stdin=subprocess.DEVNULL)
    (wheel,) = folder.glob("*.whl")
    install = ["install", "--no-deps", "--no-index", "--target", str(folder / "target"), str(wheel)]
    subprocess.run([*pip, *install], check=True, stdin=subprocess.DEVNULL)
    return folder / "target"


def test_every_package_imports_from_outside_the_checkout(installed: Path, tmp_path: Path) -> None:
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]["packages"]
    result = subprocess.run(  # -I: no module comes from the working folder or PYTHONPATH
        [sys.executable, "-I", "-c", IMPORT_PACKAGES, str(installed), *packages],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr


def test_every_module_is_installed_and_nothing_else(installed: Path) -> None:
    tops = {path.name for path in installed.iterdir()}
    assert tops - {"bin", "share"} == {*PACKAGES, f"deal_pipeline-{PROJECT['version']}.dist-info"}
    for package in PACKAGES:
        source = {str(path.relative_to(ROOT)) for path in (ROOT / package).rglob("*.py")}
        assert {str(path.relative_to(installed)) for path in (installed / package).rglob("*.py")} == source


def test_what_servers_and_editors_are_told_is_installed(installed: Path) -> None:
    assert (installed / "share" / "deal-pipeline" / "prefect.yaml").is_file()
    assert (installed / "infra" / "work_pools.yaml").is_file()
    assert (installed / "tasks" / "spec.schema.json").is_file()


def test_the_example_data_is_installed(installed: Path) -> None:
    def files_in(folder: Path) -> set[str]:
        return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}

    assert files_in(installed / "deal_pipeline/examples") == files_in(ROOT / "examples")


def test_the_installed_command_answers(installed: Path, tmp_path: Path) -> None:
    def answer(*options: str, **environment: str) -> str:
        result = subprocess.run(
            [sys.executable, str(installed / "bin/deal"), *options],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": str(installed), **environment},
            check=False,
        )
        assert result.returncode == 0, result.stderr
        return result.stdout

    assert "adapt" in answer("--help")
    assert answer("--version") == f"deal-pipeline {PROJECT['version']}\n"
    typed = {"_DEAL_COMPLETE": "complete_bash", "COMP_WORDS": "deal ver", "COMP_CWORD": "1"}
    assert answer(**typed).split() == ["version"], "what the shell asks after `deal --install-completion`"
    assert not list(tmp_path.iterdir())


def test_the_citation_is_of_this_version() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (cited["version"], cited["license"]) == (PROJECT["version"], PROJECT["license"])


def test_the_constraints_pin_every_dependency_to_a_release_that_anyone_can_get() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pinned = {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}
    assert [version for version in pinned.values() if Version(version).local] == [], "no index has a local build"
    extras = PROJECT["optional-dependencies"].values()
    for wanted in map(Requirement, itertools.chain(PROJECT["dependencies"], *extras)):
        if wanted.name not in NOT_IN_THE_TESTS:
            assert pinned[canonicalize_name(wanted.name)] in wanted.specifier
