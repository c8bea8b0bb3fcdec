"""From shifted traffic to the promoted version: `deal server up`, with `deal serve` in front of the clients."""

from __future__ import annotations

import asyncio
import csv
import io
import json
import random
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import pyarrow.parquet as pq
import pytest
import tenacity
import yaml
from prefect.client.orchestration import PrefectClient

from benchmarks.speed.real_engine import running_engine
from benchmarks.speed.serving import served
from benchmarks.tiny_base import NO_LIMITS, build_tiny_base
from infra.report.run_report import EVALUATION_FILE
from infra.store.keys import state_key
from tasks.lineage.reports import read_report
from tasks.notices import EVENTS
from tests.e2e.whole import BUCKET, DONE, WAIT_SECONDS, Whole, wait_until_learned
from tests.real_engine import needs_engine

LINEAGE, TASK = "support", "colours"
OLD_ROWS = f"{TASK}.old-1"
LABELS = {"red": "warm", "blue": "cold", "amber": "warm", "teal": "cold"}
THINGS = ("card", "loan", "account", "transfer", "fee", "bill")
PLACES = ("at the bank", "in the shop", "on the phone", "at the clinic", "with the parcel", "by post")
NUM_ASKED = 150
ROWS_A_REQUEST = 50
SETTINGS: dict[str, Any] = {
    "lineage": LINEAGE,
    "tasks": [TASK],
    "gate": {**NO_LIMITS, "min_gain_over_champion_points": 10.0, "max_old_slice_drop_points": 20.0},
    "train": {
        "max_steps": 60,
        "learning_rate": 0.03,
        "max_prompt_tokens": 64,
        "max_answer_tokens": 6,
        "checkpoint_steps": 0,
    },
}

pytestmark = [pytest.mark.e2e, pytest.mark.nightly(minutes=4)]


def usual(num_rows: int, month: str) -> dict[str, str]:
    """Short texts, drawn at random, with their right labels."""
    draw = random.Random(month)
    found = {}
    for number in draw.sample(range(1000, 10000), num_rows):
        colour = draw.choice(("red", "blue"))
        found[f"{colour} {draw.choice(THINGS)} {draw.choice(PLACES)} number {number}"] = LABELS[colour]
    return found


def shifted(num_rows: int) -> dict[str, str]:
    """Long texts about two new colours, and one usual text to three of them."""
    new = {
        f"Since the move last week I am waiting with my family for an answer about the {colour} "
        f"{THINGS[number % 6]} {PLACES[number // 6 % 6]}, please help, number {number}": LABELS[colour]
        for number in range(num_rows * 3 // 4)
        for colour in [("amber", "teal")[number % 2]]
    }
    return {**new, **usual(num_rows - len(new), "june")}


def test_shifted_traffic_becomes_a_promoted_version(whole: Whole, tiny_base: Path, tmp_path: Path) -> None:
    close_the_loop(whole, tiny_base, tmp_path, {})


@needs_engine
def test_on_an_engine_too_and_a_canary_decides(whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = sys.modules[__name__]  # the servers are those of the test before, so lineage and task are others
    for name, value in {"LINEAGE": "engine", "TASK": "hues", "OLD_ROWS": "hues.old-1"}.items():
        monkeypatch.setattr(here, name, value)
    base, folder = tmp_path / "base", tmp_path / "engine"
    folder.mkdir()
    build_tiny_base(base, width=128)  # vLLM demands heads of such a width
    canary = {"rollout": "canary", "rollout_share": 0.5, "rollout_rows": 20}
    with running_engine(base, folder) as engine:
        close_the_loop(whole, base, tmp_path, {"DEAL_ENGINE_URL": engine.url}, **canary)


def close_the_loop(whole: Whole, base: Path, tmp_path: Path, environment: dict[str, str], **gate: Any) -> None:
    """From shifted traffic, drift and labels to the next champion; `gate` may let it be a canary first."""
    file = whole.home / "support.yaml"
    names = {"lineage": LINEAGE, "tasks": [TASK]}
    settings = {**SETTINGS, **names, "base_model": str(base), "gate": {**SETTINGS["gate"], **gate}}
    file.write_text(yaml.safe_dump(settings))
    whole.deal("lineage", "apply", str(file))
    learn(whole, "january.jsonl", rows(usual(400, "january")), 1)
    with served(LINEAGE, {**whole.environment, **environment, "DEAL_LOG_PREDICTIONS": "texts"}) as (url, _):
        assert {each["version"] for each in ask(url, usual(NUM_ASKED, "february"))} == {"1"}
        wait_until_logged(whole, NUM_ASKED)
        asyncio.run(look(whole))
        assert live(whole) == ("1", []), "usual traffic is no drift"

        june = shifted(NUM_ASKED)
        before = num_right(ask(url, june), june)
        wait_until_logged(whole, 2 * NUM_ASKED)
        asyncio.run(wait_for_drift(whole))
        assert "drift" in live(whole)[1]
        assert f"{TASK}: drift since" in whole.deal("status")

        chosen = tmp_path / "to-label.csv"
        whole.deal("feedback", "sample", TASK, "--lineage", LINEAGE, "--number", "100", "--out", str(chosen))
        labelled = fill_in(chosen, {**usual(NUM_ASKED, "february"), **june})
        assert len(labelled) == 100 and Counter(row["is_random"] for row in labelled) == {"true": 25, "false": 75}
        whole.deal("task", "renew-tests", TASK, "--lineage", LINEAGE)
        learn(whole, "june.csv", chosen.read_bytes(), 2)

        if gate:
            let_the_canary_answer(whole, url, june)
        check_the_gate_judged_old_and_renewed_rows(whole)
        wait_for_version(url, "2")
        answers = ask(url, june)
        assert {each["version"] for each in answers} == {"2"}
        assert num_right(answers, june) > before
    asyncio.run(look(whole))
    assert live(whole)[0] == "2", "the next look is at the new version's own traffic"


def let_the_canary_answer(whole: Whole, url: str, texts: dict[str, str]) -> None:
    """Ask until champion and canary have answers with feedback, and let the deployment look at them."""
    for attempt in tenacity.Retrying(wait=tenacity.wait_fixed(0.5), stop=tenacity.stop_after_delay(WAIT_SECONDS)):
        with attempt:
            assert httpx.get(f"{url}/version", timeout=60).json()["rollout"]["version"] == "2"
    versions = set()
    for text, label in texts.items():  # one request each: a request's rows go to one version
        (answer,) = ask(url, {text: label})
        versions.add(answer["version"])
        said = [{"id": answer["id"], "label": label}]
        httpx.post(f"{url}/feedback", json=said, timeout=WAIT_SECONDS).raise_for_status()
    assert versions == {"1", "2"}
    wait_until_logged(whole, 2 * NUM_ASKED + len(texts))
    asyncio.run(look(whole, "rollouts/rollout"))


def rows(texts: dict[str, str]) -> bytes:
    return "".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in texts.items()).encode()


def learn(whole: Whole, name: str, body: bytes, num_versions: int) -> None:
    """Land a file and wait until the lineage has so many versions."""

    async def landing() -> None:
        waiting = asyncio.create_task(wait_until_learned(whole, {LINEAGE: num_versions}, whole.events(DONE)))
        await asyncio.sleep(0)  # the stream is open before anything lands
        whole.put(f"inbox/{TASK}/{name}", body)
        await waiting

    asyncio.run(landing())


def ask(url: str, texts: dict[str, str]) -> list[dict[str, Any]]:
    """Let the server answer all texts."""
    inputs, found = list(texts), []
    for start in range(0, len(inputs), ROWS_A_REQUEST):
        records = [{"input": text, "task": TASK} for text in inputs[start : start + ROWS_A_REQUEST]]
        answer = httpx.post(f"{url}/invocations", json={"dataframe_records": records}, timeout=WAIT_SECONDS)
        assert answer.status_code == 200, answer.text
        found += answer.json()["predictions"]
    return found


def num_right(answers: list[dict[str, Any]], texts: dict[str, str]) -> int:
    return sum(each["output"] == label for each, label in zip(answers, texts.values(), strict=True))


async def look(whole: Whole, deployment_name: str = "monitor-lineages/monitor-lineage") -> None:
    """Run the deployment that looks at live traffic, or at rollouts, to its end."""
    async with PrefectClient(f"{whole.prefect_url}/api") as client, asyncio.timeout(WAIT_SECONDS):
        deployment = await client.read_deployment_by_name(deployment_name)
        run = await client.create_flow_run_from_deployment(deployment.id)
        while run.state is None or not run.state.is_final():
            await asyncio.sleep(0.5)
            run = await client.read_flow_run(run.id)
        if run.state.is_cancelled():  # its schedule has just started one, and the deployment runs once at a time
            await look(whole, deployment_name)
            return
        assert run.state.is_completed(), run.state


async def wait_for_drift(whole: Whole) -> None:
    """Look until the server has the event."""

    async def first_event() -> dict[str, Any]:
        async for event in whole.events(EVENTS["drift"]):
            if event.event == EVENTS["drift"]:
                return dict(event.payload)
        raise AssertionError("the server ended the stream")

    waiting = asyncio.create_task(first_event())
    await asyncio.sleep(0)  # the stream is open before the look
    await look(whole)
    payload = await asyncio.wait_for(waiting, WAIT_SECONDS)
    assert (payload["lineage"], payload["task"], payload["version"]) == (LINEAGE, TASK, "1")
    assert any("length of inputs" in reason for reason in payload["reasons"]), payload["reasons"]


def live(whole: Whole) -> tuple[str, list[str]]:
    """The version that was looked at last, and the kinds of its open alarms."""
    found = whole.read(state_key(LINEAGE))["monitor"]
    return found["version"], [alarm["kind"] for alarm in found["alarms"]]


def fill_in(path: Path, texts: dict[str, str]) -> list[dict[str, str]]:
    """Do what a person does with the file: write the right label into the empty column."""
    with path.open(encoding="utf-8-sig", newline="") as stream:
        found = [{**row, "label": texts[row["text"]]} for row in csv.DictReader(stream)]
    with path.open("w", encoding="utf-8-sig", newline="") as stream:
        writer = csv.DictWriter(stream, [*found[0]])
        writer.writeheader()
        writer.writerows(found)
    return found


def check_the_gate_judged_old_and_renewed_rows(whole: Whole) -> None:
    first, second = whole.versions(LINEAGE)
    assert "champion" in second.aliases and second.parent_version == first.version
    evaluation = read_report(whole.store(), second, EVALUATION_FILE)
    assert evaluation["slices"] == {OLD_ROWS: TASK}
    new, old = (
        {name: evaluation[side][name] for name in (TASK, OLD_ROWS)} for side in ("accuracies", "parent_accuracies")
    )
    assert new[TASK] > old[TASK], (new, old)  # a base model may guess the new colours: how much is gained differs
    assert 100 * (old[OLD_ROWS] - new[OLD_ROWS]) <= SETTINGS["gate"]["max_old_slice_drop_points"], (new, old)


def wait_until_logged(whole: Whole, num_rows: int) -> None:
    """Wait until the prediction log has so many rows."""
    for attempt in tenacity.Retrying(wait=tenacity.wait_fixed(0.5), stop=tenacity.stop_after_delay(WAIT_SECONDS)):
        with attempt:
            listed = whole.s3.list_objects_v2(Bucket=BUCKET, Prefix=f"team/predictions/{LINEAGE}/")
            batches = [
                whole.s3.get_object(Bucket=BUCKET, Key=each["Key"])["Body"].read() for each in listed["Contents"]
            ]
            assert sum(pq.read_metadata(io.BytesIO(batch)).num_rows for batch in batches) == num_rows


def wait_for_version(url: str, version: str) -> None:
    for attempt in tenacity.Retrying(wait=tenacity.wait_fixed(0.5), stop=tenacity.stop_after_delay(WAIT_SECONDS)):
        with attempt:
            assert httpx.get(f"{url}/version").json()["version"] == version
