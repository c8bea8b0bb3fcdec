"""The watch flow: arrivals are adapted once and in order, and an unusable arrival is reported once."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

import deal_pipeline.cli.demo
from benchmarks.tiny_base import EXAMPLES, NO_LIMITS
from deal_core.errors import StoreError, TrainingDivergedError
from deal_pipeline.server.status import read_status
from flows.watch import WatchResult, watch
from infra.store.base import ObjectStore
from infra.store.opening import open_store
from infra.versions import Versions
from tasks.arrival_queue import Result
from tasks.inbox import InboxLook
from tasks.inbox import look as look_at_inbox
from tasks.lineage.settings import WatchedLineage, add_lineage
from tasks.progress import Interrupted, ask_to_stop, reporting_to
from tasks.spec import parse
from tests.arriving import Said, land
from tests.in_process import deal
from tests.receiver import Receiver

pytestmark = pytest.mark.usefixtures("prefect_api", "home", "without_mlflow")


def lineage(base: Path, **settings: Any) -> WatchedLineage:
    values = {
        "lineage": "l",
        "base_model": str(base),
        "gate": NO_LIMITS,
        "train": {"max_steps": 2, "max_prompt_tokens": 192, "checkpoint_steps": 0},
        **settings,
    }
    return parse(WatchedLineage, values, "test")


def look(spec: WatchedLineage, **options: Any) -> tuple[WatchResult, list[str]]:
    said = Said()
    with reporting_to(said):
        result = asyncio.run(watch(spec, once=True, poll_seconds=0.01, **options))
    return result, said.lines


def outcomes(result: WatchResult) -> list[tuple[str, str]]:
    return [(seen.key.removeprefix("inbox/"), seen.outcome) for seen in result.files]


PARCELS = (EXAMPLES / "parcels" / "messages.jsonl").read_bytes()


def test_arrivals_are_learned_in_order_and_once(tiny_base: Path, home: Path) -> None:
    clinic = yaml.safe_dump({"columns": {"text": "note", "label": "finding"}, "instruction": "What is it?"})
    land(home, "bank/bad.jsonl", b"nonsense\n", age=300)
    land(home, "clinic/task.yaml", clinic.encode())
    land(home, "clinic/b.csv", (EXAMPLES / "clinic" / "train.csv").read_bytes(), age=200)
    land(home, "parcels/a.jsonl", PARCELS, age=100)
    result, _ = look(lineage(tiny_base))
    wanted = [("bank/bad.jsonl", "refused"), ("clinic/b.csv", "promoted"), ("parcels/a.jsonl", "promoted")]
    assert outcomes(result) == wanted, "a bad file does not stop the others"
    assert [run.version for run in result.runs] == ["1", "2"]
    manifest = open_store().get_bytes(f"{result.runs[0].dataset.uri}/manifest.json").decode()
    assert "What is it?" in manifest
    assert look(lineage(tiny_base))[0].files == ()

    land(home, "parcels/again.jsonl", PARCELS, age=90)
    assert outcomes(look(lineage(tiny_base))[0]) == [("parcels/again.jsonl", "repeat")], "the same content"
    (home / "store" / "inbox" / "clinic" / "task.yaml").unlink()
    land(home, "clinic/c.csv", (EXAMPLES / "clinic" / "test.csv").read_bytes(), age=80)
    result, _ = look(lineage(tiny_base))
    assert outcomes(result) == [("clinic/c.csv", "promoted")], "the lineage knows which columns the task has"
    assert [info.version for info in Versions(open_store()).all("l")] == ["1", "2", "3"]


def test_a_folder_that_may_be_written_is_waited_for_and_said_once(tiny_base: Path, home: Path) -> None:
    """What it is as an arrival: tests/unit/tasks/test_data_files.py."""
    land(home, "parcels/may/part-0.jsonl", PARCELS)
    for _ in range(3):
        result, said = look(lineage(tiny_base))
        assert result.files == (), "its writer may be between two files"
        assert said == [
            "parcels/may has no file _SUCCESS; it is learned when nothing in it has changed for 300 seconds."
        ]


def test_a_file_that_ends_its_reader_stops_no_other_and_is_set_aside(tiny_base: Path, home: Path) -> None:
    """Twice it is tried, as the first time may have been for want of memory."""
    aborts = (Path(__file__).parents[2] / "data" / "abort.parquet").read_bytes()
    add_lineage(open_store(), WatchedLineage(lineage="l"))
    for name, content, age in (
        ("a.jsonl", b"nonsense\n", 300),
        ("b.parquet", aborts, 200),
        ("c.jsonl", b"none\n", 100),
    ):
        land(home, f"parcels/{name}", content, age)
    result, said = look(lineage(tiny_base))
    wanted = [("parcels/a.jsonl", "refused"), ("parcels/b.parquet", "failed"), ("parcels/c.jsonl", "refused")]
    assert outcomes(result) == wanted
    assert any(line.startswith("Failed: b.parquet ended the process that reads it (SIGABRT") for line in said)

    def reason() -> str:
        (status,) = asyncio.run(read_status(home)).lineages
        assert status.num_open == 0
        (line,) = (line for line in status.failed if line.startswith("inbox/parcels/b.parquet: "))
        return line

    assert "Failed 1 times; it is tried again from" in reason()
    result, said = look(lineage(tiny_base))
    assert outcomes(result) == [("parcels/b.parquet", "refused")]
    assert "did so in 2 tries, so it is set aside" in reason()
    assert look(lineage(tiny_base))[0].files == ()


@pytest.mark.nightly
def test_a_file_that_failed_is_learned_once_nothing_hinders_it(
    tiny_base: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was wrong with it is corrected, a server comes back, and a training that diverged is asked for again."""

    def diverge(*args: Any, **kwargs: Any) -> None:
        raise TrainingDivergedError("The training diverged.")

    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("the server is away")

    land(home, "parcels/a.jsonl", b"nonsense\n")
    assert outcomes(look(lineage(tiny_base))[0]) == [("parcels/a.jsonl", "refused")]
    land(home, "parcels/a.jsonl", PARCELS, age=50)
    with monkeypatch.context() as patch:
        patch.setattr("deal_core.training.jobs.train_adapter", diverge)
        failed, _ = look(lineage(tiny_base))
    assert outcomes(failed) == [("parcels/a.jsonl", "failed")] and failed.num_refused == 1
    add_lineage(open_store(), WatchedLineage(lineage="l"))
    (status,) = asyncio.run(read_status(home)).lineages
    assert status.num_open == 0 and "deal adapt SPEC --watch --once --lineage l" in status.failed[0]
    assert "tried again from" not in status.failed[0]
    deal("status")
    deal("status", "--check", code=1)
    with monkeypatch.context() as patch:
        patch.setattr(Versions, "register", fail)
        failed, said = look(lineage(tiny_base))
    assert outcomes(failed) == [("parcels/a.jsonl", "failed")]
    assert any("RuntimeError: the server is away" in line for line in said)
    assert outcomes(look(lineage(tiny_base))[0]) == [("parcels/a.jsonl", "promoted")]


def test_only_a_watch_that_shall_handle_everything_minds_being_stopped(tiny_base: Path, home: Path) -> None:
    class Stopping(Said):
        def said(self, message: str) -> None:
            if message.startswith("Refused:"):
                ask_to_stop()

    for name in "abc":
        land(home, f"parcels/{name}.jsonl", b"nonsense\n")
    with reporting_to(Stopping()):
        result = asyncio.run(watch(lineage(tiny_base), poll_seconds=0.01))
    assert outcomes(result) == [("parcels/a.jsonl", "refused")]
    with reporting_to(Stopping()), pytest.raises(Interrupted):
        asyncio.run(watch(lineage(tiny_base), once=True, poll_seconds=0.01))
    with reporting_to(Stopping()):
        result = asyncio.run(watch(lineage(tiny_base), once=True, poll_seconds=0.01))
    assert outcomes(result) == [("parcels/c.jsonl", "refused")], "no arrival was left"


def test_a_file_that_changes_while_another_is_learned_is_looked_at_again_before_it_is_read(
    tiny_base: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[bytes] = []

    def look_at(*given: Any) -> InboxLook:
        read.append(b"a look")
        return look_at_inbox(*given)

    async def learn(store: ObjectStore, spec: WatchedLineage, files: Sequence[str]) -> tuple[Result, None]:
        (key,) = files
        read.append(store.get_bytes(key))
        if key.endswith("a.jsonl"):
            land(home, "parcels/b.jsonl", PARCELS)
        return Result("refused", ""), None

    monkeypatch.setattr("flows.watch.look", look_at)
    monkeypatch.setattr("flows.watch._adapt_to", learn)
    land(home, "parcels/a.jsonl", b"first", age=300)
    land(home, "parcels/b.jsonl", PARCELS[:1000], age=200)
    look(lineage(tiny_base))
    assert read == [b"a look", b"first", b"a look", PARCELS]


def test_a_watch_outlasts_a_store_that_is_away(tiny_base: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[InboxLook] = []

    def look_at(*given: Any) -> InboxLook:
        looked.append(look_at_inbox(*given))
        if len(looked) == 2:
            raise StoreError("the store is away")
        if len(looked) == 3:
            ask_to_stop()
        return looked[-1]

    monkeypatch.setattr("flows.watch.look", look_at)
    with reporting_to(Said()):
        asyncio.run(watch(lineage(tiny_base), poll_seconds=0.01))
    assert len(looked) == 3
    looked[1:] = []
    with reporting_to(Said()), pytest.raises(StoreError, match="the store is away"):
        asyncio.run(watch(lineage(tiny_base), once=True, poll_seconds=0.01))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"bank/bad.jsonl": b'{"text": "", "label": "a"}\n' * 3}, "cannot be used"),
        ({"bank/task.yaml": b"instructions: typo\n", "bank/x.csv": b"text,label\na,b\n"}, "unknown key 'instructions'"),
        ({"-odd name/x.csv": b"text,label\na,b\n"}, "name"),
    ],
)
def test_what_cannot_be_used_is_said_once(
    tiny_base: Path, home: Path, receiver: Receiver, files: dict[str, bytes], message: str
) -> None:
    for name, content in files.items():
        land(home, name, content)
    result, said = look(lineage(tiny_base))
    assert [outcome for _, outcome in outcomes(result)] == ["refused"]
    assert any(line.startswith("Refused:") and message in line for line in said)
    again, said = look(lineage(tiny_base))
    assert again.files == () and said == []
    assert result.num_refused == 1
    (notice,) = receiver.told()
    task = next(iter(files)).partition("/")[0]
    assert (notice["event"], notice["payload"]["task"]) == ("deal.adaptation.failed", task)
    assert message in notice["payload"]["error"]


def test_a_watch_of_some_tasks_leaves_the_others_alone(tiny_base: Path, home: Path) -> None:
    land(home, "bank/bad.jsonl", b"nonsense\n")
    land(home, "clinic/bad.jsonl", b"nonsense\n")
    result, _ = look(lineage(tiny_base, tasks=["clinic"]))
    assert outcomes(result) == [("clinic/bad.jsonl", "refused")]

    add_lineage(open_store(), WatchedLineage(lineage="l"))
    (status,) = asyncio.run(read_status(home)).lineages
    assert [line.split(":")[0] for line in status.failed] == ["inbox/clinic/bad.jsonl"] and status.num_open == 1
    land(home, "clinic/bad.jsonl", b"corrected\n", age=50)
    (status,) = asyncio.run(read_status(home)).lineages
    assert status.failed == () and status.num_open == 2, "the corrected file waits"


def short_demo(folder: Path, names: tuple[str, ...], gate: dict[str, Any]) -> Path:
    """Domains that are learned in two steps behind this gate."""
    for name in names:
        shutil.copytree(EXAMPLES / name, folder / name)
        spec = yaml.safe_load((folder / name / "spec.yaml").read_text()) | {"gate": gate}
        spec["train"] |= {"max_steps": 2, "checkpoint_steps": 0}
        (folder / name / "spec.yaml").write_text(yaml.safe_dump(spec))
    return folder


def test_no_gate_stops_the_lineage_that_the_demo_compares_with(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the picture lacks it: what a gate rejects is not continued, and two matrices have other tasks."""
    monkeypatch.setattr(deal_pipeline.cli.demo, "ORDER", ("bank",))
    examples = short_demo(tmp_path / "examples", ("bank",), {**NO_LIMITS, "min_accuracy": 1.0})
    result = asyncio.run(
        deal_pipeline.cli.demo.run_demo(
            picture=tmp_path / "demo.png", compare=True, base_model=str(tiny_base), examples=examples
        )
    )
    champions = [(outcome.lineage, outcome.champion) for outcome in result.outcomes]
    assert champions == [("demo", None), ("demo-seq-lora", "1")] and result.rejected


@pytest.mark.nightly
def test_the_demo_compares_two_lineages_on_the_same_arrivals(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = tmp_path / "pictures" / "demo.png"
    monkeypatch.setattr(deal_pipeline.cli.demo, "ORDER", ("bank", "parcels"))
    examples = short_demo(tmp_path / "examples", deal_pipeline.cli.demo.ORDER, NO_LIMITS)

    def demo() -> deal_pipeline.cli.demo.DemoResult:
        return asyncio.run(
            deal_pipeline.cli.demo.run_demo(picture=picture, compare=True, base_model=str(tiny_base), examples=examples)
        )

    result = demo()
    champions = [(outcome.lineage, outcome.champion) for outcome in result.outcomes]
    assert champions == [("demo", "2"), ("demo-seq-lora", "2")]
    deal, rival = result.outcomes
    assert [run.task for run in deal.runs] == ["bank", "parcels"] == [run.task for run in rival.runs]
    assert [run.dataset.sha256 for run in deal.runs] == [run.dataset.sha256 for run in rival.runs]
    assert deal.matrix is not None and rival.matrix is not None
    assert deal.matrix["rows"][0][0] == rival.matrix["rows"][0][0], "the first task is plain LoRA for both strategies"
    assert not result.rejected
    assert not list(open_store().list("inbox")), "other lineages must not learn the demo's files"
    assert result.picture == picture and picture.read_bytes().startswith(b"\x89PNG")

    again = demo()
    assert [run.status for run in again.outcomes[0].runs] == ["repeat"] * 2
    assert again.outcomes[0].matrix == deal.matrix
