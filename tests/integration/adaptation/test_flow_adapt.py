"""The adapt flow from a landed file to the champion, on a base model of two layers."""

from __future__ import annotations

import asyncio
import csv
import json
import re
import shutil
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from deal_core.adapter.files import ADAPTER_FILES, PROOF_FILE, digests_of
from deal_core.errors import ConfigError, DataValidationError, RegistryError, StoreError
from deal_core.evaluation.accuracy_matrix import AccuracyMatrix
from deal_core.evaluation.answering import SERVED_FILE
from flows.adapt_result import AdaptResult
from flows.champions import evaluate
from infra.promotions import Move, PromotionLog
from infra.run_journal import Run, RunJournal
from infra.store.opening import open_store
from infra.versions import UNREGISTERED, Version, Versions
from tasks.lineage.promotion import move_champion
from tasks.lineage.record import RECORD_FILE
from tasks.predict import predict
from tests.adapting import BANK, CLINIC, FAIL, PASS, evaluation_of, next_parent, page_of, record_of, run, version_of
from tests.integration.conftest import RESULT
from tests.receiver import Receiver
from tests.registering import in_mlflow, mlflow_run

pytestmark = pytest.mark.usefixtures("prefect_api", "home")


class Killed(BaseException):
    """The death of a process."""


@pytest.fixture
def first(home: Path, bank_home: Path, copy_to_home: Callable[[Path], Path]) -> AdaptResult:
    """The first task's result, in a copy of its home."""
    copy_to_home(bank_home)
    return AdaptResult.model_validate_json((home / RESULT).read_text())


def versions() -> list[tuple[str, str, tuple[str, ...]]]:
    return [(info.version, info.task, info.aliases) for info in Versions(open_store()).all("l")]


def journal_of(result: AdaptResult) -> Run:
    found = RunJournal(open_store()).find(result.lineage, result.run_key)
    assert found is not None
    return found


def losses_in_mlflow(result: AdaptResult) -> list[int]:
    """The steps whose loss MLflow has."""
    tracked = in_mlflow(result.lineage, result.run_key)
    return sorted(point.step for point in tracked.client.get_metric_history(tracked.run_id, "train/loss"))


def quarantined(result: AdaptResult) -> list[Any]:
    assert result.dataset.quarantine is not None
    return [json.loads(line) for line in open_store().get_bytes(result.dataset.quarantine).decode().splitlines()]


def test_the_first_arrival_becomes_champion_and_leaves_everything_in_its_place(first: AdaptResult, home: Path) -> None:
    result = first
    assert (result.status, result.version, result.parent_version, result.num_steps) == ("promoted", "1", None, 3)
    assert versions() == [("1", "bank", ("challenger", "champion"))]
    assert (result.dataset.num_train, result.dataset.num_test) == (72, 36)

    store = open_store()
    dataset, adapter = result.dataset.uri, f"adapters/l/{result.run_key[:16]}"
    assert dataset.startswith(f"datasets/bank/{result.dataset.sha256}/l/")
    kept = {info.key.removeprefix(f"{dataset}/") for info in store.list(dataset)}
    assert kept == {"test.parquet", "train.inputs", "manifest.json"}, "training rows are deleted after the training"
    names = {info.key.removeprefix(f"{adapter}/") for info in store.list(adapter)}
    assert names >= {"adapter_config.json", "adapter_model.safetensors", "method.json", "record.json"}
    assert names >= {"findings.json", "answers.json", "README.md", "deal.json"}

    tests = pq.read_table(BytesIO(store.get_bytes(f"{dataset}/test.parquet"))).column("input").to_pylist()
    assert set(tests) == {json.loads(line)["text"] for line in Path(BANK["test_data"]).read_text().splitlines()}

    record = record_of(result)
    assert [known.schema.name for known in record.tasks] == ["bank"]
    assert len(record.tasks[0].schema.labels) == 6
    assert record.matrix.to_json() == result.matrix
    version = version_of(result)
    assert (version.since.promoted, version.run_key, version.standing) == (1, result.run_key, "learned")
    assert version.dataset_sha256 == result.dataset.sha256 and journal_of(result).state == "finished"
    digests = digests_of(home / "store" / adapter, (*ADAPTER_FILES, PROOF_FILE, SERVED_FILE, RECORD_FILE))
    assert version.files_sha256 == {name: (digest,) for name, digest in digests.items()} and len(digests) >= 5
    assert not list((home / "work").rglob("*.*")), "checkpoints were not deleted"


def test_the_loss_of_rows_that_are_held_back_is_in_mlflow_and_on_the_page(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deal_core.config.MIN_VALIDATED", 72)
    steps = {"max_steps": 6, "batch_size": 16, "max_prompt_tokens": 192, "max_answer_tokens": 12}
    result = run(tiny_base, BANK, train={**steps, "validation_share": 0.25})
    report, page = page_of(result)
    points, kept = report.training.validation_losses, report.training.kept_step
    assert [step for step, _ in points] == [2, 4, 6], "54 rows are learned: twice in four steps, and after the last one"
    assert kept == min(points, key=lambda point: point[1])[0]
    assert f"Step {kept} is kept" in page and "rows that were held back" in page
    tracked = in_mlflow("l", result.run_key)
    history = tracked.client.get_metric_history(tracked.run_id, "train/validation_loss")
    assert {point.step: point.value for point in history} == pytest.approx(dict(points))


@pytest.mark.usefixtures("without_mlflow")
def test_the_next_arrival_continues_the_champion_and_every_task_is_judged(
    tiny_base: Path, tmp_path: Path, first: AdaptResult
) -> None:
    moved = shutil.copytree(tiny_base, tmp_path / tiny_base.name)  # the same base model at another place
    second = run(moved, CLINIC, gate={**PASS, "max_drop_points": 1.0})

    assert (second.status, second.version, second.parent_version) == ("promoted", "2", "1")
    assert versions() == [("1", "bank", ("previous",)), ("2", "clinic", ("challenger", "champion"))]
    assert set(second.accuracies) == {"bank", "clinic"}
    record = record_of(second)
    matrix = record.matrix
    assert (matrix.tasks, matrix.trained) == (("bank", "clinic"), ("bank", "clinic"))
    assert matrix.rows[0][0] == first.accuracies["bank"]
    assert matrix.rows[0][1] is not None, "the parent is measured on the new task before training"
    assert None not in matrix.base
    assert record.tasks[0].test_uris[0] == first.dataset.uri
    findings = json.loads(open_store().get_bytes(f"adapters/l/{second.run_key[:16]}/findings.json"))
    assert findings["evaluation"]["notes"][:2] == [
        "settings that differ from version 1's: gate.max_drop_points 1.0 (before: 100.0)",
        "rehearsed 18 rows of one old task, 4 a step",
    ]
    assert matrix.forgetting is not None
    assert first.unsure == (), "a first version has no old task"
    assert second.unsure, "too few rows judged bank for this limit; without being asked, the version only says so"
    sizes = [[cell.num_rows for cell in row] for row in AccuracyMatrix.from_json(second.matrix).cells]
    tests = {name: len(outcome) for name, outcome in evaluation_of(second)["outcomes"].items()}
    assert sizes == [[tests["bank"], tests["clinic"]]] * 3


@pytest.mark.usefixtures("without_mlflow")
def test_a_version_that_few_rows_judged_waits_if_it_is_asked_to(tiny_base: Path, first: AdaptResult) -> None:
    second = run(tiny_base, CLINIC, gate={**PASS, "max_drop_points": 1.0, "unsure": "approve"})
    (unsure,) = second.unsure
    assert unsure.startswith("bank: too few test rows to judge") and version_of(second).unsure == second.unsure
    assert second.status == "awaiting approval"


@pytest.mark.nightly
def test_old_tasks_are_judged_within_a_budget_and_versions_on_the_same_rows(
    tiny_base: Path, first: AdaptResult
) -> None:
    store, answers = open_store(), f"adapters/l/{first.run_key[:16]}/answers.json"
    rows = pq.read_table(BytesIO(store.get_bytes(f"{first.dataset.uri}/test.parquet"))).to_pylist()
    kept = json.loads(store.get_bytes(answers))
    for place, row in enumerate(sorted(rows, key=lambda row: row["sha256"])):
        kept["now"]["bank"][row["sha256"]] = row["output"] if place < 5 else "wrong"
    store.put_bytes(answers, json.dumps(kept).encode())

    second = run(tiny_base, CLINIC, evaluate={"max_old_rows": 7})
    third = run(tiny_base, CLINIC, again=True, evaluate={"max_old_rows": 5})
    found = [
        json.loads(store.get_bytes(f"adapters/l/{result.run_key[:16]}/findings.json"))["evaluation"]
        for result in (second, third)
    ]
    assert [report["num_rows"]["bank"] for report in found] == [7, 5]
    assert found[1]["num_rows"]["clinic"] == found[0]["num_rows"]["clinic"] > 7
    assert sorted(found[0]["parent_outcomes"]["bank"]) == list("0011111")
    assert found[0]["parent_accuracies"]["bank"] == 5 / 7, "of the rows that both versions answered"
    assert len(found[1]["parent_outcomes"]["bank"]) == 5
    scores = asyncio.run(evaluate("l"))
    assert scores.num_rows["bank"] == 5 and scores.accuracies == scores.recorded

    fourth = run(tiny_base, BANK, again=True, evaluate={"max_old_rows": 5})
    again = json.loads(store.get_bytes(f"adapters/l/{fourth.run_key[:16]}/findings.json"))["evaluation"]
    assert len(again["parent_outcomes"]["bank"]) == again["num_rows"]["bank"] == len(rows), "all of them"


@pytest.mark.nightly
@pytest.mark.parametrize("launch", ["local", "torchrun"])
def test_two_processes_train_and_answer_and_one_version_is_registered(
    tiny_base: Path, home: Path, first: AdaptResult, monkeypatch: pytest.MonkeyPatch, launch: str
) -> None:
    monkeypatch.setenv("DEAL_LAUNCH", launch)
    train = {"max_steps": 3, "max_prompt_tokens": 192, "max_answer_tokens": 12, "num_processes": 2}
    result = run(tiny_base, CLINIC, train=train)
    assert (result.status, result.version, result.parent_version, result.num_steps) == ("promoted", "2", "1", 3)
    assert versions() == [("1", "bank", ("previous",)), ("2", "clinic", ("challenger", "champion"))]
    assert losses_in_mlflow(result) == [1, 2, 3]
    assert not list((home / "work").rglob("*.*")), "the files of the processes were not deleted"
    newest = Versions(open_store()).all("l")[-1]
    assert (newest.launch, newest.shard) == (launch, "none")
    alone = asyncio.run(evaluate("l"))  # by one process
    assert set(result.accuracies) == {"bank", "clinic"} and alone.accuracies == alone.recorded == result.accuracies


def test_the_same_rows_in_another_file_train_nothing(tiny_base: Path, tmp_path: Path, first: AdaptResult) -> None:
    rows = [json.loads(line) for line in Path(BANK["data"]).read_text().splitlines()]
    other = tmp_path / "other name.csv"
    with other.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["text", "label"])
        writer.writeheader()
        writer.writerows(reversed(rows))

    for again_and_again in range(2):
        repeat = run(tiny_base, {**BANK, "data": str(other) if again_and_again else BANK["data"]})
        assert (repeat.status, repeat.rejected, repeat.version) == ("repeat", False, first.version)
        assert "version 1 has learned from this arrival" in repeat.message
    assert len(versions()) == 1


def test_other_settings_do_not_make_an_adapted_arrival_new(
    tiny_base: Path, first: AdaptResult, caplog: pytest.LogCaptureFixture
) -> None:
    assert run(tiny_base, BANK, deal={"energy": 0.9}).status == "repeat"
    tasks = [name.rpartition("-")[0] for each in caplog.records if (name := getattr(each, "task_run_name", None))]
    assert tasks == ["parent", "ingest"], "Prefect knows the stages of a run as tasks"


def test_a_rejected_version_is_kept_and_is_nobodys_parent(tiny_base: Path, first: AdaptResult) -> None:
    rejected = run(tiny_base, CLINIC, gate=FAIL)

    assert (rejected.status, rejected.rejected, rejected.version) == ("rejected", True, "2")
    assert rejected.reasons and "clinic" in rejected.reasons[0]
    assert versions() == [("1", "bank", ("challenger", "champion")), ("2", "clinic", ())]
    version = version_of(rejected)
    assert (version.since.promoted, version.standing) == (None, "rejected by the gate")
    assert mlflow_run("l", rejected.run_key).info.status == "FINISHED" and journal_of(rejected).state == "finished"
    assert version.reasons == rejected.reasons

    repeat = run(tiny_base, CLINIC, gate=FAIL)
    assert (repeat.status, repeat.rejected, repeat.version) == ("repeat", True, "2")
    assert len(versions()) == 2
    parent = next_parent()
    assert parent is not None and parent.version == "1"


@pytest.mark.nightly
def test_a_task_is_asked_for_answers_as_long_as_when_it_was_learned(tiny_base: Path, tmp_path: Path) -> None:
    file = tmp_path / "counts.jsonl"
    rows = ({"prompt": f"Count to {number}.", "completion": "one two three four"} for number in range(40))
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(tiny_base, {"name": "counts", "data": str(file)}, train={"max_steps": 3, "max_answer_tokens": 2})
    later = run(tiny_base, CLINIC)  # with the default, which has more steps
    known = record_of(later).tasks
    assert [task.max_new_tokens for task in known] == [2, 12]
    answer = predict(open_store(), "Count to 3.", lineage="l", task="counts", version=None).answer
    assert 0 < len(answer.split()) <= 2
    scores = asyncio.run(evaluate("l"))
    assert scores.accuracies == scores.recorded


def test_a_refused_file_leaves_its_rows_in_quarantine_and_nothing_else(tiny_base: Path, tmp_path: Path) -> None:
    arrival = tmp_path / "bad.jsonl"
    arrival.write_text('{"text": "", "label": "a"}\n' * 5 + '{"text": "good", "label": "b"}\n')
    with pytest.raises(DataValidationError) as caught:
        run(tiny_base, {"name": "bank", "data": str(arrival)})
    keys = [info.key for info in open_store().list()]
    assert len(keys) == 1 and keys[0].startswith("quarantine/bank/") and keys[0].endswith(".jsonl")
    assert open_store().uri_of(keys[0]) in str(caught.value), "the message says where the rows are"
    assert versions() == []


@pytest.mark.nightly
def test_files_with_the_same_good_rows_keep_their_bad_rows_apart(tiny_base: Path, tmp_path: Path) -> None:
    results: list[AdaptResult] = []
    for name, bad in (("one", '{"text": "", "label": "lost card"}\n'), ("other", '{"text": "late", "label": ""}\n')):
        arrival = tmp_path / f"{name}.jsonl"
        arrival.write_text(Path(BANK["data"]).read_text() + bad)
        results.append(run(tiny_base, {**BANK, "data": str(arrival)}, lineage=name))
    assert results[0].dataset.sha256 == results[1].dataset.sha256
    assert [[bad["raw"]["text"] for bad in quarantined(result)] for result in results] == [[""], ["late"]]


def test_another_base_model_needs_another_lineage(tiny_base: Path, tmp_path: Path, first: AdaptResult) -> None:
    other = tmp_path / "other-base"
    other.mkdir()
    for path in tiny_base.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-4}))
    with pytest.raises(ConfigError, match="a new base model starts a new lineage"):
        run(other, CLINIC)
    assert len(versions()) == 1


@pytest.mark.parametrize("is_written", [False, True])
@pytest.mark.usefixtures("without_mlflow")
def test_a_promotion_cut_short_is_completed_by_the_next_run(
    tiny_base: Path, home: Path, first: AdaptResult, monkeypatch: pytest.MonkeyPatch, is_written: bool
) -> None:
    whole = PromotionLog.add

    def die(log: PromotionLog, *move: Any) -> Move | None:
        if is_written:
            whole(log, *move)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(PromotionLog, "add", die)
        with pytest.raises(Killed):
            run(tiny_base, CLINIC)
    repeat = run(tiny_base, CLINIC)

    assert (repeat.status, repeat.rejected, repeat.version) == ("repeat", False, "2")
    assert versions() == [("1", "bank", ("previous",)), ("2", "clinic", ("challenger", "champion"))]
    assert len(PromotionLog(open_store()).moves("l")) == 2, "no move is written twice"
    assert journal_of(repeat).state == "finished" and "Version 2 of l" in page_of(repeat)[1]
    assert not list((home / "work").rglob("*.*")), "nothing of the killed run is left"
    assert not list((home / "store" / "datasets").rglob("train.parquet")), "the rows are learned"


@pytest.mark.usefixtures("without_mlflow")
def test_a_report_that_fails_after_a_promotion_fails_no_run_and_a_later_run_writes_it(
    tiny_base: Path, home: Path, monkeypatch: pytest.MonkeyPatch, receiver: Receiver
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise StoreError("the store is away")

    with monkeypatch.context() as patch:
        patch.setattr("tasks.adaptation.report.gather_report", refuse)
        learned = run(tiny_base, BANK)
        assert (learned.status, journal_of(learned).state) == ("promoted", "running")
        assert not list((home / "work").rglob("*.*")) and not list((home / "store").rglob("train.parquet"))
        assert [notice["event"] for notice in receiver.told()] == ["deal.version.promoted"], "no failure"
        with pytest.raises(RegistryError):
            page_of(learned)
        assert next_parent() == version_of(learned), "the lineage goes on without the report"

    assert next_parent() == version_of(learned)
    assert journal_of(learned).state == "finished" and f"Version {learned.version} of l" in page_of(learned)[1]


@pytest.mark.usefixtures("without_mlflow")
def test_a_journal_that_cannot_be_written_does_not_hide_why_a_run_failed(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def break_down(*args: Any) -> None:
        raise DataValidationError("the cause")

    def refuse(*args: Any) -> None:
        raise StoreError("the store is away")

    monkeypatch.setattr("flows.adapt.train_version", break_down)
    monkeypatch.setattr(RunJournal, "end", refuse)
    with pytest.raises(DataValidationError, match="the cause"):
        run(tiny_base, BANK)


@pytest.mark.parametrize("is_away", [False, True])
def test_a_run_that_fails_is_failed_in_mlflow_at_once_if_mlflow_answers(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, is_away: bool
) -> None:
    def break_down(*args: Any) -> None:
        if is_away:
            monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # nothing answers there
        raise DataValidationError("the cause")

    monkeypatch.setattr("tasks.adaptation.train._train", break_down)
    with pytest.raises(DataValidationError, match="the cause"):
        run(tiny_base, BANK)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (failed,) = RunJournal(open_store()).all("l")
    assert failed.state == "failed"
    assert mlflow_run("l", failed.run_key).info.status == ("RUNNING" if is_away else "FAILED")
    assert ("the next run or deal server sync" in caplog.text) is is_away


@pytest.mark.nightly
def test_an_again_that_is_started_again_after_it_registered_trains_nothing(
    tiny_base: Path, first: AdaptResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*args: Any, **kwargs: Any) -> None:
        raise Killed

    monkeypatch.setenv("PREFECT__RUNTIME__FLOW_RUN__ID", "a run that the server starts again")
    with monkeypatch.context() as patch:
        patch.setattr("flows.adapt.promote_version", die)
        with pytest.raises(Killed):
            run(tiny_base, BANK, again=True)
    repeat = run(tiny_base, BANK, again=True)
    assert (repeat.status, repeat.version) == ("repeat", "2")
    assert versions() == [("1", "bank", ("previous",)), ("2", "bank", ("challenger", "champion"))]


@pytest.mark.usefixtures("without_mlflow")
def test_a_version_that_another_has_overtaken_is_not_promoted(
    tiny_base: Path, first: AdaptResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Versions.register

    def overtaken(known: Versions, version: Version) -> Version:
        """Another version becomes champion at the same time."""
        parent = version_of(first)
        other = parent.model_copy(update={"version": UNREGISTERED, "run_key": "other", "parent_version": "1"})
        move_champion(known.store, whole(known, other), expected="1", action="promoted", who="someone", why="test")
        return whole(known, version)

    with monkeypatch.context() as patch:
        patch.setattr(Versions, "register", overtaken)
        with pytest.raises(RegistryError, match=r"version 2 is champion now.*Run the same command again"):
            run(tiny_base, CLINIC)
    assert versions()[1:] == [("2", "bank", ("champion",)), ("3", "clinic", ("challenger",))]
    overtaken_version = Versions(open_store()).all("l")[2]
    assert overtaken_version.accepted and overtaken_version.since.promoted is None, "it does not continue the champion"
    parent = next_parent()
    assert parent is not None and parent.version == "2", "the same command starts from the present champion"


@pytest.mark.recentred
@pytest.mark.usefixtures("without_mlflow")
def test_a_label_that_takes_over_the_answers_is_named_with_its_cost(tiny_base: Path, tmp_path: Path) -> None:
    files = {}
    for split, is_open in (("train", lambda i: i % 12 == 0), ("test", lambda i: i % 2 == 0)):
        files[split] = tmp_path / f"{split}.jsonl"
        rows = [{"text": f"{split} message {i}", "label": "open" if is_open(i) else "closed"} for i in range(24)]
        files[split].write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    task = {"name": "tickets", "data": str(files["train"]), "test_data": str(files["test"])}
    result = run(tiny_base, task, train={"max_steps": 60, "learning_rate": 0.02, "max_prompt_tokens": 64})
    evaluation = evaluation_of(result)
    labels = sorted(tuple(each.values()) for each in evaluation["labels"]["tickets"])
    assert labels == [("closed", 12, 1.0, 1.0), ("open", 12, 0.0, 0.0)]
    (note,) = [note for note in evaluation["notes"] if "of the answers" in note]
    assert re.fullmatch(
        r"tickets: 100 % of the answers are 'closed', but 50 % of the test rows are(\. If every label were answered as "
        r"often as it occurs, accuracy would be \d+\.\d % instead of 50\.0 %)?",  # rounding decides whether it is a row
        note,
    )
