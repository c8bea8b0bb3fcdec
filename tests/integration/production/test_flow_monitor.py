"""Live traffic of a version that the tiny base has learned: reference, looks, alarms, notices, page and state."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from mlflow import MlflowClient

from deal_core.data.rows import stored_input_digest
from deal_core.errors import ConfigError
from deal_core.judging_config import DriftLimits
from flows.champions import evaluate, monitor, monitor_lineages
from flows.forget import forget
from infra.lineage_state import read_state
from infra.run_journal import RunJournal
from infra.store.keys import baseline_key
from infra.store.opening import open_store
from tasks.lineage.history import find_version
from tasks.lineage.record import read_record
from tasks.lineage.reports import save_report
from tasks.monitoring.look import MonitorResult
from tasks.monitoring.rows import REFERENCE_FILE, champion_since, read_reference
from tasks.predict import predict_file
from tests.adapting import CLINIC
from tests.in_process import deal, deal_json
from tests.monitored import feedback_on, put_feedback, put_predictions
from tests.receiver import Receiver

pytestmark = pytest.mark.usefixtures("prefect_api")
NUM_LIVE = 200


@pytest.fixture
def lineage(copied_home: Path) -> Path:
    """A home whose lineage `l` has the champion 3, which knows bank and clinic."""
    return copied_home


def reference_of(version: str = "3") -> pd.DataFrame:
    found = read_reference(open_store(), find_version(open_store(), "l", version).adapter_uri)
    assert found is not None
    return found


def live(seed: int, *, task: str = "bank", version: str = "3", **columns: Any) -> pd.DataFrame:
    """Traffic that is like the reference, one row a second from now on."""
    rows = reference_of()
    rows = rows[rows["task"] == task].sample(NUM_LIVE, replace=True, random_state=seed, ignore_index=True)
    times = time.time() + NUM_LIVE * seed + np.arange(NUM_LIVE)
    names = [f"{task}-{seed}-{number}" for number in range(NUM_LIVE)]
    rows = rows.assign(id=names, input_sha256=names, time=times, version=version, seconds=0.1)
    return rows.drop(columns="score").assign(**columns)


def look(**options: Any) -> MonitorResult:
    return asyncio.run(monitor("l", **options))


def store_has_baseline() -> bool:
    return bool([*open_store().list("monitor")])


def test_the_evaluation_writes_a_reference_without_texts(lineage: Path) -> None:
    store, info = open_store(), find_version(open_store(), "l", "3")
    record, found = read_record(store, info), reference_of()
    assert {*found["task"]} == {"bank", "clinic"}
    for known in record.tasks:
        rows = found[found["task"] == known.schema.name]
        tests = pd.read_parquet(lineage / "store" / known.test_uris[0] / "test.parquet").set_index("sha256")
        tests = tests.loc[rows["id"]]
        assert rows["score"].mean() == pytest.approx(record.accuracies()[known.schema.name])
        assert [*rows["input_sha256"]] == [stored_input_digest("labelled", text).hex() for text in tests["input"]]
        assert [*rows["chars"]] == [len(text) for text in tests["input"]]
        assert rows["confidence"].between(0, 1).all() and rows["label_mass"].between(0, 1).all()
        assert set(rows["label"].dropna()) <= set(known.schema.labels)
        assert [*rows["is_label"]] == [*rows["label"].notna()]
    assert found["input"].isna().all() and found["output"].isna().all()
    assert find_version(open_store(), "l", "2").adapter_uri != info.adapter_uri and not reference_of("2").empty

    store.delete(f"{info.adapter_uri}/{REFERENCE_FILE}")
    put_predictions(store, "l", live_of(found), "a")
    assert "deal version evaluate --lineage l" in (look().problem or "")
    asyncio.run(evaluate("l"))
    again, found = (each.sort_values("id", ignore_index=True) for each in (reference_of(), found))
    pd.testing.assert_frame_equal(again, found, check_exact=False, atol=0.02)


def live_of(reference: pd.DataFrame) -> pd.DataFrame:
    return reference.assign(time=time.time() + 1.0, version="3", seconds=0.1)


@pytest.mark.usefixtures("without_mlflow")
def test_an_alarm_is_announced_once_until_it_was_gone(lineage: Path, receiver: Receiver) -> None:
    store = open_store()
    assert "has no answer of version 3" in (look().problem or "")
    assert read_state(store, "l").monitor is None
    put_predictions(store, "l", live(1), "a")
    usual = look()
    assert usual.drift is not None and usual.drift.task("bank").status == "compared" and not usual.alarms
    assert usual.drift.task("clinic").status == "too few rows"

    shift = {"confidence": 0.999, "chars": 5000}
    put_predictions(store, "l", pd.concat([live(seed, **shift) for seed in (2, 3, 4)]), "b")
    shifted = look()
    (alarm,) = shifted.new_alarms
    assert (alarm.task, alarm.kind, len(alarm.reasons)) == ("bank", "drift", 2) == (alarm.task, alarm.kind, 2)
    again = look()
    assert not again.new_alarms and [each.since for each in again.alarms] == [alarm.since]
    put_predictions(store, "l", pd.concat([live(seed) for seed in (5, 6, 7)]), "c")
    assert not look().alarms
    put_predictions(store, "l", pd.concat([live(seed, **shift) for seed in (8, 9, 10)]), "d")
    (second,) = look().new_alarms
    assert second.since > alarm.since

    told = receiver.told()
    assert [each["event"] for each in told] == ["deal.drift.detected"] * 2
    assert told[0]["id"] != told[1]["id"]
    payload = told[0]["payload"]
    assert (payload["lineage"], payload["task"], payload["version"]) == ("l", "bank", "3")
    assert payload["reasons"] == list(alarm.reasons) and "length of inputs" in payload["reasons"][1]


def test_a_look_is_kept_in_mlflow_on_the_page_and_in_the_status(lineage: Path, tmp_path: Path) -> None:
    put_predictions(open_store(), "l", pd.concat([live(1), live(1, task="clinic", confidence=0.999)]), "a")
    before = RunJournal(open_store()).all("l")
    found = deal_json("monitor", "--lineage", "l")
    deal("monitor", "--lineage", "l", "--json")
    assert {each["kind"] for each in found["new_alarms"]} == {"drift"}
    client = MlflowClient(f"sqlite:///{lineage / 'mlflow.db'}")
    experiments = [each.experiment_id for each in client.search_experiments()]
    (run,) = client.search_runs(experiments, "tags.`deal.kind` = 'monitor'")
    assert run.data.tags["deal.version"] == "3" and run.info.status == "FINISHED"
    assert run.data.metrics["drift.clinic.confidence"] > 0.15 and run.data.metrics["drift.bank.num_live"] == NUM_LIVE
    steps = [each.step for each in client.get_metric_history(run.info.run_id, "drift.bank.alarms")]
    assert steps == [1, 2], "all looks at a version are one run"
    assert RunJournal(open_store()).all("l") == before, "no adaptation"

    page = save_report(open_store(), "l", "3", tmp_path / "page.html").read_text(encoding="utf-8")
    assert '<h2 id="live">Live traffic</h2>' in page and "clinic: drift</h3>" in page and "bank: no alarm</h3>" in page
    assert page.count("What to do: ") == 1 and "deal feedback sample clinic --lineage" in page
    assert page.count(" and its reference</title>") == 2
    run_key = find_version(open_store(), "l", "3").run_key
    (own,) = client.search_runs(experiments, f"tags.`deal.run_key` = '{run_key}'")
    kept = Path(client.download_artifacts(own.info.run_id, "report.html", str(tmp_path))).read_text(encoding="utf-8")
    assert kept == page
    assert "Live traffic" not in save_report(open_store(), "l", "1", tmp_path / "one.html").read_text(encoding="utf-8")
    assert "l live: version 3" in deal("status") and "clinic: drift since" in deal("status")
    shown = " ".join(deal("monitor", "--lineage", "l").split())
    assert "alarm" in shown and "deal feedback sample clinic --lineage l" in shown, "what to do is said"


@pytest.mark.usefixtures("lineage", "without_mlflow")
def test_a_look_counts_while_mlflow_is_away(
    receiver: Receiver, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    put_predictions(open_store(), "l", live(1, confidence=0.999), "a")
    found = look()
    assert "MLflow lacks a look at version 3" in caplog.text
    assert [each.kind for each in found.new_alarms] == ["drift"] and len(receiver.told()) == 1
    state = read_state(open_store(), "l").monitor
    assert state is not None and state.num_looks == 1
    page = save_report(open_store(), "l", "3", tmp_path / "page.html").read_text(encoding="utf-8")
    assert "bank: drift</h3>" in page


def test_only_rows_since_the_promotion_count(lineage: Path) -> None:
    store = open_store()
    since = champion_since(store, "l", "3")
    assert since is not None and champion_since(store, "l", "1") is None
    put_predictions(store, "l", live(1, version="1"), "a")
    put_predictions(store, "l", live(2).assign(time=since - 60.0), "b")
    assert "has no answer of version 3" in (look().problem or "")


def test_feedback_that_says_wrong_is_a_drop(lineage: Path, receiver: Receiver) -> None:
    store = open_store()
    uri = find_version(open_store(), "l", "3").adapter_uri
    right = reference_of().assign(score=1.0)  # the tiny model knows nothing
    right.to_parquet(lineage / "store" / uri / REFERENCE_FILE)
    rows = live(1, label="fee dispute", is_label=True)
    put_predictions(store, "l", rows, "a")
    put_feedback(store, "l", feedback_on(rows, [True] * 20 + [False] * 80), "a")
    found = look()
    assert found.drift is not None
    measured = found.drift.task("bank").measured
    assert measured is not None and measured.accuracy == 0.2 and measured.num_rows == 100
    before = found.drift.task("bank").before
    assert before == read_record(store, find_version(open_store(), "l", "1")).accuracies()["bank"]
    told = {each["event"]: each["payload"] for each in receiver.told()}
    assert "measured at 20.0 %" in told["deal.quality.dropped"]["reasons"][0]
    assert told["deal.quality.dropped"]["accuracies"] == {"bank": 0.2}


def test_answers_of_another_server_are_compared_from_a_file(lineage: Path, tmp_path: Path, receiver: Receiver) -> None:
    texts = tmp_path / "june.jsonl"
    rows = [{"body": f"My card number {number} is lost", "answer": number} for number in range(120)]
    texts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    answers = predict_file(open_store(), texts, lineage="l", task="bank", version=None, out=None, column="body")
    assert answers.columns["answer"] == "deal_answer"
    renamed = tmp_path / "answers.jsonl"
    renamed.write_text(Path(answers.out).read_text().replace('"body"', '"text"'))
    found = look(data=str(renamed))
    assert found.drift is not None and found.num_rows == 120
    bank = found.drift.task("bank")
    assert bank.status == "compared" and bank.estimated is None
    assert {"length of inputs", "texts"} <= {test.name for test in bank.tests if test.is_alarm}
    assert not {"confidence", "label mass"} & {test.name for test in bank.tests}
    assert not found.new_alarms and not receiver.told() and read_state(open_store(), "l").monitor is None

    logged = tmp_path / "log.parquet"
    live(1).to_parquet(logged)
    assert look(data=str(logged)).drift is not None
    with pytest.raises(ConfigError, match="give one of them"):
        look(data=str(logged), new_reference=True)
    assert not store_has_baseline()
    frame = live(1)
    blank = tmp_path / "log.jsonl"
    values = frame.drop(columns=["label_mass"]).assign(is_label=frame["label"].notna()).to_json(orient="records")
    lines = [json.dumps({**row, "task": ""} if number < 5 else row) for number, row in enumerate(json.loads(values))]
    blank.write_text("\n".join([*lines, "{ no row"]) + "\n")
    found = look(data=str(blank))
    assert (found.num_rows, found.num_faulty) == (NUM_LIVE, 1) and found.drift is not None
    assert found.drift.task("bank").num_logged + found.drift.task("clinic").num_logged == NUM_LIVE
    assert found.drift.task("clinic").num_logged == 5, "a row without a task is of the task learned last"
    live(1, version="1").to_parquet(logged)
    with pytest.raises(ConfigError, match="no answer of version 3 of l, only of version 1"):
        look(data=str(logged))
    with pytest.raises(ConfigError, match="nor a column 'answer'"):
        look(data=str(CLINIC["data"]))


@pytest.mark.usefixtures("without_mlflow")
def test_present_traffic_can_take_the_references_place(lineage: Path) -> None:
    store = open_store()
    put_predictions(store, "l", live(1, chars=5000).iloc[:50], "a")
    with pytest.raises(ConfigError, match="No task has 100 live rows"):
        look(new_reference=True)
    few = live(1, chars=5000).iloc[:50]
    repeats = [few.assign(id=[f"{number}-{name}" for name in few["id"]]) for number in range(3)]
    put_predictions(store, "l", pd.concat(repeats), "repeats")
    with pytest.raises(ConfigError, match="No task has 100 live rows"):  # a look counts a repeat once too
        look(new_reference=True)
    put_predictions(store, "l", pd.concat([live(seed, chars=5000) for seed in (2, 3, 4)]), "b")
    assert [each.kind for each in look().alarms] == ["drift"]
    store.put_bytes(baseline_key("l", "1"), b"of a version before")
    deal("monitor", "--new-reference", "--lineage", "l", "--home", str(lineage))
    found = look()
    assert not found.alarms and found.drift is not None and found.drift.task("bank").is_of_live_rows
    (kept,) = (lineage / "store" / "monitor" / "l").iterdir()  # what was kept for another version is gone
    rows = pd.read_parquet(kept)
    assert not {"id", "input_sha256", "time", "input"} & {*rows.columns}
    assert len(rows) == DriftLimits().window_rows, "the window of a look"


def test_forgotten_test_rows_leave_the_references(lineage: Path) -> None:
    store = open_store()
    bank = read_record(store, find_version(open_store(), "l", "3")).task("bank")
    assert bank is not None
    done = asyncio.run(forget(bank.test_uris[0].split("/")[2]))
    assert {each.version for each in done.plan.held if each.kind == "reference rows"} == {"1", "2", "3"}
    for version in ("2", "3"):
        assert {*reference_of(version)["task"]} == {"clinic"}
    assert not store.exists(f"{find_version(open_store(), 'l', '1').adapter_uri}/{REFERENCE_FILE}")


def test_every_champion_is_looked_at(lineage: Path) -> None:
    (lineage / "store" / "lineages").mkdir()
    (lineage / "store" / "lineages" / "without-a-champion.yaml").write_text("lineage: without-a-champion\n")
    put_predictions(open_store(), "l", live(1), "a")
    (found,) = asyncio.run(monitor_lineages())
    assert found.lineage == "l" and found.drift is not None, "a lineage needs no file to be looked at"
    (lineage / "store" / "lineages" / "l.yaml").write_text("lineage: l\nmonitor: {sensitivity: low}\n")
    (less,) = asyncio.run(monitor_lineages())
    assert found.drift is not None and less.drift is not None
    limits, wider = ({test.name: test.limit for test in look.drift.task("bank").tests} for look in (found, less))
    assert limits and all(wider[name] > limit for name, limit in limits.items()), "the settings of its file count"
