"""The rules of the tree that `make lint` does not check: what imports may do, and what no source may contain."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from deal_core import selection, strategies

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("deal_core", "infra", "tasks", "flows", "deal_pipeline")


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def top_levels(node: ast.Import | ast.ImportFrom) -> set[str]:
    names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
    return {name.partition(".")[0] for name in names}


def module_level(tree: ast.Module) -> Iterator[ast.AST]:
    """Nodes that run when the module is imported: everything but the bodies of functions."""
    waiting: list[ast.AST] = list(tree.body)
    while waiting:
        node = waiting.pop()
        yield node
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            defaults = [*node.args.defaults, *[default for default in node.args.kw_defaults if default]]
            # os.environ itself as a default is looked at when the function is called
            waiting += [*node.decorator_list, *[d for d in defaults if ast.unparse(d) != "os.environ"]]
        elif not isinstance(node, ast.Lambda):
            waiting += ast.iter_child_nodes(node)


def reads_surroundings(source: str) -> set[str]:
    """Environment variables and folders that a module looks at while it is imported."""
    dotted = {ast.unparse(node) for node in module_level(ast.parse(source)) if isinstance(node, ast.Attribute)}
    return {
        name
        for name in dotted
        if re.fullmatch(r"os\.(environ|getenv|getcwd|environb)|(pathlib\.)?Path\.(cwd|home)", name)
    }


def test_no_source_trusts_foreign_code() -> None:
    """What unpickles is refused by ruff."""
    flag = re.compile(r"\b(?:trust_remote_code|allow_pickle)\b\W{1,4}(?!False\b)\w")
    texts = {module_name(path): path.read_text("utf-8") for path in sources(*PACKAGES, "benchmarks")}
    assert not [name for name, text in texts.items() if flag.search(text)]
    assert flag.search("f(trust_remote_code=True)") and flag.search("{'allow_pickle': trusted}")


def test_no_module_reads_the_environment_while_it_is_imported() -> None:
    assert not {
        module_name(path): found
        for path in sources(*PACKAGES)
        if (found := reads_surroundings(path.read_text("utf-8")))
    }


@pytest.mark.parametrize(
    "source",
    [
        "HOME = os.environ['DEAL_HOME']",
        "def f(home=Path.cwd()): ...",
        "if os.environ.get('X'):\n    pass",
    ],
)
def test_reading_the_environment_at_import_is_found(source: str) -> None:
    assert reads_surroundings(source)
    assert not reads_surroundings("def f():\n    return os.environ['DEAL_HOME']")


def test_every_package_is_listed_for_installation() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]["packages"]
    found = {module_name(path) for path in sources(*PACKAGES) if path.name == "__init__.py"}
    assert set(listed) == found | {"deal_pipeline.examples"}
    assert {path.parent for path in sources(*PACKAGES)} == {ROOT / name.replace(".", "/") for name in found}


IMPORT_ALL = """
import importlib, os, sys, threading

WRITES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "shutil.rmtree")
WORK = WRITES + ("subprocess.Popen", "os.system", "os.posix_spawn", "socket.bind", "sqlite3.connect")
NETWORK = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto")
watched, seen = NETWORK, []

def watch(event, arguments):
    writes = event == "open" and (
        any(letter in arguments[1] for letter in "wax+") if isinstance(arguments[1], str)
        else arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    )
    if event in watched or (writes and watched is not NETWORK and arguments[0] != os.devnull):
        seen.append(f"{event} {arguments}")

sys.addaudithook(watch)
modules = sys.argv[1].split(",")
exec(sys.stdin.read())  # what our modules import of other projects, whose imports do as they like on this machine
assert not seen, f"a dependency uses the network when it is imported: {seen}"
watched = WORK + NETWORK
failed = False
for module in modules:
    threads = threading.active_count()
    try:
        importlib.import_module(module)
        assert not seen, f"importing it did work: {seen}"
        assert threading.active_count() == threads, "importing it started a thread"
    except BaseException as error:
        print(module, repr(error), flush=True)
        failed = True
    seen.clear()
sys.exit(failed)
"""


def import_each(root: Path, modules: list[str], preload: str, home: Path) -> subprocess.CompletedProcess[str]:
    """Import the modules one after another in a process of their own, in an empty home and working folder."""
    environment = {"PATH": os.environ["PATH"], "HOME": str(home), "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-B", "-c", IMPORT_ALL, ",".join(modules)],
        input=preload,
        env=environment,
        cwd=home,
        capture_output=True,
        text=True,
        check=False,
    )


def foreign_imports() -> str:
    """The import statements of all our modules that name other projects, as one source. An extra may be missing."""
    lines, ours = set(), {*PACKAGES, "__future__"}
    for path in sources(*PACKAGES):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom) and not top_levels(node) & ours:
                lines.add(f"with suppress(ModuleNotFoundError): {ast.unparse(node)}")
    return "\n".join(["from contextlib import suppress", *sorted(lines)])


@pytest.mark.nightly
def test_no_import_does_work(tmp_path: Path) -> None:
    result = import_each(ROOT, [module_name(path) for path in sources(*PACKAGES)], foreign_imports(), tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.nightly
@pytest.mark.parametrize(
    "source",
    [
        "open('file', 'w')",
        "import socket; socket.getaddrinfo('localhost', 80)",
        "import subprocess; subprocess.run(['true'])",
        "import threading, time; threading.Thread(target=time.sleep, args=[9], daemon=True).start()",
    ],
)
def test_an_import_that_does_work_is_found(source: str, tmp_path: Path) -> None:
    (tmp_path / "busy.py").write_text(source)
    (tmp_path / "idle.py").write_text("import json")
    assert import_each(tmp_path, ["idle"], "import subprocess, socket, sqlite3", tmp_path).returncode == 0
    result = import_each(tmp_path, ["idle", "busy"], "import subprocess, socket, sqlite3", tmp_path)
    assert result.returncode == 1 and result.stdout.startswith("busy "), result.stdout + result.stderr


def test_a_run_begins_without_what_only_work_needs() -> None:
    """Most runs find nothing new or their lineage at work, and some commands check a file: no torch for them."""
    classes = "from deal_core.strategies import OWN, strategy_class; [strategy_class(name) for name in OWN]"
    assert not loaded_by(f"import flows.watch; {classes}")


def loaded_by(code: str) -> str:
    """The heavy modules that a process has loaded after this code."""
    code += "; import sys; print(*{'torch', 'peft', 'transformers', 'sklearn', 'scipy.stats'} & {*sys.modules})"
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()


def test_no_wheel_has_research() -> None:
    """Its strategies and scores are plug-ins that a clone registers."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]["packages"]
    assert not [name for name in listed if name.startswith("benchmarks")]
    assert strategies.OWN.keys() == {"deal", "seq_lora", "replay"} and selection.OWN.keys() == {"random"}
