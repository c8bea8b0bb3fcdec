"""A branch that is killed, stopped by a gate or given up, and what waits for it."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import flows.adapt
import flows.relearn
import tasks.adaptation.gate
from deal_core.data.rows import stored_input_digest
from deal_core.errors import ConfigError, RegistryError
from deal_core.evaluation.gate import FailedCheck, GateDecision
from deal_pipeline.cli.app import app
from flows.branch import give_up
from flows.lock import lock_lineage
from flows.relearn import plan_relearn
from flows.requeue import requeue
from flows.watch import watch
from infra.branches import Branches
from infra.log_batches import put_rows
from infra.predictions import prediction_log, read_predictions
from infra.promotions import PromotionLog
from infra.run_journal import RunJournal
from infra.settings import EngineSettings
from infra.store.opening import open_store
from infra.versions import Versions
from tasks.adaptation.gate import judge_against
from tasks.lineage.branch import BranchOpenError, ChampionMovedError, accept_result
from tasks.lineage.history import find_version
from tasks.lineage.promotion import find_left_behind, promote_to, roll_back
from tasks.lineage.record import read_record
from tasks.lineage.reports import read_page
from tasks.lineage.settings import WatchedLineage
from tasks.serving.publish import publish
from tasks.spec import AdaptSpec, parse
from tests.adapting import run
from tests.in_process import KilledError, put_back
from tests.integration.branches.conftest import champion, delete, small_task

pytestmark = pytest.mark.usefixtures("prefect_api", "learned")


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """Undo what a command sets in this process."""
    with put_back():
        yield


def numbers() -> list[str]:
    return [version.version for version in Versions(open_store()).all("l")]


def moves() -> list[tuple[str, str | None]]:
    return [(move.action, move.champion) for move in PromotionLog(open_store()).moves("l")]


def dying(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: Callable[[], object]) -> None:
    """Run `call`, in which the process dies where `owner.name` is called."""

    def die(*_: object, **__: object) -> None:
        raise KilledError(name)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, die)
        with pytest.raises(KilledError, match=name):
            call()


def accept(reason: str) -> None:
    """Accept what a branch made, by command."""
    command = ["lineage", "branch", "l", "--accept", "--reason", reason, "--json"]
    done = CliRunner().invoke(app, command, catch_exceptions=False)
    assert done.exit_code == 0, done.output


def reject(monkeypatch: pytest.MonkeyPatch, task: str) -> None:
    """Let the gate reject the versions that learn a task."""
    decide = tasks.adaptation.gate.decide

    def strict(report: Any, config: Any) -> GateDecision:
        check = FailedCheck(kind="floor", task=task, value=0.0, limit=1.0, message="It is too bad.")
        return GateDecision((check,)) if report.task == task else decide(report, config)

    monkeypatch.setattr(tasks.adaptation.gate, "decide", strict)


def log_answer(text: str) -> None:
    """Store an answer to a text, as a server that did not look for deletions."""
    row = {"id": "1", "time": 1.0, "input": text, "output": "warm"}
    row["input_sha256"] = stored_input_digest("labelled", text).hex()
    put_rows(open_store(), prediction_log("l"), [row])


def test_it_goes_on_wherever_it_was_killed_and_learns_nothing_twice(
    monkeypatch: pytest.MonkeyPatch, three_tasks: Path
) -> None:
    monkeypatch.setattr("flows.forget.BATCH_SECONDS", 0.0)  # no server answers
    before, rows = numbers(), (three_tasks / "beds.jsonl").read_bytes()
    text = json.loads(rows.splitlines()[0])["text"]
    open_store().put_bytes("inbox/beds/a.jsonl", rows)
    for owner, name in (
        (flows.relearn, "forget"),
        (flows.relearn, "grow"),
        (flows.adapt, "report_version"),
        (flows.relearn, "swap_in"),
        (flows.relearn, "_remove_adapters"),
        (flows.relearn, "remove_exports"),
        (Branches, "end"),
    ):
        dying(monkeypatch, owner, name, lambda: delete("beds", stops_serving=True))
        with pytest.raises(BranchOpenError, match="new arrivals wait"):
            run(Path("no-base"), {"name": "taps", "data": "no-file"})
        serving = Versions(open_store()).champion("l")
        if serving is None:
            with pytest.raises(RegistryError, match="no champion for now: versions of 'l' are made again"):
                find_version(open_store(), "l", None)
        assert (serving and serving.version) == ("4" if name in ("_remove_adapters", "remove_exports", "end") else None)
        if name == "swap_in":
            log_answer(text)
    remove = flows.relearn.remove_exports

    def answer_and_remove(*arguments: Any) -> Any:
        assert read_predictions(open_store(), "l").empty, "the call has searched at its begin"
        log_answer(text)
        return remove(*arguments)

    monkeypatch.setattr(flows.relearn, "remove_exports", answer_and_remove)
    result = delete("beds")
    assert (result.status, result.champion, [made.remakes for made in result.made]) == ("swapped", "4", ["3"])
    assert numbers() == [*before, "4"] and moves()[3:] == [("stopped", None), ("promoted", "4")], "one version"
    assert champion().parent_version == "1"
    assert {run.state for run in RunJournal(open_store()).all("l")} == {"finished"}
    (known,) = Branches(open_store()).all("l")
    assert known.end is not None and known.end.attestation == result.attestation
    assert result.attestation is not None and (result.attestation.num_inputs, result.attestation.unknown) == (32, ())
    assert read_predictions(open_store(), "l").empty
    for gone in ("2", "3"):
        with pytest.raises(RegistryError, match="deal data delete --relearn"):
            find_version(open_store(), "l", gone)
    store = open_store()
    assert [store.exists(f"{find_uri(number)}/adapter_model.safetensors") for number in ("1", "2", "3", "4")] == [
        True,
        False,
        False,
        True,
    ]
    assert delete("beds").branch.arrivals == {}, "the present champion never saw the rows"


def test_an_arrival_is_refused_at_once_while_the_branch_is_at_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever holds the lineage: the run that makes versions again takes long."""
    dying(monkeypatch, flows.relearn, "grow", lambda: delete("beds"))

    async def ask() -> None:
        async with lock_lineage("l"), asyncio.timeout(120):
            spec = {"lineage": "l", "task": {"name": "taps", "data": "no-file"}}
            await flows.adapt.adapt(parse(AdaptSpec, spec, "test"))

    with pytest.raises(BranchOpenError):
        asyncio.run(ask())


def find_uri(number: str) -> str:
    version = Versions(open_store()).find("l", number)
    assert version is not None
    return version.adapter_uri


def test_a_rejected_version_stops_it_and_what_lands_waits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    store = open_store()
    with monkeypatch.context() as patch:
        reject(patch, "beds")
        result = delete("taps")
        assert (result.status, result.champion) == ("stopped", "3") and "too bad" in result.message
        assert champion().version == "3" and numbers() == ["1", "2", "3", "4"]
        assert find_version(store, "l", "4").branch == 1 and not find_version(store, "l", "4").accepted
        store.put_bytes("inbox/beds/june.jsonl", Path(small_task(tmp_path, "beds", "-june")["data"]).read_bytes())
        assert asyncio.run(watch(WatchedLineage(lineage="l"), once=True, poll_seconds=0.1)).files == ()
        dying(monkeypatch, Branches, "end", lambda: delete("taps", skip_rejected=True))
    result = delete("taps", skip_rejected=True)  # after the swap nothing is learned any more
    assert (result.status, result.champion) == ("swapped", "5") and numbers() == ["1", "2", "3", "4", "5"]
    assert [(made.remakes, made.accepted) for made in result.made] == [("2", False), ("3", True)]
    assert champion().parent_version is None, "it starts from the base model, since beds was left out"


def test_a_branch_that_is_given_up_leaves_the_champion_and_its_versions_never_serve(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dying(monkeypatch, flows.relearn, "swap_in", lambda: delete("beds", stops_serving=True))
    assert Versions(open_store()).champion("l") is None and moves()[-1] == ("stopped", None)
    with pytest.raises(RegistryError, match=r"No version of 'l' can be promoted now"):
        promote_to(open_store(), "l", "1", who="tester", why="a test")
    assert find_version(open_store(), "l", "4").standing == "remade"
    asyncio.run(give_up("l", "tester"))
    assert champion().version == "3" and moves()[-1] == ("rolled back", "3")
    roll_back(open_store(), "l", "1", who="tester", why="a test")  # the parent of the branch's version
    with pytest.raises(RegistryError, match="only with the whole branch"):
        promote_to(open_store(), "l", "4", who="tester", why="a test")
    with pytest.raises(RegistryError, match="no open branch"):
        asyncio.run(give_up("l", "tester"))


@pytest.mark.parametrize("is_given_up", [False, True])
def test_a_champion_that_somebody_moved_is_not_replaced(monkeypatch: pytest.MonkeyPatch, is_given_up: bool) -> None:
    """Not even if it is the branch's root now: nothing was swapped in, and what the branch learns is not lost."""
    dying(monkeypatch, flows.relearn, "grow", lambda: delete("beds"))
    for number in ("2", "1"):
        roll_back(open_store(), "l", number, who="tester", why="version 3 is bad")
        with pytest.raises(ChampionMovedError):
            delete("beds")
        assert champion().version == number and numbers() == ["1", "2", "3"], "and nothing was trained in vain"
    if is_given_up:
        known = asyncio.run(give_up("l", "tester"))
        assert known.end is not None and known.end.outcome == "given up" and champion().version == "1"
        assert all(open_store().exists(f"{find_uri(number)}/adapter_model.safetensors") for number in numbers())
        return
    roll_back(open_store(), "l", "3", who="tester", why="the branch goes on")
    result = delete("beds")
    assert (result.status, result.champion, [made.remakes for made in result.made]) == ("swapped", "4", ["3"])


def test_a_person_who_goes_back_right_after_the_swap_keeps_the_adapter_that_serves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    swap_in = flows.relearn.swap_in

    def swap_and_go_back(*arguments: Any) -> None:
        swap_in(*arguments)
        roll_back(open_store(), "l", "2", who="tester", why="version 4 is bad")

    with monkeypatch.context() as patch:
        patch.setattr(flows.relearn, "swap_in", swap_and_go_back)
        with pytest.raises(ChampionMovedError):
            delete("beds")
    assert champion().version == "2" and open_store().exists(f"{find_uri('2')}/adapter_model.safetensors")
    with pytest.raises(ChampionMovedError):
        delete("beds")
    roll_back(open_store(), "l", "4", who="tester", why="version 4 is not bad")
    assert delete("beds").champion == champion().version == "4"


def test_a_result_that_is_worse_than_the_champion_waits_for_a_person(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is judged on the rows that test both. The old champion answers them again: its answers went with the rows."""
    store, before = open_store(), read_record(open_store(), champion()).accuracies()

    def judge(*arguments: Any) -> Any:
        judged = judge_against(*arguments)
        assert judged.before == {name: pytest.approx(before[name]) for name in ("taps", "cars")}
        check = FailedCheck(kind="drop", task="taps", value=50.0, limit=5.0, message="taps fell.")
        return judged._replace(decision=GateDecision((check,)))

    with monkeypatch.context() as patch:
        patch.setattr(flows.relearn, "judge_against", judge)
        result = delete("beds")
    assert (result.status, champion().version, result.attestation) == ("stopped", "3", None)
    assert result.before.keys() == result.accuracies.keys() == {"taps", "cars"}
    again = delete("beds")
    assert (again.status, again.before, again.accuracies) == ("stopped", result.before, result.accuracies)
    assert store.exists(f"{find_uri('3')}/adapter_model.safetensors"), "it serves on"

    waiting = read_page(store, Versions(store).all("l"), "4")[1]
    assert "Against version 3" in waiting and "taps fell." in waiting and "Nobody has accepted it" in waiting

    without_reason = CliRunner().invoke(app, ["lineage", "branch", "l", "--accept"])
    assert without_reason.exit_code == 2 and champion().version == "3"
    dying(monkeypatch, flows.relearn, "_remove_adapters", lambda: accept("it had to go"))
    assert champion().version == "4" and delete("beds").status == "swapped", "a killed command goes on without a person"
    (known,) = Branches(store).all("l")
    assert known.end is not None and known.end.attestation is not None and known.judgement is not None
    assert known.end.attestation.judgement == known.judgement and known.end.tip == known.judgement.tip == "4"
    assert (known.judgement.before, known.judgement.reasons) == (result.before, ("taps fell.",))
    assert known.judgement.accepted is not None and known.judgement.accepted.why == "it had to go"
    assert (
        "it had to go" in read_page(store, Versions(store).all("l"), champion().version)[1]
        and champion().approval is None
    )
    assert "it had to go" in PromotionLog(store).moves("l")[-1].why
    with pytest.raises(RegistryError) as nothing:
        accept_result(store, "l", who="tester", why="a test")
    assert nothing.value.code == "nothing-to-accept"


def test_a_result_that_few_rows_judged_waits_if_its_gate_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    decision = GateDecision((), unsure=("taps: too few test rows.",))

    def judge(*arguments: Any) -> Any:
        judged = judge_against(*arguments)
        assert not judged.waits_if_unsure, "the default"
        return judged._replace(decision=decision, waits_if_unsure=True)

    monkeypatch.setattr(flows.relearn, "judge_against", judge)
    result = delete("beds")
    assert (result.status, champion().version) == ("stopped", "3")
    (known,) = Branches(open_store()).all("l")
    assert known.judgement is not None and known.judgement.reasons == decision.unsure


def test_answers_that_were_logged_before_a_branch_is_given_up_are_deleted(
    monkeypatch: pytest.MonkeyPatch, three_tasks: Path
) -> None:
    monkeypatch.setattr("flows.forget.BATCH_SECONDS", 0.0)  # no server answers
    store, rows = open_store(), (three_tasks / "beds.jsonl").read_bytes()
    store.put_bytes("inbox/beds/a.jsonl", rows)
    dying(monkeypatch, flows.relearn, "grow", lambda: delete("beds"))
    assert not store.exists("inbox/beds/a.jsonl"), "the rows are gone, and nobody can read their inputs any more"
    log_answer(json.loads(rows.splitlines()[0])["text"])
    asyncio.run(give_up("l", "tester"))
    assert read_predictions(store, "l").empty


def test_what_cannot_be_learned_again_is_named_before_anything_starts(three_tasks: Path, tmp_path: Path) -> None:
    store = open_store()
    out = tmp_path / "adapters"
    published = [Path(publish(store, "l", out, EngineSettings(), version=number).folder) for number in ("1", "2", "3")]
    (published[1] / "adapter_model.safetensors").write_bytes(b"another")
    # The file itself is shared with other tests. Here its version names a file that is not there.
    findings = f"{find_version(store, 'l', '3').adapter_uri}/findings.json"
    cars, gone = str(three_tasks / "cars.jsonl"), str(tmp_path / "cars.jsonl")
    store.put_bytes(findings, store.get_bytes(findings).replace(cars.encode(), gone.encode()))
    arrival = find_version(store, "l", "2").dataset_sha256
    before = [info.key for info in store.list()]
    everywhere = CliRunner().invoke(app, ["data", "delete", arrival, "--yes", "-l", "l"])
    assert everywhere.exit_code == 2 and "go with --relearn" in everywhere.output, "it deletes in all lineages"
    dry = CliRunner().invoke(app, ["data", "delete", arrival, "--relearn", "--dry-run", "--json", "-l", "l"])
    assert dry.exit_code == 0, dry.output
    (lost,) = json.loads(dry.stdout)["branch"]["lost"]
    assert (lost["version"], lost["task"]) == ("3", "cars") and "cars.jsonl" in lost["why"]
    with pytest.raises(ConfigError, match=r"1 arrivals of 'l' cannot be learned again.*--accept-lost"):
        delete("beds")
    assert [info.key for info in store.list()] == before
    result = delete("beds", accept_lost=True)
    assert champion().version == "1" and moves()[3:] == [("rolled back", "1")]
    assert [each.version for each in find_left_behind(store, "l")] == ["3"], "its own rows were not deleted"
    kept = {info.key.split("/")[2]: info.key for info in store.list("adapters/l")}
    assert kept[find_uri("3").split("/")[2]].endswith("findings.json") and find_uri("2").split("/")[2] not in kept
    assert result.attestation is not None and result.attestation.num_inputs == 7, "its test rows"
    assert [(rows.file, rows.num_rows, rows.why) for rows in result.attestation.unknown] == [
        ("train.parquet", 25, "gone")
    ]
    assert result.attestation.exports_removed == (str(published[2]),) and not published[2].exists()
    assert result.attestation.exports_left == (f"{published[1]} on {socket.gethostname()}",) and published[0].exists()
    shown = CliRunner().invoke(app, ["lineage", "branch", "l", "--json"])
    (known,) = json.loads(shown.stdout)
    assert known["end"]["attestation"] and known["branch"]["deleted"]["sha256"] == arrival
    Path(gone).write_bytes((three_tasks / "cars.jsonl").read_bytes())  # it is found again
    (learned,) = asyncio.run(requeue("l"))
    assert (learned.status, learned.parent_version) == ("promoted", "1") and find_left_behind(store, "l") == ()


def test_a_lineage_that_would_have_nothing_left_is_refused(three_tasks: Path) -> None:
    roll_back(open_store(), "l", "1", who="tester", why="a test")
    arrival = find_version(open_store(), "l", "1").dataset_sha256
    with pytest.raises(ConfigError, match="no version would serve"):
        plan_relearn(open_store(), "l", arrival)
