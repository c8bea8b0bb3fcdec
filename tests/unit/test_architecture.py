"""The rules of the tree: which way imports go, what imports may do, and what no source may contain."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from deal_core import selection, strategies

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("deal_core", "infra", "tasks", "flows", "deal_pipeline")
MAY_IMPORT = {
    "deal_core": {"deal_core"},
    "infra": {"infra", "deal_core"},
    "tasks": {"tasks", "infra", "deal_core"},
    "flows": {"flows", "tasks", "infra", "deal_core"},
    "deal_pipeline": {"deal_pipeline"},  # it starts commands; what they need is imported there
    "benchmarks": {"benchmarks", *PACKAGES},
}
ONLY_IN = {
    "prefect": {"flows", "tasks", "benchmarks"},  # a benchmark follows a server's events
    "mlflow": {"infra"},
    "boto3": {"infra"},
    "botocore": {"infra"},
}
PICKLES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
NOT_IMPORTED_BY_US = {"gguf": "transformers reads GGUF files with it"}
WITHOUT_A_FLOW = {"lock"}
"""Modules in the root of flows/ that define no flow."""
STAGES = ("ingest", "train", "evaluate", "gate", "register", "promote", "report")
"""Modules of tasks/adaptation/ with a Prefect task each."""


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported_modules(tree: ast.AST) -> set[str]:
    """Every module that a source names in an import, wherever in the source it stands."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports are not used here"
            names.add(node.module or "")
    return names


def top_levels(tree: ast.AST) -> set[str]:
    return {name.partition(".")[0] for name in imported_modules(tree)}


def wrong_imports(package: str, source: str) -> set[str]:
    names = top_levels(ast.parse(source))
    ours = names & set(MAY_IMPORT) - MAY_IMPORT[package]
    return ours | {name for name, places in ONLY_IN.items() if name in names and package not in places}


def unsafe_code(source: str) -> list[str]:
    """What could run foreign code: pickle in any form, and flags that allow it."""
    tree = ast.parse(source)
    found = [f"import of {name}" for name in sorted(top_levels(tree) & PICKLES)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name, flags = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
            if name == "torch.load" and flags.get("weights_only") != "True":
                found.append("torch.load without weights_only=True")
            if name in ("torch.save", "eval", "exec") or name.endswith((".read_pickle", ".to_pickle")):
                found.append(name)
            if name == "yaml.load" or name.startswith("yaml.unsafe"):
                found.append(name)
            if flags.get("trust_remote_code", "False") != "False" or flags.get("allow_pickle", "False") != "False":
                found.append(f"{name} trusts foreign code")
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and key.value == "trust_remote_code" and ast.unparse(value) != "False":
                    found.append("trust_remote_code in a dict")
    return found


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


def import_graph(trees: dict[str, ast.AST]) -> dict[str, set[str]]:
    """The modules of `trees` that each of them imports, wherever in the source the import stands."""
    graph: dict[str, set[str]] = {}
    for name, tree in trees.items():
        found = imported_modules(tree)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                found |= {f"{node.module}.{alias.name}" for alias in node.names}
        graph[name] = (found & trees.keys()) - {name}
    return graph


def circles(graph: dict[str, set[str]]) -> set[str]:
    """Modules that import themselves by way of others."""

    def reached(start: str) -> set[str]:
        found, waiting = set[str](), [start]
        while waiting:
            for name in graph[waiting.pop()] - found:
                found.add(name)
                waiting.append(name)
        return found

    return {name for name in graph if name in reached(name)}


def folders_of(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """The folders that the modules of each folder import. A folder, its parents and its subfolders may do as they like.

    They are one concept and its parts: `infra.promotions` reads what `infra.store` stores.
    """

    def folder(module: str) -> str:
        is_package = any(other.startswith(f"{module}.") for other in graph)
        return module if is_package else module.rpartition(".")[0]

    def is_within(inner: str, outer: str) -> bool:
        return f"{inner}.".startswith(f"{outer}.")

    folders: dict[str, set[str]] = {folder(module): set() for module in graph}
    for module, imported in graph.items():
        own = folder(module)
        others = {folder(name) for name in imported}
        folders[own] |= {other for other in others if not is_within(own, other) and not is_within(other, own)}
    return folders


def users_of_stages(graph: dict[str, set[str]]) -> set[str]:
    """Modules that import the stages or what belongs to them, other than flows: they would import Prefect with them."""
    adaptation = {name for name in graph if name.startswith("tasks.adaptation.")}
    importing = {name for name, imported in graph.items() if imported & adaptation} - adaptation
    return {name for name in importing if not re.fullmatch(r"flows\.\w+", name)}


def names_used_twice(trees: dict[str, ast.AST]) -> dict[str, list[str]]:
    """Public classes that more than one module defines."""
    places: dict[str, list[str]] = {}
    for module, tree in trees.items():
        for node in tree.body:  # type: ignore[attr-defined]
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places.setdefault(node.name, []).append(module)
    return {name: modules for name, modules in places.items() if len(modules) > 1}


@pytest.fixture(scope="module")
def trees() -> dict[str, ast.AST]:
    return {module_name(path): ast.parse(path.read_text("utf-8")) for path in sources(*PACKAGES)}


def test_every_module_in_the_root_of_flows_defines_a_flow() -> None:
    without = {path.stem for path in (ROOT / "flows").glob("*.py") if "@flow(" not in path.read_text("utf-8")}
    assert without - {"__init__"} <= WITHOUT_A_FLOW


def test_no_module_imports_itself_by_way_of_others(trees: dict[str, ast.AST]) -> None:
    assert not circles(import_graph(trees))


def test_a_circle_is_found() -> None:
    parsed = {
        name: ast.parse(source)
        for name, source in (
            ("p.a", "from p import b"),
            ("p.b", "def f():\n    from p.c import x"),
            ("p.c", "import p.a"),
            ("p.d", "import p.a"),
        )
    }
    assert circles(import_graph(parsed)) == {"p.a", "p.b", "p.c"}


def test_no_folder_imports_itself_by_way_of_others(trees: dict[str, ast.AST]) -> None:
    assert not circles(folders_of(import_graph(trees)))


def test_a_circle_of_folders_is_found() -> None:
    graph: dict[str, set[str]] = {
        "p": set(),
        "p.base": {"p.a", "p.a.one"},
        "p.a": set(),
        "p.a.one": {"p.base", "p.b.one"},
        "p.a.two": set(),
        "p.b.one": {"p.a.in.one"},
        "p.a.in.one": {"p.a.two"},
        "p.b.two": {"p.a.two"},
        "p.bc.one": {"p.b.two"},
    }
    assert folders_of(graph) == {"p": set(), "p.a": {"p.b"}, "p.b": {"p.a", "p.a.in"}, "p.a.in": set(), "p.bc": {"p.b"}}
    assert circles(folders_of(graph)) == {"p.a", "p.b"}, "p and p.a.in import their own parts alone"


def test_the_stages_of_an_adaptation_are_imported_by_flows_alone(trees: dict[str, ast.AST]) -> None:
    """So commands that only read or answer, such as `deal check`, import no Prefect through them."""
    graph = import_graph(trees)
    assert {f"tasks.adaptation.{name}" for name in STAGES} <= graph.keys()
    assert not users_of_stages(graph)
    wrong = {"tasks.validate": {"tasks.adaptation.ingest"}, "flows.cli.learn": {"tasks.adaptation.run"}}
    assert users_of_stages({**graph, **wrong}) == wrong.keys()


def test_no_two_public_classes_have_one_name(trees: dict[str, ast.AST]) -> None:
    assert not names_used_twice(trees)
    assert names_used_twice({"a": ast.parse("class Row: ..."), "b": ast.parse("class Row: ...")}) == {"Row": ["a", "b"]}


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_go_one_way(package: str) -> None:
    files = sources(package)
    assert files
    wrong = {module_name(path): found for path in files if (found := wrong_imports(package, path.read_text("utf-8")))}
    assert not wrong


@pytest.mark.parametrize(
    ("package", "source"),
    [
        ("deal_core", "def f():\n    from infra.settings import HomeSettings"),
        ("deal_core", "import mlflow.tracking"),
        ("deal_core", "from prefect import task"),
        ("infra", "import tasks"),
        ("infra", "import prefect"),
        ("tasks", "import boto3"),
        ("tasks", "from flows.adapt import adapt"),
        ("flows", "import mlflow as anything"),
    ],
)
def test_an_import_against_the_direction_is_found(package: str, source: str) -> None:
    assert wrong_imports(package, source)


def test_no_source_unpickles_or_trusts_foreign_code() -> None:
    unsafe = {
        module_name(path): found
        for path in sources(*PACKAGES, "benchmarks")
        if (found := unsafe_code(path.read_text("utf-8")))
    }
    assert not unsafe


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from joblib import load",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.save(state, path)",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
        "AutoModel.from_pretrained(path, trust_remote_code=trusted)",
        "arguments = {'trust_remote_code': True}",
        "numpy.load(path, allow_pickle=True)",
        "yaml.load(text)",
        "eval(text)",
    ],
)
def test_unsafe_code_is_found(source: str) -> None:
    assert unsafe_code(source)


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
        "class A:\n    home = os.getenv('X')",
        "def f(home=Path.cwd()): ...",
        "if os.environ.get('X'):\n    pass",
    ],
)
def test_reading_the_environment_at_import_is_found(source: str) -> None:
    assert reads_surroundings(source)
    assert not reads_surroundings("def f():\n    return os.environ['DEAL_HOME']")


def test_declared_dependencies_are_those_that_are_imported() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = [line for name, lines in project["optional-dependencies"].items() if name != "dev" for line in lines]
    declared, optional = (
        {re.split(r"[<>=\[ ]", line)[0].lower().replace("_", "-") for line in lines}
        for lines in (project["dependencies"], extras)
    )
    by_import = importlib.metadata.packages_distributions()
    names = {name for path in sources(*PACKAGES) for name in top_levels(ast.parse(path.read_text("utf-8")))}
    foreign = names - set(PACKAGES) - set(sys.stdlib_module_names)
    providers = {
        name: {each.lower().replace("_", "-") for each in by_import.get(name, [name])}  # an extra need not be installed
        for name in foreign - {"botocore"}
    }
    assert not {name for name, each in providers.items() if not each & (declared | optional)}
    assert not declared - set().union(*providers.values()) - set(NOT_IMPORTED_BY_US)


def test_every_package_is_listed_for_installation() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]["packages"]
    found = {module_name(path) for path in sources(*PACKAGES) if path.name == "__init__.py"}
    assert set(listed) == found | {"flows.examples"}
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
    """The import statements of all our modules that name other projects, as one source."""
    lines, ours = set(), {*PACKAGES, "__future__"}
    for path in sources(*PACKAGES):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            is_foreign = isinstance(node, ast.Import | ast.ImportFrom) and not top_levels(node) & ours
            if is_foreign and all(map(find_spec, top_levels(node))):  # an extra may not be installed
                lines.add(ast.unparse(node))
    return "\n".join(sorted(lines))


@pytest.mark.nightly
def test_no_import_does_work(tmp_path: Path) -> None:
    result = import_each(ROOT, [module_name(path) for path in sources(*PACKAGES)], foreign_imports(), tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.nightly
@pytest.mark.parametrize(
    "source",
    [
        "open('file', 'w')",
        "import pathlib; pathlib.Path('folder').mkdir()",
        "import socket; socket.getaddrinfo('localhost', 80)",
        "import subprocess; subprocess.run(['true'])",
        "import sqlite3; sqlite3.connect('db')",
        "import threading, time; threading.Thread(target=time.sleep, args=[9], daemon=True).start()",
        "import missing_module",
    ],
)
def test_an_import_that_does_work_is_found(source: str, tmp_path: Path) -> None:
    (tmp_path / "busy.py").write_text(source)
    (tmp_path / "idle.py").write_text("import json")
    assert import_each(tmp_path, ["idle"], "import subprocess, socket, sqlite3", tmp_path).returncode == 0
    result = import_each(tmp_path, ["idle", "busy"], "import subprocess, socket, sqlite3", tmp_path)
    assert result.returncode == 1 and result.stdout.startswith("busy "), result.stdout + result.stderr


def test_a_run_begins_without_what_only_work_needs() -> None:
    """Most runs that a server starts find nothing new or their lineage at work: they shall not pay for torch."""
    assert not loaded_by("import flows.watch")


def test_what_a_strategy_needs_is_known_without_torch() -> None:
    """Commands that check a file or find a repeat read it."""
    classes = "from deal_core.strategies import OWN, strategy_class; [strategy_class(name) for name in OWN]"
    assert not loaded_by(classes)
    assert "torch" in loaded_by("from deal_core.strategies import kept_rows")


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
