"""A run's page and notices, and that no text of a row leaves the store: checked after two adaptations."""

from __future__ import annotations

import asyncio
import json
import logging
import shutil
import uuid
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pyarrow.parquet as pq
import pytest
import tenacity
from mlflow import MlflowClient
from prefect.blocks.notifications import CustomWebhookNotificationBlock
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.settings import get_current_settings

from benchmarks.tiny_base import NO_LIMITS
from deal_core.errors import ConfigError, DataValidationError, RegistryError
from deal_pipeline.server.automations import NEVER_BEGAN, apply_notifications, automations, notifications
from flows.adapt import adapt
from flows.adapt_result import AdaptResult
from infra.report.run_report import RunReport
from infra.store.keys import report_key
from infra.store.opening import open_store
from tasks.lineage.frozen_rows import ANSWERS_FILE
from tasks.lineage.history import find_version
from tasks.lineage.reports import save_report
from tasks.notices import Notice, announce, announce_failure
from tasks.spec import AdaptSpec, parse
from tests.in_process import deal, deal_json
from tests.receiver import Receiver
from tests.registering import mlflow_run

PLANTED = "xylophone-4711"
"""In every row's text, in a label that is wrong, and in no name."""
LABELS = ["tall order", "long wait"]
CONTRARY = "Texts with several labels: 1 (2 training rows, 0 test rows)."

pytestmark = pytest.mark.usefixtures("prefect_api", "home")


def write_rows(path: Path, task: str) -> Path:
    rows = [
        {"text": f"{PLANTED} {task} {number}", "label": LABELS[number % 2], "split": "test" if number < 12 else "train"}
        for number in range(24)
    ]
    rows += [{"text": f"{PLANTED} bad", "label": f"{PLANTED} label", "split": "train"}]
    rows += [{**rows[20], "label": LABELS[1]}]  # the text of a row, with the other label
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def learn(base: Path, file: Path, lineage: str, task: str, **settings: Any) -> AdaptResult:
    values = {
        "lineage": lineage,
        "base_model": str(base),
        "task": {"name": task, "data": str(file), "labels": LABELS},
        "gate": NO_LIMITS,
        "train": {"max_steps": 3, "max_prompt_tokens": 128, "max_answer_tokens": 8, "checkpoint_steps": 0},
        **settings,
    }
    return asyncio.run(adapt(parse(AdaptSpec, values, "test")))


def ask(path: str, body: Any) -> Any:
    return httpx.post(f"{get_current_settings().api.url}/{path}", json=body).raise_for_status().json()


def events_of(name: str, resource: str, number: int) -> list[dict[str, Any]]:
    """Events that the server has stored. The server stores them in batches."""
    wanted = {"event": {"name": [name]}, "resource": {"id": [resource]}}
    for attempt in tenacity.Retrying(wait=tenacity.wait_fixed(0.2), stop=tenacity.stop_after_delay(60)):
        with attempt:
            found: list[dict[str, Any]] = ask("events/filter", {"filter": wanted})["events"]
            assert len(found) == number
    return found


def block_of(receiver: Receiver) -> CustomWebhookNotificationBlock:
    """A notification block that sends to the receiver."""
    return CustomWebhookNotificationBlock(
        name="test", url=receiver.url, json_data={"text": "{{subject}}\n{{body}}"}, allow_private_urls=True
    )


async def clear_automations() -> None:
    """The server serves other tests as well."""
    async with get_client() as server:
        for each in await server.read_automations():
            await server.delete_automation(each.id)


def client(home: Path) -> MlflowClient:
    return MlflowClient(f"sqlite:///{home / 'mlflow.db'}")


def files_with(folder: Path, text: str) -> set[str]:
    return {path.name for path in folder.rglob("*") if path.is_file() and text.encode() in path.read_bytes()}


def test_a_page_is_shown_in_mlflow_and_written_again_from_the_store_alone(
    tiny_base: Path, tmp_path: Path, home: Path, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    results = [
        learn(tiny_base, write_rows(tmp_path / f"{task}.jsonl", task), "pages", task, data={"include_texts": True})
        for task in ("first", "second")
    ]
    run_id = mlflow_run("pages", results[1].run_key).info.run_id
    artifacts = Path(client(home).download_artifacts(run_id, "", str(tmp_path)))
    page = (artifacts / "report.html").read_bytes()
    report = RunReport.from_json(json.loads((artifacts / "report.json").read_text()))

    assert [each.task for each in report.changed] == ["first", "second"]
    before = {"first": results[0].accuracies["first"], "second": results[1].matrix["rows"][0][1]}  # type: ignore[index]
    for each in report.changed:  # the rows whose answers changed explain the difference of the accuracies
        assert each.num_rows == 12
        gain = each.num_gained - each.num_lost
        assert gain == round(12 * (results[1].accuracies[each.task] - before[each.task]))
        assert all(row.expected in LABELS and PLANTED in (row.text or "") for row in (*each.gained, *each.lost))
        assert all((row.now == row.expected, row.before == row.expected) == (True, False) for row in each.gained)
    assert report.quality.problems == {"label outside the task's set": 1}
    assert report.quality.bad_rows[0].problems == (f"label outside the task's set: {PLANTED} label",)
    (contrary,) = report.quality.warnings
    assert CONTRARY in contrary and f"'{PLANTED} second 20': 'tall order' and 'long wait'" in contrary
    assert CONTRARY.encode() in page and f"{PLANTED} second 20".encode() in page
    assert {"train", "evaluate", "register"} <= set(report.seconds) and report.libraries["torch"]
    assert results[1].dataset.sha256.encode() in page

    said = [record.getMessage() for record in caplog.records if CONTRARY in record.getMessage()]
    assert len(said) == 2 and not any(PLANTED in each for each in said), "each run warns at once, without a text"
    (home / "mlflow.db").unlink()
    shutil.rmtree(home / "mlflow-artifacts")
    file = tmp_path / "new" / "page.html"
    shown = deal_json("version", "show", "2", "--report", "--lineage", "pages", "--out", str(file))
    assert file.read_bytes() == page and b"Version 2 of pages has learned second, passed the gate" in page
    assert (shown["page"], shown["version"]["since"]["standing"]) == (str(file), "learned")
    deal("version", "show", "1", "--report", "--lineage", "pages")
    assert b"Version 1 of pages" in (home / "reports" / "pages-1.html").read_bytes()

    first, second = receiver.told()
    assert first["event"] == second["event"] == "deal.version.promoted" and first["id"] != second["id"]
    assert second["payload"]["version"] == "2" and second["payload"]["accuracies"] == results[1].accuracies
    assert second["payload"]["run_key"] == results[1].run_key
    events = events_of("deal.version.promoted", "deal.lineage.pages", 2)
    assert {each["id"]: each["payload"] for each in events} == {each["id"]: each["payload"] for each in (first, second)}
    assert all(event["related"][0]["prefect.resource.role"] == "flow-run" for event in events)


def test_no_text_of_a_row_gets_out_unless_it_may(
    tiny_base: Path, tmp_path: Path, home: Path, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    for task in ("first", "second"):
        result = learn(
            tiny_base,
            write_rows(tmp_path / f"{task}.jsonl", task),
            "quiet",
            task,
            strategy="replay",
            train={"max_steps": 3, "max_prompt_tokens": 128, "max_answer_tokens": 8, "checkpoint_steps": 0},
        )
        key = f"adapters/quiet/{result.run_key[:16]}/{ANSWERS_FILE}"
        known = json.loads(open_store().get_bytes(key))
        # the tiny model learns nothing in three steps, so its stored answers are replaced by right ones
        rows = pq.read_table(home / "store" / result.dataset.uri / "test.parquet").to_pylist()
        known["now"][task] = {row["sha256"]: row["output"] for row in rows}
        open_store().put_bytes(key, json.dumps(known).encode())
    broken = tmp_path / "broken.jsonl"
    broken.write_text("".join(json.dumps({"text": "", "label": PLANTED}) + "\n" for _ in range(9)))
    with pytest.raises(DataValidationError, match="9 of 9 rows cannot be used"):
        learn(tiny_base, broken, "quiet", "third")

    kept = {path.name for path in (home / "mlflow-artifacts").rglob("*")}
    assert {"report.html", "report.json", "evaluation.json", "adapter_model.safetensors", "deal.json"} <= kept
    assert not kept & {"method.safetensors", ANSWERS_FILE}, "the first holds rows as tokens"
    assert not files_with(home / "mlflow-artifacts", PLANTED)
    assert PLANTED.encode() not in (home / "mlflow.db").read_bytes()
    assert any(name.endswith(".jsonl") for name in files_with(home / "store", PLANTED)), "only the store has them"
    assert set(known["now"]) == {"first", "second"}
    file = save_report(open_store(), "quiet", "2", tmp_path / "page.html").read_text(encoding="utf-8")
    assert CONTRARY in file
    assert not [path for path in (home / "store").rglob("manifest.json") if PLANTED in path.read_text()]
    assert "Lost: 1" in file and "data.include_texts is off" in file, "rows were lost, and named by digest only"

    notices = receiver.told()
    assert [each["event"].rpartition(".")[2] for each in notices] == ["promoted", "promoted", "failed"]
    assert "9 of 9 rows cannot be used" in notices[2]["payload"]["error"] and PLANTED not in json.dumps(notices)
    assert PLANTED not in caplog.text
    (artifact,) = ask("artifacts/latest/filter", {"artifacts": {"key": {"any_": ["adapt-quiet"]}}})
    assert "# Version 2 of quiet has learned second" in artifact["data"]
    assert PLANTED not in artifact["data"]
    name = {"flow_runs": {"name": {"like_": "adapt-quiet"}}}
    runs, logs = ask("flow_runs/filter", name), ask("logs/filter", {})
    assert {run["state_type"] for run in runs} == {"COMPLETED", "FAILED"}
    assert PLANTED not in json.dumps(runs) and not [log for log in logs if PLANTED in log["message"]]


def test_a_version_without_report_data_is_refused_in_words(copied_home: Path, tmp_path: Path) -> None:
    """Version 2 of `l` was rejected."""
    page = save_report(open_store(), "l", "2", tmp_path / "page.html").read_text(encoding="utf-8")
    assert "was rejected by the gate" in page
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="--out"):
        save_report(open_store(), "l", "2", tmp_path / "file" / "page.html")
    open_store().delete(report_key("l", find_version(open_store(), "l", "2").run_key, "report.json"))
    with pytest.raises(RegistryError, match="has no report"):
        save_report(open_store(), "l", "2", tmp_path / "page.html")
    with pytest.raises(RegistryError, match="no version 7"):
        save_report(open_store(), "l", "7", tmp_path / "page.html")


def test_an_automation_that_is_switched_on_tells_through_a_block(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [each.name for each in notifications(None)]
    block = block_of(receiver)

    async def switch_on() -> None:
        async with get_client() as server:

            async def found() -> list[Any]:
                return [(await server.read_automations_by_name(name))[0] for name in names]

            await apply_notifications(server)
            off = [(False, "do-nothing")] * len(names)
            assert [(each.enabled, each.actions[0].type) for each in await found()] == off
            monkeypatch.setenv("DEAL_NOTIFICATION_BLOCK", "custom-webhook/operators")
            with pytest.raises(ConfigError, match="no block custom-webhook/operators"):
                await apply_notifications(server)
            await block.save("operators")
            await server.resume_automation((await found())[1].id)
            await apply_notifications(server)
            await apply_notifications(server)
            assert [each.actions[0].type for each in await found()] == ["send-notification"] * len(names)
            kept = [place == 1 for place in range(len(names))]
            assert [each.enabled for each in await found()] == kept, "as a person left them"

    try:
        asyncio.run(switch_on())
        monkeypatch.delenv("DEAL_WEBHOOK_URL")  # from here on the server sends the notices
        announce("promoted", Notice(lineage="blocks", task="a", version="6"))
        announce("rejected", Notice(lineage="blocks", task="a", version="7", reasons=("too low",)), once="x")
        receiver.wait_for(1)
    finally:
        asyncio.run(clear_automations())
    text = receiver.told()[0]["text"]
    assert text.startswith("blocks: version 7 was rejected\nLineage blocks, task a\n- too low\n")


@pytest.mark.nightly
def test_an_automation_that_failed_is_told_of_unless_it_is_one_that_tells(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    tells, told_of = notifications(None)[-1].name, automations(NEVER_BEGAN)[0].name
    monkeypatch.setenv("DEAL_NOTIFICATION_BLOCK", "custom-webhook/watchers")
    monkeypatch.delenv("DEAL_WEBHOOK_URL")

    async def prepare() -> list[str]:
        async with get_client() as server:
            await block_of(receiver).save("watchers")
            await apply_notifications(server)
            await server.resume_automation((await server.read_automations_by_name(tells))[0].id)
            failing = [
                AutomationCore(
                    name=name,
                    trigger=EventTrigger(
                        match={"prefect.resource.id": name},
                        expect={"deal.test"},
                        posture=Posture.Reactive,
                        threshold=1,
                        within=timedelta(0),
                    ),
                    actions=[ChangeFlowRunState(state=StateType.CRASHED)],  # of no run
                )
                for name in (tells, "somebody else's", told_of)
            ]
            return [str(await server.create_automation(each)) for each in failing]

    try:
        ids = asyncio.run(prepare())
        for name, automation_id in zip((tells, "somebody else's", told_of), ids, strict=True):
            event = {
                "event": "deal.test",
                "resource": {"prefect.resource.id": name},
                "occurred": datetime.now(UTC).isoformat(),
                "id": str(uuid.uuid4()),
            }
            with get_client(sync_client=True) as server:
                server.request("POST", "/events", json=[event])
            events_of("prefect.automation.action.failed", f"prefect.automation.{automation_id}", 1)
        receiver.wait_for(1)
    finally:
        asyncio.run(clear_automations())
    assert [each["text"].split("\n")[:2] for each in receiver.told()] == [
        [f"The automation {told_of} failed", "No flow run could be inferred"]
    ]


def test_a_failing_announcement_is_logged_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("DEAL_WEBHOOK_URL", "http://example.org/a-token")
    monkeypatch.setenv("DEAL_WEBHOOK_SECRET", "a-secret")
    announce_failure("blocks", "a", RuntimeError("a text of a row"))
    assert "neither https" in caplog.text and "a-token" not in caplog.text
    (event,) = events_of("deal.adaptation.failed", "deal.lineage.blocks", 1)
    assert event["payload"]["error"] == "RuntimeError: see the run's log"
