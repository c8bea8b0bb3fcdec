"""`deal init` writes a spec that `deal check` takes as it is, and whose remarks can be used."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft202012Validator
from typer.testing import CliRunner, Result

from deal_pipeline.cli.app import app
from tests.in_process import put_back

Deal = Callable[..., Result]


@pytest.fixture
def deal(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Deal]:
    """Runs a command in a folder with rows of a bank, whose labels YAML would not read as they are."""
    monkeypatch.chdir(tmp_path)
    rows = [{"text": f"message {number}", "label": ("yes", "no, thanks", "1.5")[number % 3]} for number in range(60)]
    (tmp_path / "Bank mails.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with put_back():
        yield lambda *words: CliRunner().invoke(app, list(words))


def test_the_spec_is_checked_as_it_is_and_no_file_is_replaced(deal: Deal) -> None:
    made = deal("init", "Bank mails.jsonl")
    assert made.exit_code == 0 and "deal check spec.yaml --plan" in made.stdout, made.output
    spec = yaml.safe_load(Path("spec.yaml").read_text())
    assert spec == {"lineage": "default", "task": {"name": "bank-mails", "data": "Bank mails.jsonl"}}
    checked = json.loads(deal("check", "spec.yaml", "--json").stdout)["data"]
    assert (checked["accepted"], checked["num_read"]) == (True, 60)
    again = deal("init", "Bank mails.jsonl")
    assert again.exit_code == 2 and "spec.yaml is there already" in again.stderr


def test_an_editor_finds_the_schema_and_takes_the_spec(deal: Deal) -> None:
    deal("init", "Bank mails.jsonl", "--set", "train.num_epochs=1")
    text = Path("spec.yaml").read_text()
    schema = json.loads(Path(text.splitlines()[0].removeprefix("# yaml-language-server: $schema=")).read_text())
    validator = Draft202012Validator(schema)
    spec = yaml.safe_load(text)
    assert validator.is_valid(spec)
    assert not validator.is_valid(spec | {"train": {"num_epoch": 1}}), "no such setting"
    assert not validator.is_valid(spec | {"gate": {"confidence": 95}}), "outside its limits"


def test_its_remark_about_labels_can_be_used(deal: Deal) -> None:
    deal("init", "Bank mails.jsonl")
    (line,) = re.findall(r"#   (labels: .*)", Path("spec.yaml").read_text())
    assert sorted(yaml.safe_load(line)["labels"]) == ["1.5", "no, thanks", "yes"]


def test_it_takes_a_lineage_and_settings(deal: Deal, home: Path) -> None:
    for name in ("support", "desk"):
        path = home / "store" / "lineages" / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("strategy: deal\n")
    assert "give --lineage NAME" in deal("init", "Bank mails.jsonl").stderr
    words = ("--lineage", "desk", "--set", "train.num_epochs=1", "--set", "task.instruction=Answer.", "--task", "bank")
    made = deal("init", "Bank mails.jsonl", *words, "--out", "new.yaml")
    assert made.exit_code == 0, made.output
    spec = yaml.safe_load(Path("new.yaml").read_text())
    assert spec == {
        "lineage": "desk",
        "train": {"num_epochs": 1},
        "task": {"name": "bank", "data": "Bank mails.jsonl", "instruction": "Answer."},
    }


def test_rows_that_cannot_be_learned_get_no_spec(deal: Deal) -> None:
    Path("bad.csv").write_text("text,label\n,a\nfine,b\n")
    refused = deal("init", "bad.csv", "--json")
    assert refused.exit_code == 1 and json.loads(refused.stdout)["spec"] is None
    assert not Path("spec.yaml").exists()
