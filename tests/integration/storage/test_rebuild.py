"""A lineage whose MLflow database was lost is registered again from the store."""

from __future__ import annotations

import asyncio
import re
import shutil
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from infra.tracking.facts import VersionInfo
from infra.tracking.registry import LineageRebuild, open_registry
from tasks.lineage.rebuild import RebuildResult
from typer.testing import CliRunner

from deal_core.errors import RegistryError
from flows.cli.app import app
from flows.promote import rebuild
from infra.settings import TrackingSettings
from infra.tracking.tracker import open_tracker
from tasks.adaptation.report import read_page
from tasks.lineage.decisions import roll_back
from tasks.lineage.history import read_history
from tasks.predict import predict
from tasks.progress import LogReporter, reporting_to
from tests.adapting import BANK, CLINIC, run
from tests.in_process import KilledError, put_back

BY = {"who": "tester", "why": "a test"}
LOST = (
    r"knows no version of lineage 'l', while the store .* knows 3 versions and version 3 as champion.*"
    r"deal lineage rebuild l"
)
NEW_IN_MLFLOW = ("tracking_id", "model_id")

pytestmark = pytest.mark.usefixtures("prefect_api", "home")


@pytest.fixture
def known(copied_home: Path, mlflow_database: Path) -> list[dict[str, Any]]:
    """The versions in MLflow before an empty database replaced its database."""
    before = what_is_known()
    shutil.copy(mlflow_database, copied_home / "mlflow.db")
    return before


def what_is_known() -> list[dict[str, Any]]:
    return [facts_of(info) for info in open_registry().versions("l")]


def facts_of(info: VersionInfo) -> dict[str, Any]:
    return {name: value for name, value in vars(info).items() if name not in NEW_IN_MLFLOW}


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def rebuilt() -> RebuildResult:
    return asyncio.run(rebuild("l"))


def test_a_lost_database_is_said_and_the_lineage_goes_on_after_a_rebuild(
    home: Path, known: list[dict[str, Any]], tiny_base: Path
) -> None:
    for act in (
        lambda: read_history("l"),
        lambda: run(tiny_base, BANK),
        lambda: roll_back("l", None, **BY),
        lambda: predict("Where is my card?", lineage="l", task=None, version="1"),
    ):
        with pytest.raises(RegistryError, match=LOST):
            act()
    with put_back():
        served = CliRunner().invoke(app, ["serve", "--lineage", "l", "--home", str(home), "--port", "0"])
    assert served.exit_code == 1 and re.search(LOST, " ".join(served.output.split()))
    store = files_of(home / "store")
    done = rebuilt()
    assert (done.versions, done.left_out, done.problems) == (("1", "2", "3"), (), ())
    assert done.aliases == {"champion": "3", "previous": "1", "challenger": "3"}
    assert what_is_known() == known
    assert files_of(home / "store") == store, "the store is only read"
    report, _ = read_page(open_registry().versions("l")[1].tracking_id)
    assert (report.version, report.verdict) == ("2", "rejected")
    with pytest.raises(RegistryError, match=r"knows versions of lineage 'l'.*nothing was changed"):
        rebuilt()

    assert predict("Where is my card?", lineage="l", task=None, version=None).version == "3"
    again = run(tiny_base, CLINIC)
    assert (again.status, again.version) == ("repeat", "3")
    fourth = run(tiny_base, BANK, again=True)
    assert (fourth.status, fourth.version, fourth.parent_version) == ("promoted", "4", "3")
    assert roll_back("l", None, **BY).champion == "3"


@pytest.mark.usefixtures("known")
def test_a_home_that_has_moved_serves_after_a_rebuild(
    home: Path, mlflow_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rebuilt()
    moved = home.rename(tmp_path / "moved")
    monkeypatch.setenv("DEAL_HOME", str(moved))
    with pytest.raises(RegistryError, match=r"no files where MLflow says: .*: deal lineage rebuild l\."):
        open_registry().download("l", "3", tmp_path / "before")
    moved = moved.rename(tmp_path / "moved again")  # else MLflow's open connections go on with the old database
    monkeypatch.setenv("DEAL_HOME", str(moved))
    for part in moved.glob("mlflow.db*"):
        part.unlink()
    shutil.copy(mlflow_database, moved / "mlflow.db")
    rebuilt()
    open_registry().download("l", "3", tmp_path / "after")
    assert (tmp_path / "after" / "MLmodel").is_file()


def test_numbers_of_versions_that_nobody_knows_stay_unused(home: Path, known: list[dict[str, Any]]) -> None:
    for number in (2, 3):
        (home / "store" / "versions" / "l" / f"{number:08d}.json").unlink()
    shutil.rmtree(home / "store" / known[2]["adapter_uri"])
    done = rebuilt()
    assert (done.versions, done.left_out) == (("1",), ("2", "3"))
    assert done.aliases == {"previous": "1", "challenger": "1"}, "the champion is not there"
    facts = {**known[0], "aliases": ("challenger", "previous")}
    assert what_is_known() == [facts]
    registry, info = open_registry(), open_registry().versions("l")[0]
    made = registry.make_version("l", info, tracking_id=info.tracking_id, model_id=info.model_id)
    assert made == 4, "the promotion log names version 3"


@pytest.mark.nightly
def test_a_rebuild_that_was_cut_short_is_given_again(
    known: list[dict[str, Any]], tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = LineageRebuild.make

    def die_at_the_third(self: LineageRebuild, number: int, *args: Any, **options: Any) -> None:
        if number == 3:
            raise KilledError
        make(self, number, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(LineageRebuild, "make", die_at_the_third)
        with pytest.raises(KilledError):
            rebuilt()
    with pytest.raises(RegistryError, match=r"interrupted.*deal lineage rebuild l"):
        run(tiny_base, BANK)
    assert rebuilt().versions == ("1", "2", "3")
    assert what_is_known() == known
    runs = open_tracker().client.search_runs([open_tracker().client.get_experiment_by_name("deal/l").experiment_id])
    assert sorted(each.info.status for each in runs) == ["FINISHED"] * 3, "runs are not doubled"


def test_a_rebuild_that_is_cancelled_ends_at_the_next_version_and_leaves_the_lineage(
    known: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    make, begun, go = LineageRebuild.make, Event(), Event()

    def wait(self: LineageRebuild, number: int, *args: Any, **options: Any) -> None:
        begun.set()
        go.wait(60)
        make(self, number, *args, **options)

    async def cancel() -> None:
        with reporting_to(LogReporter()) as stop:
            working = asyncio.create_task(rebuild("l"))
            await asyncio.to_thread(begun.wait, 60)
            working.cancel()
            while not stop.is_set():
                await asyncio.sleep(0.01)
            go.set()
            with pytest.raises(asyncio.CancelledError):
                await working

    with monkeypatch.context() as patch:
        patch.setattr(LineageRebuild, "make", wait)
        asyncio.run(cancel())
    assert [info.version for info in open_registry().versions("l")] == ["1"]
    assert rebuilt().versions == ("1", "2", "3"), "no run holds the lineage"


def test_a_registered_model_of_somebody_else_is_left_alone(known: list[dict[str, Any]]) -> None:
    client = open_registry().client
    client.create_registered_model("l", description="theirs")
    with pytest.raises(RegistryError, match="no lineage of this pipeline; nothing was changed"):
        rebuilt()
    assert client.get_registered_model("l").description == "theirs"


@pytest.mark.nightly
def test_numbers_are_the_same_where_the_emptied_registered_model_is_left(known: list[dict[str, Any]]) -> None:
    rebuilt()
    for number in ("1", "2", "3"):
        open_registry().client.delete_model_version("l", number)
    assert rebuilt().versions == ("1", "2", "3")
    assert what_is_known() == known


def test_a_version_whose_adapter_is_damaged_comes_back_without_it(home: Path, known: list[dict[str, Any]]) -> None:
    (home / "store" / known[0]["adapter_uri"] / "record.json").write_bytes(b"{")
    done = rebuilt()
    assert done.versions == ("1", "2", "3") and done.aliases["champion"] == "3"
    assert what_is_known() == known
    assert any("Version 1 is in the history only" in line and "record.json" in line for line in done.problems)


@pytest.mark.nightly
def test_a_server_gets_the_same_versions(
    known: list[dict[str, Any]], mlflow_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server)
    assert open_registry().uri == TrackingSettings().tracking_uri == mlflow_server
    done = rebuilt()
    assert (done.versions, done.problems) == (("1", "2", "3"), ())
    assert what_is_known() == known
    assert predict("Where is my card?", lineage="l", task=None, version=None).version == "3"
