"""A version on live traffic, on the tiny base and over HTTP: a worse one is rejected, a better one promoted."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks.speed.serving import Expected, answers_of, served, texts_to_ask
from flows.champions import rollouts
from infra.predictions import read_feedback, read_predictions
from infra.promotions import PromotionLog
from infra.store.opening import open_store
from infra.versions import Versions
from tasks.monitoring.rollout import RolloutLook, look_at_rollout
from tests.adapting import BANK, CLINIC, PASS, run
from tests.waiting import wait_for

WAIT_SECONDS = 300.0
NUM_ROWS = 12
TEXTS = texts_to_ask()[:12]
TRAIN = {
    "max_steps": 4,
    "learning_rate": 0.02,
    "max_prompt_tokens": 192,
    "max_answer_tokens": 12,
    "checkpoint_steps": 0,
}
ID = re.compile(rb'"id": ?"[0-9a-f]{32}"')


@pytest.fixture(scope="module")
def first(serving_home: Path, tiny_base: Path) -> Iterator[Path]:
    """A home with a prediction log, whose lineage `l` has one version."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DEAL_LOG_PREDICTIONS", "numbers")
        assert learn(tiny_base, BANK, "canary") == ("promoted", "1"), "there is no champion to compare with"
        yield serving_home


def learn(base: Path, task: dict[str, Any], kind: str, **train: Any) -> tuple[str, str]:
    gate = {**PASS, "rollout": kind, "rollout_rows": NUM_ROWS, "rollout_share": 0.5 if kind == "canary" else 1.0}
    found = run(base, task, again=True, gate=gate, train={**TRAIN, **train})
    return found.status, found.version


def moves() -> list[tuple[str, str, str | None, str]]:
    return [(move.action, move.version, move.champion, move.who) for move in PromotionLog(open_store()).moves("l")]


def tried(url: str) -> str | None:
    found: dict[str, Any] = httpx.get(f"{url}/version", timeout=WAIT_SECONDS).json()
    return found.get("rollout", {}).get("version")


def ask_as(url: str, user: int, text: str) -> dict[str, Any]:
    """Ask one text; the answer, checked to name its version everywhere."""
    body = {"dataframe_records": [{"input": text, "task": "bank"}]}
    answer = httpx.post(f"{url}/invocations", json=body, headers={"X-Deal-Key": f"user {user}"}, timeout=300)
    (row,) = answer.raise_for_status().json()["predictions"]
    assert answer.headers["X-Deal-Version"] == row["version"]
    return dict(row)


def ask_and_judge(url: str, expected: Expected, right: str) -> dict[int, str]:
    """Ask until both versions have enough feedback: an answer is right if version `right` would give it.

    Returns:
        The version that answered each user.
    """
    answered: dict[int, str] = {}
    candidate = tried(url)
    counts = {"1": 0, candidate: 0}
    ids: set[str] = set()
    user = 0
    while min(counts.values()) < NUM_ROWS:
        place = user % len(TEXTS)
        row = ask_as(url, user, TEXTS[place])
        assert row["output"] == expected[row["version"]][place]
        is_right = row["output"] == expected[right][place]
        said = [{"id": row["id"], "is_right": is_right}]
        httpx.post(f"{url}/feedback", json=said, timeout=WAIT_SECONDS).raise_for_status()
        counts[row["version"]] += 1
        answered[user] = row["version"]
        ids.add(row["id"])
        user += 1
    wait_for(lambda: all(ids <= set(read(open_store(), "l")["id"]) for read in (read_feedback, read_predictions)))
    return answered


def look() -> RolloutLook:
    (found,) = asyncio.run(rollouts())
    return found


@pytest.mark.nightly
def test_a_version_is_tried_on_live_traffic(first: Path, tiny_base: Path) -> None:
    """One test, as its steps share a server, whose start takes long."""
    with served("l") as (url, process):
        assert tried(url) is None
        expected = check_a_worse_canary_is_rejected_by_itself(url, tiny_base)
        check_a_better_canary_is_promoted(url, tiny_base, expected)
        check_a_shadow_changes_no_answer_and_the_log_has_both(url, tiny_base)
        process.terminate()
        assert process.wait(WAIT_SECONDS) == 0


def check_a_worse_canary_is_rejected_by_itself(url: str, base: Path) -> Expected:
    """Version 2 of the lineage; returns what it and version 1 answer."""
    assert learn(base, CLINIC, "canary") == ("rollout", "2")
    wait_for(lambda: tried(url) == "2")
    expected = answers_of(["1", "2"], TEXTS, "bank", "l")
    answered = ask_and_judge(url, expected, right="1")
    assert {ask_as(url, user, TEXTS[0])["version"] for user, version in answered.items() if version == "2"} == {"2"}
    found = look()
    assert found.decision is not None and found.decision.action == "rejected", found
    assert moves()[-2:] == [("rollout", "2", "1", "gate"), ("rejected", "2", "1", "rollout")]
    assert "rollout" not in [alias for each in Versions(open_store()).all("l") for alias in each.aliases]
    wait_for(lambda: tried(url) is None)
    assert {ask_as(url, user, TEXTS[0])["version"] for user in answered} == {"1"}
    assert asyncio.run(rollouts()) == []
    return expected


def check_a_better_canary_is_promoted(url: str, base: Path, before: Expected) -> None:
    assert learn(base, BANK, "canary", seed=1) == ("rollout", "3")
    wait_for(lambda: tried(url) == "3")
    ask_and_judge(url, {**before, **answers_of(["3"], TEXTS, "bank", "l")}, right="3")
    found = look()
    assert found.decision is not None and found.decision.action == "promoted", found
    assert moves()[-2:] == [("rollout", "3", "1", "gate"), ("promoted", "3", "3", "rollout")]
    wait_for(lambda: httpx.get(f"{url}/version", timeout=WAIT_SECONDS).json()["version"] == "3")
    wait_for(lambda: tried(url) is None)  # the server follows the champion first, then the rollout
    assert ask_as(url, 0, TEXTS[0])["version"] == "3"


def check_a_shadow_changes_no_answer_and_the_log_has_both(url: str, base: Path) -> None:
    champion = Versions(open_store()).champion("l")
    assert champion is not None
    body = {"dataframe_records": [{"input": text} for text in TEXTS]}  # the task that the champion learned last

    def answers() -> bytes:
        return ID.sub(b"", httpx.post(f"{url}/invocations", json=body, timeout=300).raise_for_status().content)

    before = answers()
    status, version = learn(base, CLINIC, "shadow", seed=2)
    assert status == "rollout"
    wait_for(lambda: tried(url) == version)
    assert answers() == before

    def logged() -> Any:
        return read_predictions(open_store(), "l", version=version, of_rollout=True)

    wait_for(lambda: len(logged()) == len(TEXTS))
    everything = read_predictions(open_store(), "l")
    twins = everything.set_index("id").loc[logged()["shadow_of"]]
    assert set(twins["version"]) == {champion.version} and [*twins["input_sha256"]] == [*logged()["input_sha256"]]
    assert version not in set(everything["version"]), "no other reader sees what was not returned"
    found = look_at_rollout(open_store(), "l").report
    assert found is not None and found.num_pairs == len(TEXTS) and found.candidate.num_failed == 0
    assert found.agreement is None or 0 <= found.agreement < 1
