"""`deal data delete`, on a base model of two layers."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable, Collection
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from deal_core.adapter.state import kept_of_tasks, load_method_state
from deal_core.errors import ConfigError, DataValidationError, StoreError
from deal_core.strategies.kept_rows import rows_name, unpack
from deal_pipeline.cli.data import show_forget_plan
from flows.adapt_result import AdaptResult
from flows.champions import evaluate
from flows.forget import forget, plan_forget
from flows.requeue import requeue
from infra.deleted_inputs import UnknownRows
from infra.log_batches import BATCH_SECONDS
from infra.predictions import read_feedback, read_predictions
from infra.store.keys import report_key
from infra.store.opening import open_store
from tasks.housekeeping.arrivals import find_arrival
from tasks.lineage.history import find_version
from tasks.lineage.promotion import roll_back
from tasks.lineage.tombstones import ForgottenRowsError, TestRowsForgottenError
from tasks.lineage.version_files import borrowed_adapter
from tasks.validate import spec_to_check, validate
from tests.adapting import BANK, CLINIC, record_of, run
from tests.integration.storage.conftest import SECRET, holding, holding_row, keys, land, logged, logging

pytestmark = pytest.mark.usefixtures("prefect_api", "home")


def test_nothing_is_forgotten_while_a_version_or_a_journal_is_damaged(first: AdaptResult, home: Path) -> None:
    """Not even the tombstone is written: it would refuse rows that nobody has forgotten."""
    store = open_store()
    for entry in ("versions/l/00000001.json", f"runs/l/{first.run_key[:16]}.json"):
        whole = store.get_bytes(entry)
        store.put_bytes(entry, whole[:-20])
        before = keys("")
        with pytest.raises(StoreError, match=r"is damaged.*Restore it from a backup"):
            asyncio.run(forget(first.dataset.sha256))
        assert keys("") == before
        store.put_bytes(entry, whole)
    asyncio.run(forget(first.dataset.sha256))
    assert holding(home, SECRET) == []


@pytest.mark.parametrize("damage", [lambda rows: b"PAR1 cut", lambda rows: rows[:-40], lambda rows: rows[9:]])
def test_damaged_rows_are_deleted_and_the_result_names_them(
    first: AdaptResult, home: Path, damage: Callable[[bytes], bytes]
) -> None:
    store, tests = open_store(), f"{first.dataset.uri}/test.parquet"
    store.put_bytes(tests, damage(store.get_bytes(tests)))
    assert plan_forget(store, first.dataset.sha256).unknown == (), "the files in the inbox have the same rows"
    store.delete("inbox/bank/test.jsonl")
    done = asyncio.run(forget(first.dataset.sha256))
    rows = UnknownRows(
        dataset_sha256=first.dataset.sha256, file="test.parquet", num_rows=first.dataset.num_test, why="damaged"
    )
    assert done.plan.unknown == done.tombstone.unknown == (rows,)
    assert any("test.parquet" in str(each) for each in show_forget_plan(done.plan, "Removed"))
    assert holding(home, SECRET) == []
    again = asyncio.run(forget(first.dataset.sha256))
    assert again.plan.unknown == (rows,) and again.plan.inputs == done.plan.inputs, "it is remembered"


def test_a_second_deletion_names_the_arrival_by_its_key_and_finds_what_was_logged_since(
    first: AdaptResult, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flows.forget.BATCH_SECONDS", 0.0)  # no server answers
    text = f"My card {SECRET} was lost abroad."
    logged([text, "Something else."])
    asyncio.run(forget("inbox/bank/may.jsonl"))
    logged([text])
    assert not holding(home, SECRET) and len(read_predictions(open_store(), "l")) == 2
    again = asyncio.run(forget("inbox/bank/may.jsonl"))
    assert [each.kind for each in again.plan.held] == ["logged answers"] and again.plan.unknown == ()
    assert len(read_predictions(open_store(), "l")) == 1
    assert again.tombstone.sha256 == first.dataset.sha256


def test_a_forgotten_arrival_is_gone_and_who_learned_from_it_is_named(
    tiny_base: Path, home: Path, tmp_path: Path
) -> None:
    first, second = run(tiny_base, land()), run(tiny_base, CLINIC)
    store = open_store()
    with borrowed_adapter(store, find_version(store, "l", "2"), with_method=True) as folder:
        kept = load_method_state(folder).kept_rows
    mine, others = (unpack(kept[rows_name(task)]) for task in ("bank", "clinic"))
    assert len(mine) == len(others) == 18
    assert holding(home, SECRET) and all(holding_row(home, row) for row in (*mine, *others))
    for uri in (f"adapters/l/{result.run_key[:16]}" for result in (first, second)):
        store.put_bytes(f"{uri}/answers.json", b"{}")
    store.put_bytes(report_key("l", second.run_key, "report.json"), json.dumps({"lost": [SECRET]}).encode())
    for left in (home / "tmp" / "left by a killed process", home / "store" / ".incoming" / "an unfinished file"):
        left.parent.mkdir(exist_ok=True)
        left.write_text(SECRET)
        os.utime(left, (0, 0))
    texts = home / "work" / "l" / second.run_key[:16] / "texts" / "0.jsonl"  # its run died after it had registered
    texts.parent.mkdir(parents=True)
    texts.write_text(SECRET)

    plan = plan_forget(store, first.dataset.sha256[:8])
    assert [(each.version, each.is_direct, each.aliases) for each in plan.learned] == [
        ("1", True, ("previous",)),
        ("2", False, ("challenger", "champion")),
    ]
    assert plan.unjudged == ("l",) and holding(home, SECRET), "a plan changes nothing"
    assert {each.kind for each in plan.held} == {
        "test rows",
        "quarantine",
        "inbox file",
        "answers",
        "reference rows",
        "report",
        "rows kept by the method",
        "temporary files",
        "work folder",
    }

    done = asyncio.run(forget("inbox/bank/may.jsonl", "the customer asked"))
    assert done.plan.held == plan.held
    assert holding(home, SECRET) == []
    assert not [row for row in mine if holding_row(home, row)], "also of those that the versions keep"
    assert all(holding_row(home, row) for row in others), "another task's rows stay"
    assert keys("datasets/bank") == keys("quarantine") == keys("inbox") == []
    assert not [key for key in keys("adapters") if key.endswith("answers.json")]
    assert not [path for name in ("report.*", "method.*") for path in home.joinpath("mlflow-artifacts").rglob(name)]
    assert done.waits_for_mlflow == () and not [key for key in keys("mlflow") if key.endswith(".forget")]
    clinic = len(kept[rows_name("clinic")])
    for number, sizes in (("1", {"bank": 0}), ("2", {"bank": 0, "clinic": clinic})):
        version, local = find_version(store, "l", number), tmp_path / number
        store.download_folder(version.adapter_uri, local)
        assert kept_of_tasks(local) == {rows_name(task): size for task, size in sizes.items()}
        with borrowed_adapter(store, version, with_method=True):
            pass  # the digests of the replaced files were recorded
    assert done.tombstone.versions == ("l/1", "l/2")
    assert asyncio.run(forget(first.dataset.sha256)).plan.held == (), "a second command finds nothing"

    task = land()
    with pytest.raises(DataValidationError, match=r"forgotten on .* \(the customer asked\)"):
        run(tiny_base, task)
    told = validate(store, *spec_to_check(store, task["data"], task="bank", test_data=task["test_data"], lineage="l"))
    assert not told.accepted and "forgotten on" in (told.refusal or ""), "as the run says"
    assert keys("datasets/bank") == []
    scores = asyncio.run(evaluate("l"))
    assert set(scores.accuracies) == {"clinic"} and "forgotten" in scores.unjudged["bank"]
    with pytest.raises(TestRowsForgottenError, match="arrival of 'bank' with test rows"):
        run(tiny_base, CLINIC, again=True)
    _judged_anew(tiny_base, tmp_path, second)


def _judged_anew(tiny_base: Path, tmp_path: Path, before: AdaptResult, unjudged: Collection[str] = frozenset()) -> None:
    """The next arrival of the task has the test rows. Other tasks without them keep their figures."""
    arrival = tmp_path / "june.jsonl"
    rows = [{"text": f"Message {number} about my card.", "label": "lost card"} for number in range(12)]
    rows = [{**row, "split": "test" if number < 4 else "train"} for number, row in enumerate(rows)]
    arrival.write_text("".join(json.dumps(row) + "\n" for row in rows))
    third = run(tiny_base, {"name": "bank", "data": str(arrival)})
    assert (third.status, third.parent_version, third.dataset.num_test) == ("promoted", "2", 4)
    record = record_of(third)
    assert (record.tasks[0].test_uris[0], record.tasks[0].num_test) == (third.dataset.uri, 4)
    assert before.matrix is not None
    assert record.matrix.rows[0] == tuple(before.matrix["rows"][0]), "figures of before the parent stay"
    renewed = (record.matrix.rows[1][0], record.matrix.base[0])
    assert all(value is not None and (4 * value).is_integer() for value in renewed), "measured on the four new rows"
    assert set(asyncio.run(evaluate("l")).unjudged) == set(unjudged)
    places = [record.matrix.tasks.index(task) for task in unjudged]
    assert all(record.matrix.rows[2][place] == record.matrix.rows[1][place] for place in places)
    notes = json.loads(open_store().get_bytes(report_key("l", third.run_key, "evaluation.json")))["notes"]
    assert sum("was not judged" in note for note in notes) == len(unjudged)


@pytest.mark.nightly
def test_two_tasks_without_test_rows_are_judged_again_one_after_the_other(
    tiny_base: Path, tmp_path: Path, first: AdaptResult
) -> None:
    second = run(tiny_base, CLINIC)
    for each in (first, second):
        asyncio.run(forget(each.dataset.sha256))
    with pytest.raises(TestRowsForgottenError):
        run(tiny_base, {**CLINIC, "name": "wards", "instruction": "Which ward?"})
    _judged_anew(tiny_base, tmp_path, second, unjudged={"clinic"})
    repaired = run(tiny_base, CLINIC, again=True)
    assert repaired.status == "promoted" and asyncio.run(evaluate("l")).unjudged == {}


def test_forgotten_rows_are_learned_again_only_when_asked(tiny_base: Path, first: AdaptResult) -> None:
    asyncio.run(forget(first.dataset.sha256[:10]))
    learned = run(tiny_base, land(), again=True)
    assert (learned.status, learned.dataset.uri) == ("promoted", first.dataset.uri)
    assert asyncio.run(evaluate("l")).unjudged == {}


def test_the_log_forgets_an_arrivals_rows_and_keeps_the_others(
    first: AdaptResult, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flows.forget.BATCH_SECONDS", 0.0)  # no server answers; the next test has one
    test_row = json.loads(Path(BANK["test_data"]).read_text().splitlines()[0])["text"]
    mine, _, other = logged([f"My  card {SECRET} was lost abroad. ", test_row, "Something else."])
    store = open_store()
    plan = plan_forget(store, first.dataset.sha256)
    (held,) = (each for each in plan.held if each.kind == "logged answers")
    assert held.address == "2 rows of predictions/l" and plan.unknown == ()
    assert SECRET not in plan.model_dump_json() and len(read_predictions(store, "l")) == 3
    for name, answer in (("feedback-1", mine), ("feedback-2", other), ("june", mine)):
        row = json.dumps({"text": "t", "answer_id": answer})
        store.put_bytes(f"inbox/other/{name}.jsonl", f"{row}\n3\n{{".encode())
    plan = asyncio.run(forget(first.dataset.sha256)).plan
    assert plan.harvested == ("inbox/other/feedback-1.jsonl",) and store.exists(plan.harvested[0])
    assert any("inbox/other/feedback-1.jsonl" in str(each) for each in show_forget_plan(plan, "Removed"))
    assert [*read_predictions(store, "l")["id"]] == [other] == [*read_feedback(store, "l")["id"]]
    assert not holding(home, SECRET)


def test_answers_that_a_server_has_not_stored_yet_are_forgotten(
    first: AdaptResult, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged(["Something else."])  # forget waits for servers of a log that has rows
    stack, sleep = ExitStack(), asyncio.sleep
    stack.enter_context(logging([f"My card {SECRET} was lost abroad."]))

    async def sleep_while_the_server_stores(seconds: float) -> None:
        if seconds == 2 * BATCH_SECONDS:
            stack.close()
        else:
            await sleep(seconds)

    assert len(keys("predictions")) == 1
    monkeypatch.setattr(asyncio, "sleep", sleep_while_the_server_stores)
    asyncio.run(forget(first.dataset.sha256))
    stack.close()
    store = open_store()
    assert len(read_predictions(store, "l")) == len(read_feedback(store, "l")) == 1 and not holding(home, SECRET)


def test_a_test_file_alone_does_not_tell_the_training_rows(first: AdaptResult) -> None:
    store = open_store()
    assert plan_forget(store, first.dataset.sha256).unknown == ()
    training = store.get_bytes("inbox/bank/may.jsonl")
    store.delete("inbox/bank/may.jsonl")
    (rows,) = plan_forget(store, first.dataset.sha256).unknown
    assert (rows.file, rows.num_rows, rows.why) == ("train.parquet", first.dataset.num_train, "gone")
    store.put_bytes("inbox/bank/copy.jsonl", training)
    store.delete("inbox/bank/test.jsonl")
    assert plan_forget(store, first.dataset.sha256).unknown == (), "a copy of the file has them too"


@pytest.mark.nightly
@pytest.mark.usefixtures("first")
def test_forgotten_test_rows_do_not_come_back_with_another_file(tiny_base: Path, tmp_path: Path) -> None:
    june, july = tmp_path / "june.jsonl", tmp_path / "july.jsonl"
    for path in (june, july):
        path.write_text("".join(f'{{"text": "{path.name} {number}", "label": "lost card"}}\n' for number in range(9)))
    task = {**land(), "data": str(june)}
    assert run(tiny_base, task).version == "2"
    roll_back(open_store(), "l", "1", who="tester", why="a test")
    asyncio.run(forget("inbox/bank/may.jsonl"))
    land()
    with pytest.raises(ForgottenRowsError, match="These test rows of 'bank' were forgotten on"):
        run(tiny_base, {**task, "data": str(july)})
    with pytest.raises(ForgottenRowsError, match="forgotten on"):
        asyncio.run(requeue("l", ["2"]))


@pytest.mark.nightly
@pytest.mark.usefixtures("first")
def test_rows_that_were_learned_can_judge_a_task_whose_test_rows_were_forgotten(
    tiny_base: Path, tmp_path: Path
) -> None:
    june = tmp_path / "june.jsonl"
    june.write_text("".join(f'{{"text": "My card {number}", "label": "lost card"}}\n' for number in range(40)))
    task = {"name": "bank", "data": str(june)}
    assert run(tiny_base, task).dataset.num_test == 0
    asyncio.run(forget("inbox/bank/may.jsonl"))
    judged = run(tiny_base, task)
    assert (judged.status, judged.parent_version) == ("promoted", "2") and judged.dataset.num_test > 0
    assert asyncio.run(evaluate("l")).unjudged == {}


@pytest.mark.nightly
def test_the_same_file_split_otherwise_in_another_lineage_is_forgotten_with_it(
    tiny_base: Path, home: Path, tmp_path: Path
) -> None:
    june, other = tmp_path / "june.jsonl", tmp_path / "other.jsonl"
    texts = [f"My card {number} {SECRET}" for number in range(20)]
    june.write_text("".join(json.dumps({"text": text, "label": "lost card"}) + "\n" for text in texts))
    other.write_text("".join(f'{{"text": "My card {number}", "label": "lost card"}}\n' for number in range(20)))
    retained = {"retain_training_rows": True}
    named = run(tiny_base, {"name": "bank", "data": str(june)}, data=retained)
    stays = run(tiny_base, {"name": "bank", "data": str(other)}, lineage="m", data=retained)
    split = run(tiny_base, {"name": "bank", "data": str(june)}, lineage="m", data=retained)
    shares = run(tiny_base, {"name": "bank", "data": str(june)}, lineage="n", data={**retained, "test_share": 0.5})
    digests = {each.dataset.sha256 for each in (named, split, shares)}
    assert len(digests) == 3 and split.dataset.num_test == split.dataset.num_added == 4, (
        "the same rows, split in three ways"
    )
    assert len(holding(home, SECRET)) >= 5

    plan = plan_forget(open_store(), named.dataset.sha256)
    assert {(each.lineage, each.version) for each in plan.learned} == {("l", "1"), ("m", "2"), ("n", "1")}
    assert plan.unjudged == ("l", "n") and plan.shared_with == ()
    done = asyncio.run(forget(named.dataset.sha256))
    assert holding(home, SECRET) == []
    kept = keys("datasets/bank")
    assert kept and all(key.startswith(stays.dataset.uri) for key in kept), "other rows of the task stay"
    assert done.tombstone.versions == ("l/1", "m/2", "n/1")
    for digest in digests:
        assert asyncio.run(forget(digest)).plan.held == (), "no file has one of its digests"

    again = tmp_path / "again.csv"
    again.write_text("text,label\n" + "".join(f"{text},lost card\n" for text in texts))
    with pytest.raises(ForgottenRowsError, match="forgotten on"):  # other bytes, and a split that was never made
        run(tiny_base, {"name": "bank", "data": str(again)}, lineage="o", data={**retained, "test_share": 0.4})
    assert keys("datasets/bank") == kept


@pytest.mark.parametrize("named", ["0123456789", "inbox/bank/june.jsonl", "june.jsonl", "abc"])
def test_what_names_no_arrival_is_refused(first: AdaptResult, named: str) -> None:
    with pytest.raises(ConfigError):
        find_arrival(open_store(), named)


def test_a_refused_file_is_forgotten_by_its_key(tiny_base: Path) -> None:
    store = open_store()
    store.put_bytes("inbox/bank/bad.jsonl", (json.dumps({"text": "", "label": SECRET}) + "\n").encode() * 3)
    task = {"name": "bank", "data": store.uri_of("inbox/bank/bad.jsonl")}
    with pytest.raises(DataValidationError):
        run(tiny_base, task)
    assert keys("quarantine")
    content = store.get_bytes("inbox/bank/bad.jsonl")
    done = asyncio.run(forget("inbox/bank/bad.jsonl"))
    assert {each.kind for each in done.plan.held} == {"quarantine", "inbox file"} and not done.plan.learned
    assert keys("quarantine") == keys("inbox") == []
    store.put_bytes("inbox/bank/other name.jsonl", content)
    with pytest.raises(DataValidationError, match="forgotten on"):
        run(tiny_base, {**task, "data": store.uri_of("inbox/bank/other name.jsonl")})


def land_folder() -> dict[str, Any]:
    """Put the rows of `land` into the inbox as a folder of three files; return the task."""
    task, store = land(), open_store()
    lines = store.get_bytes("inbox/bank/may.jsonl").splitlines(keepends=True)
    store.delete("inbox/bank/may.jsonl")
    for number, part in enumerate((lines[:9], lines[9:12], lines[12:])):
        store.put_bytes(f"inbox/bank/may/part-{number}.jsonl", b"".join(part))
    store.put_bytes("inbox/bank/may/_SUCCESS", b"")
    store.put_bytes("inbox/bank/may/_delta_log/0.json", SECRET.encode())
    return {**task, "data": store.uri_of("inbox/bank/may")}


@pytest.mark.nightly
def test_a_file_of_a_folder_names_the_whole_arrival(tiny_base: Path, home: Path) -> None:
    store = open_store()
    result = run(tiny_base, land_folder())
    (bad,) = map(json.loads, store.get_bytes(str(result.dataset.quarantine)).splitlines())
    assert (bad["file"], bad["reason"]) == ("may/part-2.jsonl", "empty text")
    part = store.get_bytes("inbox/bank/may/part-1.jsonl")
    store.delete("inbox/bank/may/part-1.jsonl")
    (rows,) = plan_forget(store, "inbox/bank/may").unknown
    assert rows.file == "train.parquet", "a part of the folder does not have them all"
    store.put_bytes("inbox/bank/may/part-1.jsonl", part)
    whole = run(tiny_base, land())
    assert (whole.status, whole.run_key) == ("repeat", result.run_key), "the same rows in one file"
    store.delete("inbox/bank/may.jsonl")

    plan = plan_forget(store, "inbox/bank/may/part-1.jsonl")
    assert plan == plan_forget(store, "inbox/bank/may/") == plan_forget(store, "inbox/bank/may")
    assert (plan.sha256, len(plan.files), plan.unknown) == (result.dataset.sha256, 5, ())
    asyncio.run(forget("inbox/bank/may/part-1.jsonl"))
    assert holding(home, SECRET) == [] == keys("inbox/bank")
    store.put_bytes("inbox/bank/june/a.jsonl", Path(CLINIC["data"]).read_bytes())
    store.put_bytes("inbox/bank/june/b.jsonl", part)
    with pytest.raises(ForgottenRowsError, match="forgotten on"):
        run(tiny_base, {"name": "bank", "data": store.uri_of("inbox/bank/june")})


def test_the_bad_rows_of_files_that_were_refused_together_are_forgotten_by_each_file(tiny_base: Path) -> None:
    store, addresses = open_store(), []
    for name in ("a", "b", "c"):
        store.put_bytes(f"inbox/bank/{name}.jsonl", (json.dumps({"text": "", "label": name + SECRET}) + "\n").encode())
        addresses.append(store.uri_of(f"inbox/bank/{name}.jsonl"))
    with pytest.raises(DataValidationError, match=r"a\.jsonl and 2 more: 3 of 3 rows cannot be used"):
        run(tiny_base, {"name": "bank", "data": addresses}, data={"max_bad_share": 0.9})  # so all of them are read
    assert len(keys("quarantine")) == 2
    asyncio.run(forget("inbox/bank/b.jsonl"))
    assert (keys("quarantine"), keys("inbox")) == ([], ["inbox/bank/a.jsonl", "inbox/bank/c.jsonl"])
