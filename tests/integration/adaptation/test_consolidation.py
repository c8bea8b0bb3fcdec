"""Consolidation: what is left of all arrivals is learned together, by the stages of an adaptation."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

import flows.adapt
import tasks.adaptation.train
from deal_core.adapter.state import load_method_state
from deal_core.errors import ConfigError
from deal_core.strategies.kept_rows import sizes_of
from deal_pipeline.cli.app import app
from deal_pipeline.server.status import read_status
from flows.adapt_result import AdaptResult
from flows.consolidate import consolidate, plan
from flows.forget import forget, plan_forget
from flows.requeue import requeue
from flows.watch import WatchResult, watch
from infra.run_journal import RunJournal
from infra.store.opening import open_store
from infra.versions import Version, Versions
from tasks.housekeeping.arrivals import list_data
from tasks.lineage.history import find_version
from tasks.lineage.promotion import roll_back
from tasks.lineage.record import read_record
from tasks.lineage.settings import WatchedLineage, add_lineage, read_lineage
from tasks.lineage.tombstones import TestRowsForgottenError
from tasks.lineage.version_files import borrowed_adapter
from tasks.spec import parse
from tests.adapting import BANK, CLINIC, PASS, evaluation_of, page_of, run, version_of
from tests.conftest import MakeOnce
from tests.in_process import put_back
from tests.integration.conftest import copy_home
from tests.registering import mlflow_run

pytestmark = pytest.mark.usefixtures("prefect_api", "home")

ROOT = Path(__file__).parents[3]
TRAIN = {"max_steps": 3, "max_prompt_tokens": 192, "max_answer_tokens": 12, "checkpoint_steps": 0}
NUM_KEPT = 72 // 4
"""Rows that are kept of 72."""


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """Undo what a command sets in this process."""
    with put_back():
        yield


class Killed(BaseException):
    """The death of a process."""


@pytest.fixture(scope="session")
def two_tasks(tiny_base: Path, bank_home: Path, home_made_once: MakeOnce) -> Path:
    """A home whose lineage `l` has learned two tasks."""

    def learn(folder: Path) -> None:
        copy_home(bank_home, folder)
        assert run(tiny_base, CLINIC).status == "promoted"

    return home_made_once("two-tasks", learn)


@pytest.fixture
def learned(two_tasks: Path, copy_to_home: Callable[[Path], Path]) -> None:
    """The two tasks, in the test's home."""
    copy_to_home(two_tasks)


def kept_by(number: str) -> dict[str, int]:
    """How many rows of each task a version keeps."""
    with borrowed_adapter(open_store(), find_version(open_store(), "l", number), with_method=True) as folder:
        kept = load_method_state(folder).kept_rows
    return {task: size.num_rows for task, size in sizes_of(kept, ["bank", "clinic"]).items()}


def consolidated(start: Any = None) -> AdaptResult:
    return asyncio.run(consolidate("l", start))


def facts(version: Version) -> tuple[Any, ...]:
    return version.kind, version.parent_version, version.starts_from_base, version.standing


@pytest.mark.usefixtures("learned")
def test_a_consolidation_learns_all_arrivals_and_is_judged_against_the_champion(
    monkeypatch: pytest.MonkeyPatch, tiny_base: Path
) -> None:
    rows: dict[str, list[str]] = {}
    gather = tasks.adaptation.train.gather_rows

    def watched(store: Any, planned: Any, record: Any, folder: Path) -> Any:
        files = gather(store, planned, record, folder)
        rows.update({file.task.name: pq.read_table(file.rows_file).column("input").to_pylist() for file in files})
        return files

    monkeypatch.setattr(tasks.adaptation.train, "gather_rows", watched)
    result = consolidated()
    assert (result.status, result.version, result.parent_version) == ("promoted", "3", "2")
    version = version_of(result)
    assert facts(version) == ("consolidation", "2", True, "learned")
    assert [(arrival.task, arrival.rows) for arrival in version.arrivals] == [("bank", "all"), ("clinic", "all")]
    first, second = Versions(open_store()).all("l")[:2]
    assert [arrival.dataset_sha256 for arrival in version.arrivals] == [first.dataset_sha256, second.dataset_sha256]

    assert {task: len(texts) for task, texts in rows.items()} == {"bank": 72, "clinic": 72}
    tests = {json.loads(line)["text"] for line in Path(BANK["test_data"]).read_text().splitlines()}
    assert not tests & set(rows["bank"]), "test rows are never learned"
    assert kept_by("3") == kept_by("2") == {"bank": NUM_KEPT, "clinic": NUM_KEPT}, "the kept rows are handed on"

    assert [(each.version, each.is_direct) for each in plan_forget(open_store(), first.dataset_sha256).learned] == [
        ("1", True),
        ("2", False),
        ("3", True),
    ]
    assert {entry.dataset_sha256: entry.learned_by for entry in list_data(open_store())} == {
        first.dataset_sha256: ("l/1", "l/3"),
        second.dataset_sha256: ("l/2", "l/3"),
    }, "a consolidation is no arrival"
    assert mlflow_run("l", version.run_key).data.metrics["debt/bank"] == pytest.approx(version.debts["bank"])

    matrix = read_record(open_store(), version).matrix
    assert matrix.learned == ("bank", "clinic", "(consolidation)")
    assert matrix.trained == ("bank", "clinic", "clinic") and matrix.consolidated == (2,)
    report = evaluation_of(result)
    assert report["is_consolidation"] and set(report["parent_accuracies"]) == {"bank", "clinic"}
    assert version.base_divergence == report["base_divergence"] > 0
    assert "KL to the base model on clinic" in page_of(result)[1]
    assert set(version.debts) == {"bank", "clinic"} and report["debts"]["bank"]["since"] == "1"
    assert report["debts"]["clinic"]["since"] == "2" and report["debts"]["clinic"]["paired"] is not None
    assert "has learned 2 arrivals together" in page_of(result)[1] and "(consolidation)" in page_of(result)[1]
    assert (version.kind, version.learned) == ("consolidation", "2 arrivals together")

    assert consolidated().status == "repeat", "there is nothing new to consolidate"
    with pytest.raises(ConfigError, match="is a consolidation, which has no arrival of its own"):
        asyncio.run(requeue("l", ["3"]))
    after = run(tiny_base, {**BANK, "name": "bank2"})
    assert (after.status, after.parent_version) == ("promoted", "3"), "a consolidation is continued as any version"
    assert {part.version for part in plan(open_store(), "l").parts} == {"1", "2", "4"}


@pytest.mark.usefixtures("without_mlflow")
def test_what_is_left_is_learned_and_what_is_gone_is_named(tiny_base: Path, tmp_path: Path, home: Path) -> None:
    files = {}
    for task in (BANK, CLINIC):
        files[task["name"]] = tmp_path / Path(task["data"]).name
        shutil.copy(task["data"], files[task["name"]])
    spec = {"rehearsal": {"rows": 0}}
    run(tiny_base, {**BANK, "data": str(files["bank"])}, data={"retain_training_rows": True}, **spec)
    run(tiny_base, {**CLINIC, "data": str(files["clinic"])}, **spec)
    assert {part.task: part.source for part in plan(open_store(), "l").parts} == {"bank": "retained", "clinic": "files"}

    files["bank"].unlink()  # the store has its rows
    text = files["clinic"].read_text()
    files["clinic"].write_text(text + text.splitlines()[-1] + "\n")  # another file has this name now
    with pytest.raises(ConfigError, match="No row of clinic is left, so a version that starts from the base model"):
        plan(open_store(), "l")
    left = plan(open_store(), "l", "champion")
    assert (left.gone, [part.source for part in left.parts]) == (("clinic",), ["retained", "none"])
    assert "is not a file that version 2 of 'l' was trained on" in left.parts[1].why
    assert [arrival.task for arrival in left.arrivals] == ["bank"]

    files["clinic"].unlink()
    result = consolidated("champion")
    notes = evaluation_of(result)["notes"]
    assert "1 of 2 arrivals were learned together, from the champion" in notes and "no row is left of clinic" in notes
    assert [arrival.task for arrival in version_of(result).arrivals] == ["bank"]


@pytest.mark.nightly
def test_kept_rows_stand_in_for_rows_that_are_gone(tiny_base: Path, tmp_path: Path) -> None:
    file = tmp_path / "bank.jsonl"
    shutil.copy(BANK["data"], file)
    run(tiny_base, {**BANK, "data": str(file)})
    run(tiny_base, CLINIC)
    file.unlink()
    planned = plan(open_store(), "l")
    assert planned.kept == {"bank": NUM_KEPT} and planned.num_rows == NUM_KEPT + 72
    result = consolidated()
    version = version_of(result)
    assert [(arrival.task, arrival.rows) for arrival in version.arrivals] == [("bank", "kept"), ("clinic", "all")]
    assert (
        f"of arrivals without their rows, the kept ones were learned: {NUM_KEPT} of bank"
        in evaluation_of(result)["notes"]
    )
    assert result.accuracies.keys() == {"bank", "clinic"}


@pytest.mark.nightly
@pytest.mark.usefixtures("learned", "without_mlflow")
def test_rows_that_were_forgotten_are_never_learned_again(tiny_base: Path, tmp_path: Path) -> None:
    file = tmp_path / "more.jsonl"
    rows = [json.loads(line) for line in Path(BANK["data"]).read_text().splitlines()]
    file.write_text("".join(json.dumps({**row, "text": f"{row['text']} Please."}) + "\n" for row in rows))
    run(tiny_base, {**BANK, "data": str(file), "test_data": None})
    forgotten = find_version(open_store(), "l", "3").dataset_sha256
    asyncio.run(forget(forgotten, "a complaint"))
    assert file.exists(), "a file outside of the inbox is left to its owner"
    last = plan(open_store(), "l").parts[-1]
    assert (last.version, last.source, last.num_rows) == ("3", "none", 0) and "(a complaint)" in last.why
    consolidated()
    learned = [each.version for each in plan_forget(open_store(), forgotten).learned]
    assert learned == ["3"], "version 4 starts from the base model and has not seen the rows"

    bank = Versions(open_store()).all("l")[0].dataset_sha256
    roll_back(open_store(), "l", "3", who="test", why="to try again")
    asyncio.run(forget(bank, "test"))  # with the test rows of the task
    with pytest.raises(TestRowsForgottenError, match="no version can be judged on it"):
        plan(open_store(), "l")


def has_one_consolidation(home: Path) -> None:
    """Assert that one consolidation is champion, and that nothing of its run is left."""
    store = open_store()
    assert [facts(version) for version in Versions(store).all("l")[2:]] == [("consolidation", "2", True, "learned")]
    assert [each.state for each in RunJournal(store).all("l")] == ["finished"] * 3
    assert not list((home / "work").rglob("*.*")), "the gathered rows are gone"


@pytest.mark.nightly
@pytest.mark.usefixtures("learned", "without_mlflow")
@pytest.mark.parametrize("stage", ["evaluate_version", "register_version", "promote_version", "report_version"])
def test_a_consolidation_that_died_later_is_completed(home: Path, stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(*given: Any, **more: Any) -> None:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(flows.adapt, stage, die)
        with pytest.raises(Killed):
            consolidated()
    is_registered = stage in ("promote_version", "report_version")
    assert consolidated().status == ("repeat" if is_registered else "promoted")
    has_one_consolidation(home)


@pytest.mark.usefixtures("learned", "without_mlflow")
def test_the_command_shows_the_plan_asks_and_trains() -> None:
    shown = CliRunner().invoke(app, ["lineage", "consolidate", "l", "--dry-run", "--json"])
    planned = json.loads(shown.stdout)
    assert (planned["start"], planned["champion"], planned["num_rows"]) == ("base", "2", 144)
    assert planned["seconds"] > 0 and len(Versions(open_store()).all("l")) == 2
    asked = CliRunner().invoke(app, ["lineage", "consolidate", "l"])
    assert asked.exit_code == 2 and "give --yes, or --dry-run" in asked.stderr
    done = CliRunner().invoke(app, ["lineage", "consolidate", "l", "--from", "champion", "--yes"])
    assert done.exit_code == 0, done.stderr
    assert "(consolidation)" in done.stdout and "Version 3 of l is champion." in done.stdout
    assert "2 arrivals together" in CliRunner().invoke(app, ["version", "show", "3"]).stdout


def land(home: Path, task: str, name: str, source: str) -> None:
    path = home / "store" / "inbox" / task / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes((ROOT / "tests" / "data" / "examples" / source).read_bytes())
    os.utime(path, (1_700_000_000 + len(list(path.parent.parent.rglob("*"))),) * 2)


def watched(base: Path, gate: dict[str, Any] | None = None, **policy: Any) -> WatchedLineage:
    values = {
        "lineage": "l",
        "base_model": str(base),
        "gate": {**PASS, **(gate or {})},
        "train": TRAIN,
        "consolidate": policy,
    }
    add_lineage(open_store(), parse(WatchedLineage, values, "test"), values)
    return read_lineage(open_store(), "l")


def look(spec: WatchedLineage) -> WatchResult:
    return asyncio.run(watch(spec, once=True, poll_seconds=0.1))


@pytest.mark.usefixtures("without_mlflow")
def test_a_spent_budget_lets_a_watch_consolidate_and_learn_again_what_was_rejected(
    tiny_base: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tasks.adaptation import gate

    decide, spent = gate.decide, []

    def spend(report: Any, config: Any) -> Any:
        """The second version spends the budget, whatever the tiny model answers."""
        decision = decide(report, config)
        if report.task == "parcels-b" and not spent:
            from deal_core.evaluation.gate import FailedCheck, GateDecision

            spent.append(True)
            check = FailedCheck(
                kind="total_drop", task="parcels-a", value=9.0, limit=8.0, message="The budget is spent."
            )
            return GateDecision((check,))
        return decision

    monkeypatch.setattr(gate, "decide", spend)
    spec = watched(tiny_base, gate={"max_total_drop_points": 100.0}, when_spent=True)
    for name in ("a", "b"):
        land(home, f"parcels-{name}", "all.jsonl", "parcels/messages.jsonl")
    outcomes = [(seen.key.split("/")[1], seen.outcome) for seen in look(spec).files]
    assert outcomes == [("parcels-a", "promoted"), ("parcels-b", "rejected"), ("parcels-b", "promoted")]
    versions = Versions(open_store()).all("l")
    assert [(version.kind, version.parent_version) for version in versions] == [
        ("adaptation", None),
        ("adaptation", "1"),
        ("consolidation", "1"),
        ("adaptation", "3"),
    ]
    status = asyncio.run(read_status(home)).lineages[0]
    assert status.budget_points == 100.0 and status.consolidation is None and set(status.debts) == {"parcels-a"}
