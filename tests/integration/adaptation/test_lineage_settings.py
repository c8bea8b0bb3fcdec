"""A lineage's stored settings apply to commands of a person, unless options replace them."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from benchmarks.tiny_base import EXAMPLES, NO_LIMITS
from deal_pipeline.cli.app import app
from deal_pipeline.cli.session import FAILED, STOPPED, WRONG_USE
from flows.adapt import adapt
from infra.lineage_state import read_ended
from infra.store.opening import open_store
from infra.versions import Versions
from tasks.adaptation.resume import read_findings
from tasks.arrivals import end_try
from tasks.spec import AdaptSpec
from tests.in_process import put_back

ROWS = EXAMPLES / "parcels" / "messages.jsonl"
Deal = Callable[..., Any]

pytestmark = pytest.mark.usefixtures("prefect_api", "home", "without_mlflow")


@pytest.fixture
def deal(home: Path) -> Iterator[Deal]:
    """Runs a command in this process and returns its JSON output; the environment is restored."""

    def invoke(*words: str) -> Any:
        result: Result = CliRunner().invoke(app, [*words, "--home", str(home), "--json"])
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    with put_back():
        yield invoke


@pytest.fixture
def support(tiny_base: Path) -> dict[str, Any]:
    """The stored settings of lineage `support`: a person approves, two steps, one task."""
    settings = {
        "tasks": ["parcels"],
        "base_model": str(tiny_base),
        "strategy": "seq_lora",
        "gate": {**NO_LIMITS, "approval": "manual"},
        "train": {"max_steps": 2, "max_prompt_tokens": 192, "checkpoint_steps": 0},
    }
    store_settings(settings)
    return settings


def store_settings(settings: dict[str, Any]) -> None:
    open_store().put_bytes("lineages/support.yaml", yaml.safe_dump(settings).encode())


def land(name: str) -> None:
    open_store().put_bytes(f"inbox/{name}", ROWS.read_bytes())


def spec_of(number: int) -> dict[str, Any]:
    return dict(read_findings(open_store(), Versions(open_store()).all("support")[number - 1].adapter_uri).spec)


@pytest.mark.nightly
def test_a_run_that_a_server_starts_for_a_person_keeps_to_the_lineage_s_file(support: dict[str, Any]) -> None:
    given: Any = {"lineage": "support", "task": {"name": "parcels", "data": str(ROWS)}, "gate": {"confidence": 0.9}}
    assert asyncio.run(adapt(given)).status == "awaiting approval"
    assert spec_of(1)["gate"]["confidence"] == 0.9 and spec_of(1)["train"]["max_steps"] == 2
    complete = AdaptSpec.model_validate({**spec_of(1), "gate": NO_LIMITS})
    assert asyncio.run(adapt(complete)).status == "promoted", "a spec that code has made is complete"


@pytest.mark.parametrize(("num_files", "code"), [(2, STOPPED), (1, FAILED)])
def test_ctrl_c_between_two_files_is_told_by_the_exit_code(
    deal: Deal, support: dict[str, Any], monkeypatch: pytest.MonkeyPatch, num_files: int, code: int
) -> None:
    def end(*given: Any) -> Any:
        result = end_try(*given)
        signal.raise_signal(signal.SIGINT)
        return result

    for number in range(num_files):
        open_store().put_bytes(f"inbox/parcels/{number}.jsonl", b"nonsense\n")
    words = ["adapt", "--watch", "--once", "--poll", "0.1", "-l", "support"]
    with monkeypatch.context() as patch:
        patch.setattr("flows.watch.end_try", end)
        stopped = CliRunner().invoke(app, words)
    assert stopped.exit_code == code, stopped.output
    assert len(read_ended(open_store(), "support")) == 1
    CliRunner().invoke(app, words)
    assert len(read_ended(open_store(), "support")) == num_files


def test_a_plan_and_a_check_of_a_file_keep_to_the_lineage_s_file(
    deal: Deal, support: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text(yaml.safe_dump({"lineage": "support", "task": {"name": "parcels", "data": str(ROWS)}}))
    assert deal("check", str(path), "--plan", "--no-probe")["plan"]["num_steps"] == 2
    few = tmp_path / "few.jsonl"
    few.write_text("".join(ROWS.read_text().splitlines(keepends=True)[:30]))
    checked = ("check", str(few), "--lineage", "support", "--task", "parcels")
    assert deal(*checked)["data"]["num_rejected"] == 0
    store_settings({**support, "data": {"max_text_chars": 100, "max_bad_share": 1.0}})
    assert deal(*checked)["data"]["num_rejected"] > 0


def test_a_lineage_is_held_shown_resumed_and_removed_by_command(
    deal: Deal, support: dict[str, Any], home: Path
) -> None:
    assert deal("lineage", "pause", "support", "--reason", "labels are wrong")["held"] == "labels are wrong"
    (shown,) = deal("lineage", "list")
    assert shown["held"] == "labels are wrong" and shown["tasks"] == ["parcels"]
    land("parcels/a.jsonl")
    assert deal("adapt", "--watch", "--once", "--lineage", "support")["files"] == []
    assert deal("lineage", "resume", "support")["held"] is None
    other_terminal = os.fsdecode("für Mai".encode("latin-1"))
    result = CliRunner().invoke(app, ["lineage", "pause", "support", "--home", str(home), "--reason", other_terminal])
    assert result.exit_code == WRONG_USE and "UTF-8" in result.output
    assert deal("lineage", "show", "support")["held"] is None
    assert deal("lineage", "show", "support")["train"]["max_steps"] == 2
    result = CliRunner().invoke(app, ["lineage", "delete", "support", "--home", str(home)])
    assert result.exit_code == WRONG_USE and "the only lineage with settings" in " ".join(result.output.split())
    open_store().put_bytes("lineages/other.yaml", b"tasks: [bank]")
    deal("lineage", "delete", "support")
    assert not open_store().exists("lineages/support.yaml")
    result = CliRunner().invoke(app, ["lineage", "show", "support", "--home", str(home)])
    assert result.exit_code == WRONG_USE and "There is no" in result.output
