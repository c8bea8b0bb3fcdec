"""Damaged stores and databases: errors name the damaged part and its version, and the rest still works."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from deal_core.errors import DealError, IntegrityError, StoreError
from deal_pipeline.cli.app import app
from deal_pipeline.server.status import Status, read_status
from infra.run_journal import RunJournal
from infra.store.opening import open_store
from infra.versions import Versions
from tasks.lineage.promotion import roll_back
from tasks.lineage.record import read_record
from tasks.predict import predict
from tasks.serving.export import export_version
from tests.adapting import BANK, CLINIC, run
from tests.in_process import deal, put_back
from tests.stored_versions import put_version

ENTRIES = (("versions", "00000002.json"), ("runs", "*.json"))
BY = {"who": "tester", "why": "a test"}
pytestmark = pytest.mark.usefixtures("prefect_api")


@pytest.fixture
def adapters(copied_home: Path) -> dict[str, Path]:
    """The folders of the versions' adapters, in a copy of the home."""
    return {each.version: copied_home / "store" / each.adapter_uri for each in Versions(open_store()).all("l")}


def ask(version: str | None = None) -> str:
    return predict(open_store(), "Where is my card?", lineage="l", task=None, version=version).version


def look(home: Path) -> Status:
    return asyncio.run(read_status(home))


def exit_code_of_status() -> int:
    with put_back():
        return CliRunner().invoke(app, ["status", "--json"]).exit_code


@pytest.mark.nightly
def test_a_damaged_champion_answers_and_trains_nothing_until_the_lineage_goes_back(
    home: Path, adapters: dict[str, Path], tiny_base: Path
) -> None:
    """Every damage and every reader: tests/unit/tasks/lineage/test_version_files.py."""
    weights = adapters["3"] / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    said = r"adapter_model\.safetensors, a file of version 3, champion of 'l', is damaged(.|\n)*deal version rollback N"
    for use in (ask, partial(run, tiny_base, BANK, again=True)):
        with pytest.raises(DealError, match=said):
            use()
    assert ask("1") == "1" and len(look(home).damaged) == 1 and exit_code_of_status() == 1
    assert roll_back(open_store(), "l", "1", **BY).champion == "1"
    assert ask() == "1" and look(home).damaged == ()
    assert run(tiny_base, BANK, again=True).version == "4"


def flip(path: Path) -> None:
    """Change one byte in the middle: the file is as long as before, and its header is whole."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    """Leave out the end."""
    path.write_bytes(path.read_bytes()[:-20])


def spell_anew(path: Path) -> None:
    """Write the same JSON in other bytes."""
    path.write_text(json.dumps(json.loads(path.read_text()), indent=7))


def swap_answers(path: Path) -> None:
    """Give the first test row the right answer of another one."""
    rows = pq.read_table(path).to_pylist()
    rows[0]["output"] = next(row["output"] for row in rows if row["output"] != rows[0]["output"])
    pq.write_table(pa.Table.from_pylist(rows, schema=pq.read_schema(path)), path)


@pytest.fixture
def datasets(copied_home: Path) -> dict[str, Path]:
    """The folders of the datasets that judge the champion, by task."""
    record = read_record(open_store(), Versions(open_store()).all("l")[-1])
    return {known.schema.name: copied_home / "store" / known.test_uris[0] for known in record.tasks}


def test_the_status_notices_changed_bytes_of_the_champion_its_entries_its_manifests_and_its_test_rows(
    home: Path, adapters: dict[str, Path], datasets: dict[str, Path]
) -> None:
    assert (look(home).damaged, exit_code_of_status()) == ((), 0)
    rejected, journal = (min((home / "store" / folder / "l").glob(name)) for folder, name in ENTRIES)
    damages: list[tuple[Path, Callable[[Path], None], str, str]] = [
        (adapters["3"] / "adapter_model.safetensors", flip, "Version 3 of 'l' is damaged", "deal version rollback"),
        (adapters["3"] / "method.json", spell_anew, "method.json has sha256", "Restore the folder"),
        (rejected, cut, "the entry of version 2 of 'l', is damaged", "Restore it from a backup"),
        (journal, cut, "the journal of a run, is damaged", "or delete it"),
        (
            journal,
            lambda path: path.write_text('{"schema_version": 1}'),
            "the journal of a run, is damaged",
            "or delete it",
        ),
        (
            datasets["clinic"] / "manifest.json",
            cut,
            "manifest.json, the record of a dataset, is damaged",
            "Restore it from a backup",
        ),
        (
            datasets["bank"] / "test.parquet",
            swap_answers,
            "the test rows of task 'bank', is damaged",
            "Restore it from a",
        ),
        (
            datasets["bank"] / "test.parquet",
            Path.unlink,
            "the test rows of task 'bank', is missing",
            "Restore it from a",
        ),
    ]
    for path, damage, said, remedy in damages:
        whole = path.read_bytes()
        damage(path)
        (problem,) = look(home).damaged
        assert problem.startswith("Lineage l: ") and said in problem and path.name in problem, problem
        assert remedy in problem and exit_code_of_status() == 1, problem
        path.write_bytes(whole)
    assert look(home).damaged == ()


def test_a_changed_record_answers_trains_and_exports_nothing(
    home: Path, adapters: dict[str, Path], tiny_base: Path
) -> None:
    record = adapters["3"] / "record.json"
    record.write_text(record.read_text().replace("What is it about?", "What is it abaut?"))
    export = partial(export_version, open_store(), "l", "3", to="merged", target=str(home / "out"))
    for use in (ask, partial(run, tiny_base, BANK, again=True), export):
        with pytest.raises(IntegrityError) as refused:
            use()
        assert "record.json" in str(refused.value) and "deal version rollback" in str(refused.value)
    assert len(look(home).damaged) == 1 and exit_code_of_status() == 1 and not (home / "out").exists()


def test_a_promotion_log_without_its_end_is_named_by_status_list_and_adapt(
    home: Path, adapters: dict[str, Path], tiny_base: Path
) -> None:
    shutil.rmtree(home / "store" / "promotions")
    with pytest.raises(StoreError) as refused:
        run(tiny_base, BANK, again=True)
    assert refused.value.code == "moves-lost"
    assert json.loads(deal("version", "list", "--lineage", "l", "--json", code=1))["code"] == "moves-lost"
    (problem,) = look(home).damaged
    assert "Restore the folder from a backup" in problem and exit_code_of_status() == 1


def test_altered_test_rows_are_not_scored_and_nothing_is_trained_before_that_is_said(
    home: Path, adapters: dict[str, Path], datasets: dict[str, Path], tiny_base: Path
) -> None:
    swap_answers(datasets["bank"] / "test.parquet")
    said = r"test\.parquet, the test rows of task 'bank', is damaged .*altered.*Restore it from a backup of the store"
    done = deal("version", "evaluate", "--lineage", "l", "--json", code=1)
    assert "Traceback" not in done and re.search(said, " ".join(done.split()))
    for task in (BANK, CLINIC):
        with pytest.raises(DealError, match=said):
            run(tiny_base, task, again=True)
    assert len(RunJournal(open_store()).all("l")) == 3, "no run was begun"
    assert ask() == "3" and [each.version for each in Versions(open_store()).all("l")] == ["1", "2", "3"]


def test_the_status_lists_every_lineage_of_the_store_and_notices_a_champion_that_is_gone(
    home: Path, adapters: dict[str, Path]
) -> None:
    (home / "store" / "lineages").mkdir()
    (home / "store" / "lineages" / "watched.yaml").write_text("tasks: [bank]\n")
    found = look(home)
    assert [(each.lineage, each.champion, each.num_open) for each in found.lineages] == [
        ("watched", None, 0),
        ("l", "3", None),
    ]
    assert [each.rejected for each in found.lineages] == [None, None]
    last = Versions(open_store()).all("l")[-1]
    rejected = {"version": "4", "run_key": "4" * 64, "accepted": False, "reasons": ("bank fell by 20 points.",)}
    entry = put_version(open_store(), last.model_copy(update=rejected))
    assert look(home).lineages[1].rejected == "version 4 (clinic) was rejected: bank fell by 20 points."
    for key in (entry, "versions/l/00000003.json"):
        open_store().delete(key)
    found = look(home)
    assert [(each.lineage, each.champion) for each in found.lineages] == [("watched", None), ("l", None)]
    (problem,) = found.damaged
    assert "lacks the entry of version 3 of 'l', which the promotion log names" in problem
    assert exit_code_of_status() == 1


def test_the_status_notices_a_broken_promotion_log_and_watch(home: Path, adapters: dict[str, Path]) -> None:
    (home / "store" / "lineages").mkdir()
    (home / "store" / "lineages" / "l.yaml").write_text("tasks: [bank]\n")
    for key in ("promotions/l/00000002.json", "lineages/l.state.json"):
        path = home / "store" / key
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"{")
    log, watch = look(home).damaged
    assert "00000002.json, an entry of the promotion log, is damaged" in log
    assert "lineages/l.state.json, the state of lineage 'l', is damaged" in watch
    with pytest.raises(StoreError, match="nobody knows which version is champion"):
        ask()
    assert exit_code_of_status() == 1
