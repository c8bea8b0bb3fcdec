"""deal check --plan on a tiny base model, and the flow's refusal of a training that does not fit."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from transformers import LlamaConfig
from typer.testing import CliRunner, Result

from benchmarks.tiny_base import EXAMPLES
from deal_core.config import AdapterConfig, TrainConfig
from deal_core.errors import ConfigError
from deal_core.method_config import MethodConfig
from deal_pipeline.cli.app import app
from tasks.base import refuse_what_cannot_fit
from tests.in_process import put_back

BANK = EXAMPLES / "bank"
Plan = Callable[..., Result]


@pytest.fixture
def plan(tmp_path: Path, tiny_base: Path) -> Iterator[Plan]:
    """Runs deal check --plan on the bank example with the tiny base model."""

    def invoke(
        *options: str, base: Path = tiny_base, parts: dict[str, object] | None = None, **train: object
    ) -> Result:
        spec = yaml.safe_load((BANK / "spec.yaml").read_text())
        spec["base_model"] = str(base)
        spec["task"] |= {"data": str(BANK / "train.jsonl"), "test_data": str(BANK / "test.jsonl")}
        spec["train"] |= train
        spec |= parts or {}
        file = tmp_path / "spec.yaml"
        file.write_text(yaml.safe_dump(spec))
        return CliRunner().invoke(app, ["check", str(file), "--plan", "--home", str(tmp_path / "home"), *options])

    with put_back():
        yield invoke


def test_a_plan_counts_rows_and_steps_and_times_one(plan: Plan, tmp_path: Path) -> None:
    found = json.loads(plan("--json", max_steps=None, num_epochs=2).stdout)["plan"]
    assert (found["num_train"], found["num_test"]) == (72, 36)
    assert found["num_steps"] == 2 * 72 // 8
    assert found["verdict"] == "fits" and found["lengths_from"] == "rows"
    assert found["longest_row_tokens"] < 192 + 12
    assert found["total_bytes"] == sum(found["memory"].values())
    assert found["expected_seconds"] == pytest.approx(found["seconds_per_step"] * found["num_steps"])
    left = [path for path in (tmp_path / "home").rglob("*") if path.is_file() and path.parent.name != "logs"]
    assert not left, "a plan stores nothing"


def test_what_does_not_fit_is_refused_with_what_to_change(plan: Plan) -> None:
    whole = json.loads(plan("--json", "--no-probe", batch_size=32).stdout)["plan"]
    less = f"cpu {0.8 * whole['total_bytes'] / 2**20}MiB"
    refused = plan("--json", "--device", less, batch_size=32)
    found = json.loads(refused.stdout)["plan"]
    assert refused.exit_code == 1 and found["verdict"] == "refused"
    batch = next(each for each in found["remedies"] if each["change"].startswith("train.batch_size"))
    assert batch["fits"] and found["seconds_per_step"] is None
    smaller = int(batch["change"].split()[1])
    tried = json.loads(plan("--json", "--device", less, "--no-probe", batch_size=smaller).stdout)["plan"]
    assert tried["verdict"] != "refused" and tried["total_bytes"] == batch["total_bytes"]
    shown = plan("--device", "cpu 50kB", batch_size=32)
    assert shown.exit_code == 1
    assert "cannot fit" in shown.stdout and "No setting makes it fit" in shown.stdout


def test_a_plan_for_other_devices_has_their_memory_and_precision(plan: Plan) -> None:
    card, old_card = (json.loads(plan("--json", "--device", name).stdout)["plan"] for name in ("1x A100 80GB", "T4"))
    assert (card["device"], card["device_bytes"], card["precision"]) == ("A100 80GB", 80 * 10**9, "bf16")
    assert (old_card["device_bytes"], old_card["precision"]) == (16 * 10**9, "fp32")
    assert old_card["memory"]["weights"] == 2 * card["memory"]["weights"]
    assert card["seconds_per_step"] is None and any("no step was timed" in note for note in card["notes"])
    several = json.loads(plan("--json", "--device", "4x L4", num_processes=2).stdout)["plan"]
    assert any(note.startswith("2 of 4 devices") for note in several["notes"])
    fewer = plan("--json", "--device", "L4", num_processes=2)
    assert fewer.exit_code == 2 and json.loads(fewer.stderr.splitlines()[-1])["code"] == "device"


def config_only(folder: Path, **sizes: int) -> Path:
    config = LlamaConfig(**{"num_hidden_layers": 2, "vocab_size": 1000, "architectures": ["LlamaForCausalLM"], **sizes})
    config.save_pretrained(folder)
    return folder


def test_without_weights_the_limits_are_planned_for(plan: Plan, tmp_path: Path) -> None:
    base = config_only(tmp_path / "model", hidden_size=32, intermediate_size=64)
    found = json.loads(plan("--json", base=base).stdout)["plan"]
    assert (found["lengths_from"], found["longest_row_tokens"]) == ("limits", 192 + 12)
    assert found["expected_seconds"] is None and "weights are not on this machine" in found["notes"][0]


def test_a_run_is_refused_only_where_it_certainly_cannot_fit(tmp_path: Path, tiny_base: Path) -> None:
    def check(base: Path) -> None:
        refuse_what_cannot_fit(
            str(base), AdapterConfig(), "deal", MethodConfig(), TrainConfig(batch_size=10**6), num_versions=0
        )

    check(tiny_base)  # with any batch
    check(tmp_path / "nowhere")  # loading reports it
    huge = config_only(tmp_path / "huge", hidden_size=2**17, intermediate_size=2**22)
    with pytest.raises(ConfigError, match=r"weights .* adapter and optimiser take .* GiB"):
        check(huge)


def test_a_plan_counts_both_answers_of_preferences(plan: Plan, tmp_path: Path) -> None:
    file = tmp_path / "tone.jsonl"
    rows = [{"prompt": f"Message {number}.", "chosen": "Yes.", "rejected": "No, no."} for number in range(40)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = json.loads(plan("--json", batch_size=4, parts={"task": {"name": "tone", "data": str(file)}}).stdout)["plan"]
    assert found["batch_rows"] == 8 and found["rows_per_step"] == 4
    assert any("the parent's answers are the reference: a model reads" in note for note in found["notes"])
