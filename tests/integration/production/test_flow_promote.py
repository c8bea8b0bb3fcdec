"""Promotion, rollback, rejection, approval and requeue on a lineage of real versions."""

from __future__ import annotations

import asyncio
import json
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings
from typer.testing import CliRunner

from benchmarks.tiny_base import EXAMPLES, NO_LIMITS
from deal_core.errors import DataValidationError, RegistryError
from deal_pipeline.cli.app import app
from flows.adapt import adapt
from flows.adapt_result import AdaptResult
from flows.requeue import requeue
from infra.promotions import PromotionLog
from infra.store.base import ObjectStore
from infra.store.opening import open_store
from infra.versions import Since, Version, Versions
from tasks.housekeeping.arrivals import list_data
from tasks.lineage.history import find_version
from tasks.lineage.promotion import (
    find_left_behind,
    move_champion,
    promote_to,
    reject_version,
    roll_back,
)
from tasks.spec import AdaptSpec, parse
from tests.adapting import next_parent
from tests.conftest import MakeOnce
from tests.e2e.command import DEAL, environment
from tests.in_process import KilledError, deal, deal_json
from tests.integration.conftest import copy_home
from tests.loopback import Loopback, free_port
from tests.receiver import Receiver

TASKS = {
    "bank": {"name": "bank", "data": str(EXAMPLES / "bank" / "train.jsonl")},
    "parcels": {"name": "parcels", "data": str(EXAMPLES / "parcels" / "messages.jsonl")},
    "clinic": {
        "name": "clinic",
        "data": str(EXAMPLES / "clinic" / "train.csv"),
        "columns": {"text": "note", "label": "finding"},
    },
    "clinic, more": {
        "name": "clinic",
        "data": str(EXAMPLES / "clinic" / "test.csv"),
        "columns": {"text": "note", "label": "finding"},
    },
}
BY = {"who": "tester", "why": "a test"}

pytestmark = pytest.mark.usefixtures("prefect_api", "home", "without_mlflow")


def learn(base: Path, task: str, *, again: bool = False, **gate: Any) -> AdaptResult:
    values = {
        "lineage": "l",
        "base_model": str(base),
        "task": TASKS[task],
        "gate": {**NO_LIMITS, **gate},
        "train": {"max_steps": 2, "max_prompt_tokens": 96, "max_answer_tokens": 8, "checkpoint_steps": 0},
    }
    return asyncio.run(adapt(parse(AdaptSpec, values, "test"), again=again))


@pytest.fixture(scope="session")
def two_versions(tiny_base: Path, home_made_once: MakeOnce) -> Path:
    """A home whose lineage has learned two tasks."""

    def make(folder: Path) -> None:
        assert [learn(tiny_base, task).status for task in ("bank", "parcels")] == ["promoted", "promoted"]

    return home_made_once("promote-two-versions", make)


@pytest.fixture(scope="session")
def third_waits(two_versions: Path, tiny_base: Path, home_made_once: MakeOnce) -> Path:
    """The same, and a third version that waits for its approval."""

    def make(folder: Path) -> None:
        copy_home(two_versions, folder)
        assert learn(tiny_base, "clinic", approval="manual").status == "awaiting approval"

    return home_made_once("promote-third-waits", make)


@pytest.fixture
def lineage(copy_to_home: Callable[[Path], Path], two_versions: Path) -> None:
    """The two versions, in a copy of the home."""
    copy_to_home(two_versions)


@pytest.fixture
def waiting(copy_to_home: Callable[[Path], Path], third_waits: Path) -> None:
    """The two versions and the one that waits, in a copy of the home."""
    copy_to_home(third_waits)


def die(*args: Any) -> None:
    """A step at which the process ends."""
    raise KilledError


def aliases() -> dict[str, str]:
    return {alias: info.version for info in Versions(open_store()).all("l") for alias in info.aliases}


@pytest.mark.usefixtures("lineage")
def test_page_and_lists_say_that_a_version_was_rolled_back_and_why(home: Path) -> None:
    page = home / "page.html"
    commands = {
        "list": ["version", "list", "--lineage", "l"],
        "show": ["version", "show", "2", "--lineage", "l", "--report", "--out", str(page)],
        "data": ["data", "list"],
    }
    before = {name: deal(*words) for name, words in commands.items()} | {"page": page.read_text()}
    assert not any("rolled back" in text for text in before.values())
    roll_back(open_store(), "l", None, who="tester", why="wrong <labels>")
    after = {name: deal(*words) for name, words in commands.items()} | {"page": page.read_text()}
    said = "rolled back to version 1 on "
    assert all(said in " ".join(text.split()) for text in after.values())
    assert all("wrong <labels>" in " ".join(after[name].split()) for name in commands)
    assert "wrong &lt;labels&gt;" in after["page"]
    of_first = next(arrival for arrival in list_data(open_store()) if arrival.task == "bank")
    assert of_first.state == "learned"


@pytest.mark.nightly
def test_what_was_left_behind_is_learned_again_only_when_asked(tiny_base: Path, lineage: None) -> None:
    roll_back(open_store(), "l", None, **BY)
    repeat = learn(tiny_base, "parcels")
    assert repeat.status == "repeat" and "deal version requeue 2 --lineage l" in repeat.message
    third = learn(tiny_base, "clinic")
    assert (third.version, third.parent_version) == ("3", "1"), "the lineage branches at the rollback"
    assert [left.version for left in find_left_behind(open_store(), "l")] == ["2"]

    async def requeue_twice_at_once() -> list[list[AdaptResult]]:
        return await asyncio.gather(requeue("l"), requeue("l"))

    nothing, (result,) = sorted(asyncio.run(requeue_twice_at_once()), key=len)
    assert nothing == [], "the second run looks after the first has ended"
    assert (result.status, result.task, result.version, result.parent_version) == ("promoted", "parcels", "4", "3")
    assert find_left_behind(open_store(), "l") == ()
    (named,) = asyncio.run(requeue("l", ["2"]))
    for repeat in (named, learn(tiny_base, "parcels")):
        assert repeat.message.startswith("Nothing to do: version 4 has learned")


@pytest.mark.nightly
def test_an_arrival_that_is_now_the_first_of_its_task_is_learned_again_once(tiny_base: Path, lineage: None) -> None:
    learn(tiny_base, "clinic")
    before = learn(tiny_base, "clinic, more")
    assert (before.version, before.dataset.num_test, before.dataset.num_added) == ("4", 7, 7), "a fifth of its rows"
    roll_back(open_store(), "l", "2", **BY)
    assert "deal version requeue 4 --lineage l" in learn(tiny_base, "clinic, more").message
    (after,) = asyncio.run(requeue("l", ["4"]))
    assert (after.status, after.version, after.parent_version) == ("promoted", "5", "2")
    assert after.dataset.num_test == 12 and after.dataset.sha256 != before.dataset.sha256, (
        "a third, as of any first file"
    )
    assert [left.version for left in find_left_behind(open_store(), "l")] == ["3"]
    (named,) = asyncio.run(requeue("l", ["4"]))
    for repeat in (named, learn(tiny_base, "clinic, more")):
        assert repeat.message.startswith("Nothing to do: version 5 has learned")


@pytest.mark.usefixtures("lineage")
def test_nothing_is_learned_again_where_another_file_lies_by_now(tmp_path: Path) -> None:
    roll_back(open_store(), "l", None, **BY)
    store, key = open_store(), f"{Versions(open_store()).all('l')[1].adapter_uri}/findings.json"
    findings, moved = json.loads(store.get_bytes(key)), tmp_path / "messages.jsonl"
    moved.write_bytes(Path(TASKS["parcels"]["data"]).read_bytes() + b"\n")
    findings["spec"]["task"]["data"] = str(moved)
    store.put_bytes(key, json.dumps(findings).encode())
    with pytest.raises(DataValidationError, match="land the old file again"):
        asyncio.run(requeue("l"))
    assert len(Versions(open_store()).all("l")) == 2


def test_a_version_that_needs_approval_waits_and_is_no_parent(tiny_base: Path, waiting: None) -> None:
    assert aliases() == {"champion": "2", "previous": "1", "challenger": "3"}
    repeat = learn(tiny_base, "clinic", approval="manual")
    assert (repeat.status, repeat.rejected, repeat.version) == ("repeat", False, "3")
    assert "deal version promote 3 --lineage l" in repeat.message
    parent = next_parent()
    assert parent is not None and parent.version == "2"

    promote_to(open_store(), "l", "3", **BY)
    assert aliases() == {"champion": "3", "previous": "2", "challenger": "3"}
    assert [entry.approval for entry in Versions(open_store()).all("l")] == [None, None, "given"]
    assert learn(tiny_base, "clinic").message.startswith("Nothing to do: version 3 has learned")


def test_a_refused_version_never_serves(tiny_base: Path, waiting: None) -> None:
    reject_version(open_store(), "l", "3", who="tester", why="labels look wrong")
    for move in (promote_to, roll_back):
        with pytest.raises(RegistryError, match="rejected by a person"):
            move(open_store(), "l", "3", **BY)
    assert next_parent() is not None and aliases()["champion"] == "2", "a later run does not complete it"
    last = PromotionLog(open_store()).moves("l")[-1]
    assert (last.action, last.version, last.champion, last.why) == ("rejected", "3", "2", "labels look wrong")
    assert "was rejected" in learn(tiny_base, "clinic", approval="manual").message


def test_a_version_that_would_wait_is_refused_if_its_parent_lost_the_championship_during_its_run(
    tiny_base: Path, waiting: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Versions.register

    def approve_the_other(versions: Versions, version: Version) -> Version:
        made = whole(versions, version)
        promote_to(open_store(), "l", "3", **BY)
        return made

    with monkeypatch.context() as patch:
        patch.setattr(Versions, "register", approve_the_other)
        with pytest.raises(RegistryError, match=r"version 3 is champion now.*Run the same command again"):
            learn(tiny_base, "clinic", again=True, approval="manual")
    assert aliases() == {"champion": "3", "previous": "2", "challenger": "4"}
    assert [entry.standing for entry in Versions(open_store()).all("l")][-1] == "left behind", "it does not wait"


@pytest.mark.usefixtures("lineage")
def test_an_arrival_that_was_promoted_and_then_rejected_is_learned_with_other_settings(tiny_base: Path) -> None:
    roll_back(open_store(), "l", "1", **BY)
    reject_version(open_store(), "l", "2", **BY)
    same = learn(tiny_base, "parcels")
    assert (same.status, same.version) == ("repeat", "2") and "change the settings" in same.message
    assert learn(tiny_base, "parcels", max_drop_points=99).status == "promoted"


@pytest.mark.usefixtures("lineage")
def test_of_two_moves_at_once_one_wins_and_the_other_is_told() -> None:
    roll_back(open_store(), "l", "1", **BY)

    def move(number: int) -> str:
        try:
            promote_to(open_store(), "l", "2", who=f"person {number}", why="race")
        except RegistryError as error:
            return str(error)
        return "won"

    with ThreadPoolExecutor(4) as pool:
        outcomes = list(pool.map(move, range(4)))
    assert outcomes.count("won") >= 1 and aliases()["champion"] == "2"
    told = [text for text in outcomes if text != "won" and "person" not in text and "champion already" not in text]
    assert told == []
    assert [move.version for move in PromotionLog(open_store()).moves("l")] == ["1", "2", "1", "2"], (
        "the log has one promotion"
    )


@pytest.mark.usefixtures("waiting")
def test_a_rejection_holds_for_who_read_the_version_before_it() -> None:
    waiting = Versions(open_store()).all("l")[-1]
    reject_version(open_store(), "l", "3", **BY)
    for before in (waiting, waiting.model_copy(update={"since": Since()})):
        with pytest.raises(RegistryError, match="rejected by a person"):
            move_champion(open_store(), before, expected="2", action="promoted", **BY)
    assert (aliases()["champion"], PromotionLog(open_store()).moves("l")[-1].action) == ("2", "rejected")


@pytest.mark.nightly
def test_a_version_whose_run_died_before_its_promotion_is_promoted_by_the_next_run(
    tiny_base: Path, lineage: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(PromotionLog, "add", die)
        with pytest.raises(KilledError):
            learn(tiny_base, "clinic")
    assert aliases()["champion"] == "2" and len(Versions(open_store()).all("l")) == 3
    parent = next_parent()
    assert parent is not None and parent.version == "3" == aliases()["champion"]
    assert roll_back(open_store(), "l", None, **BY).before == "3"
    parent = next_parent()
    assert parent is not None and parent.version == "2", "a version that was rolled back is not promoted again"
    assert "deal version requeue 3" in learn(tiny_base, "clinic").message


@pytest.mark.usefixtures("waiting")
def test_a_rejection_does_not_undo_a_move_that_was_made_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    def find_slowly(store: ObjectStore, lineage: str, version: str) -> Version:
        monkeypatch.setattr("tasks.lineage.promotion.find_version", find_version)
        roll_back(store, "l", "1", **BY)
        return find_version(store, lineage, version)

    monkeypatch.setattr("tasks.lineage.promotion.find_version", find_slowly)
    with pytest.raises(RegistryError, match="try again"):
        reject_version(open_store(), "l", "3", **BY)
    assert (aliases()["champion"], PromotionLog(open_store()).moves("l")[-1].champion) == ("1", "1")


@pytest.mark.usefixtures("lineage")
def test_a_move_is_logged_and_printed_before_a_prefect_server_that_is_away_is_asked(home: Path, tmp_path: Path) -> None:
    printed, first_look = tmp_path / "printed", list[tuple[str, str | None]]()

    class Away(BaseHTTPRequestHandler):
        """Refuses every request, and looks at the first one what the command has done so far."""

        def do_GET(self) -> None:
            first_look.append((printed.read_text(), PromotionLog(open_store()).moves("l")[-1].champion))
            self.send_error(503)

        do_POST = do_GET

    with Loopback(Away) as server, printed.open("w") as output:
        variables = environment(PREFECT_API_URL=f"{server.address}/api", DEAL_HOME=str(home))
        command = [*DEAL, "version", "rollback", "--lineage", "l"]
        done = subprocess.run(command, env=variables, stdout=output, stderr=subprocess.PIPE, text=True, check=False)
    assert "Champion of l: version 1" in first_look[0][0] and first_look[0][1] == "1"
    assert done.returncode == 0 and f"The Prefect server at {server.address}/api does not answer" in done.stderr


@pytest.mark.usefixtures("lineage")
def test_each_decision_stands_and_ends_well_without_its_prefect_server(home: Path, receiver: Receiver) -> None:
    nowhere = f"http://127.0.0.1:{free_port()}/api"
    with temporary_settings({PREFECT_API_URL: nowhere}):
        for words in (["rollback"], ["promote", "2"], ["rollback"], ["reject", "2", "--reason", "wrong labels"]):
            done = CliRunner().invoke(app, ["version", *words, "--lineage", "l", "--home", str(home)])
            assert done.exit_code == 0 and f"The Prefect server at {nowhere} does not answer" in done.stderr
    moves = [(move.action, move.champion) for move in PromotionLog(open_store()).moves("l")]
    assert moves[2:] == [("rolled back", "1"), ("promoted", "2"), ("rolled back", "1"), ("rejected", "1")]
    kinds = [notice["event"].rpartition(".")[2] for notice in receiver.told()]
    assert kinds == ["rolled-back", "promoted", "rolled-back", "rejected"], "the webhook is told all the same"


@pytest.mark.usefixtures("lineage")
def test_the_commands_say_what_they_did() -> None:
    def version(*words: str) -> Any:
        return deal_json("version", *words, "--lineage", "l")

    assert version("rollback", "--reason", "complaints")["left_behind"][0]["task"] == "parcels"
    assert version("list", "--moves")[-1]["why"] == "complaints"
    assert version("list", "--at", "2001-01-01")["champion"] is None
    assert version("list", "--at", f"{datetime.now():%Y-%m-%dT23:59:59}")["champion"] == "1"
    assert [each["version"] for each in version("requeue")] == ["2"]
    assert version("promote", "2")["champion"] == "2"
