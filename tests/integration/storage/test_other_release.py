"""A home that another release made: commands refuse it, and nothing of it is changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from deal_pipeline.cli.app import app
from infra.store.base import ObjectStore
from infra.store.format import FORMAT, FormatError
from infra.store.local import FileStore
from infra.store.opening import open_store
from tests.adapting import BANK, run
from tests.in_process import put_back

OLD = {
    "format.json": b'{"format": 3}\n',
    "versions/desk/00000001.json": b'{"schema_version": 1, "lineage": "desk", "version": "1", "facts": {}}',
    "promotions/desk/00000001.json": b'{"schema_version": 1, "number": 1, "lineage": "desk", "champion": "1"}',
    "adapters/desk/c127fd25dd2fcc5b/record.json": b"{}",
    "adapters/desk/c127fd25dd2fcc5b/adapter_model.safetensors": b"weights",
    "ledger/desk/dae3.json": b"{}",
    "lineages/desk.yaml": b"lineage: desk\ntrain: {prompt_loss_weight: 0.0}\n",
    "inbox/bank/may.csv": b"text,label\na,b\n",
}
COMMANDS = {
    "status": ["status"],
    "adapt": ["adapt", "--task", "bank", "--data", BANK["data"], "--lineage", "desk"],
    "adapt --watch": ["adapt", "--watch", "--once", "--lineage", "desk"],
    "serve": ["serve", "--lineage", "desk"],
    "data gc": ["data", "gc"],
    "up": ["server", "up"],
    "down": ["server", "down"],
}


def deal(*arguments: str) -> tuple[int, str]:
    """The exit code of a command, and all that it printed, in one line."""
    with put_back():
        said = CliRunner().invoke(app, list(arguments))
    return said.exit_code, " ".join(said.output.split())


@pytest.fixture
def old_home(home: Path) -> Path:
    """A home of 0.3: its store, MLflow's database, and its log."""
    store = FileStore(home / "store")
    for key, content in OLD.items():
        store.put_bytes(key, content)
    (home / "logs").mkdir()
    (home / "logs" / "logging.yml").write_text("# as 0.3 wrote it\n")
    return home


def files_of(folder: Path) -> dict[str, tuple[bytes, int]]:
    """The bytes and the time of each file; folders count too."""
    return {
        str(path.relative_to(folder)): (path.read_bytes() if path.is_file() else b"", path.stat().st_mtime_ns)
        for path in folder.rglob("*")
    }


@pytest.mark.parametrize("name", COMMANDS)
def test_a_home_of_0_3_is_refused_in_one_sentence_and_stays_as_it_is(old_home: Path, name: str) -> None:
    before = files_of(old_home)
    code, said = deal(*COMMANDS[name])
    assert code == 2 and "was made by release 0.3" in said and said.count(". ") == 0 and "Traceback" not in said
    assert files_of(old_home) == before


@pytest.mark.usefixtures("prefect_api")
def test_a_run_of_a_worker_changes_nothing_of_the_store(old_home: Path, tiny_base: Path) -> None:
    before = files_of(old_home / "store")
    with pytest.raises(FormatError):
        run(tiny_base, BANK)
    assert files_of(old_home / "store") == before


def formats(store: ObjectStore) -> dict[str, object]:
    return {key: json.loads(store.get_bytes(key)) for key in ("format.json",) if store.exists(key)}


def test_the_first_run_says_the_format_and_looking_does_not(
    home: Path, copy_to_home: Callable[[Path], Path], kept_home: Path
) -> None:
    assert deal("status")[0] == deal("lineage", "list")[0] == 0 and not (home / "store").exists()
    copy_to_home(kept_home)
    assert formats(open_store()) == {"format.json": {"format": FORMAT}}
    assert deal("version", "list", "--lineage", "l")[0] == 0
