"""Suites of general ability in a lineage: who is asked, what the gate says, and what is shown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel

from deal_core.base_model.sources import DEFAULT_BASE
from deal_core.evaluation.report import EvaluationReport
from deal_core.general.suites import Suite, read_rows
from infra.general_scores import SuiteScores, keep_scores, read_scores
from infra.settings import TrackingSettings
from infra.store.keys import adapter_scores_key, base_scores_key
from infra.store.opening import open_store
from infra.tracking.client import open_client
from tests.adapting import BANK, CLINIC, PASS, evaluation_of, page_of, run, version_of
from tests.integration.conftest import NO_MLFLOW

ROWS = len(read_rows("json"))


class Abilities:
    """Answers suites in the models' place: the base model and the adapters in their order, by share of right rows."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.of_base: dict[str, float] = {}
        self.of_adapters: dict[str, float] = {}

    def score(self, suite: Suite, model: Any, *_: Any, **__: Any) -> tuple[float, ...]:
        is_adapted = isinstance(model, PeftModel)
        self.asked.append(f"{'adapter' if is_adapted else 'base'}: {suite.name}")
        share = (self.of_adapters if is_adapted else self.of_base)[suite.name]
        right = round(share * len(suite))
        return (1.0,) * right + (0.0,) * (len(suite) - right)

    def take(self) -> list[str]:
        asked, self.asked = self.asked, []
        return asked


@pytest.fixture
def abilities(monkeypatch: pytest.MonkeyPatch) -> Abilities:
    found = Abilities()
    monkeypatch.setattr(Suite, "score", lambda suite, *args, **more: found.score(suite, *args, **more))
    return found


def test_suites_are_asked_once_judged_and_shown(
    prefect_api: None, home: Path, tiny_base: Path, abilities: Abilities, monkeypatch: pytest.MonkeyPatch
) -> None:
    del prefect_api
    store, suites = open_store(), {"evaluate": {"general": ["json", "tools"]}}
    abilities.of_base = {"json": 0.8, "tools": 0.15}
    abilities.of_adapters = {"json": 0.75}

    first = run(tiny_base, BANK, **suites)
    assert abilities.take() == ["base: json", "base: tools", "adapter: json"], "tools is off"
    version = version_of(first)
    assert version.general == {"json": 0.75}
    report = EvaluationReport.from_json(evaluation_of(first))
    assert (sum(report.general["json"].base), sum(report.general["json"].now)) == (0.8 * ROWS, 0.75 * ROWS)
    assert report.general["json"].parent is None
    assert any("tools is off, since the base model scores 15.0 %" in note for note in report.notes)
    page = page_of(first)[1]
    assert "General ability" in page and ">75.0<" in page and ", ".join(map(str, range(46, 49))) in page
    client = open_client(TrackingSettings())
    (logged,) = client.search_runs([client.get_experiment_by_name("deal/l").experiment_id])
    assert logged.data.metrics["general/json"] == 0.75
    monkeypatch.setenv("MLFLOW_TRACKING_URI", NO_MLFLOW)
    kept = read_scores(store, adapter_scores_key(version.adapter_uri), version.adapter_sha256)
    assert kept.keys() == {"this project, quantize none, stops 2"}

    # the scores of another answerer neither displace these nor count for this one
    none, sha256 = (0.0,) * ROWS, version.base_sha256
    keep_scores(store, base_scores_key(sha256), sha256, "vllm 0.32.0", {Suite("json").identity: none})

    # a small loss passes, a large one does not; base model and champion are not asked again
    abilities.of_adapters = {"json": 0.5}
    second = run(tiny_base, CLINIC, **suites)
    assert abilities.take() == ["adapter: json"]
    assert second.rejected and [reason.partition(",")[0] for reason in second.reasons] == [
        "General ability: json fell by 30.0 points against the base model",
        "General ability: json fell by 25.0 points against the champion",
    ]
    checks = version_of(second).failed_checks
    assert [(check["kind"], check["task"], check["limit"]) for check in checks] == [
        ("general_ability", "json", 10.0)
    ] * 2

    # scores of another adapter than the champion's are not used
    damaged = SuiteScores(model_sha256="0" * 64, answered_by=kept)
    store.put_bytes(adapter_scores_key(version.adapter_uri), damaged.model_dump_json().encode())
    again = {"general": ["json", "tools"], "min_general_accuracy": 0.0}
    abilities.of_adapters["tools"] = 0.1
    run(tiny_base, BANK, gate={**PASS, "max_general_drop_points": None}, evaluate=again, again=True)
    assert abilities.take() == ["adapter: json", "adapter: tools"] * 2, "the champion, then the version"
    assert store.exists(base_scores_key(version.base_sha256))


@pytest.mark.parametrize(
    "base", ["tiny", pytest.param(DEFAULT_BASE, marks=[pytest.mark.base_model, pytest.mark.nightly(minutes=4)])]
)
@pytest.mark.usefixtures("prefect_api", "without_mlflow")
def test_the_gate_judges_what_the_harness_measures_without_a_network(tiny_base: Path, base: str) -> None:
    evaluate = {"general": ["refusal"], "min_general_accuracy": 0.0}
    result = run(
        tiny_base if base == "tiny" else base, BANK, gate={**PASS, "max_general_drop_points": 0.0}, evaluate=evaluate
    )
    report = EvaluationReport.from_json(evaluation_of(result))
    rows = len(read_rows("refusal"))
    assert [len(scores) for scores in (report.general["refusal"].base, report.general["refusal"].now)] == [rows, rows]
    assert version_of(result).general == {"refusal": sum(report.general["refusal"].now) / rows}
