"""What a person asks of a lineage: which of the options, the spec and the lineage's file says the last word."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from pydantic import TypeAdapter
from typer.testing import CliRunner

from deal_core.config import AdapterConfig
from deal_core.errors import ConfigError
from deal_core.judging_config import GateConfig
from deal_pipeline.cli.app import app
from deal_pipeline.cli.session import Session
from flows.adapt import AskedSpec
from infra.lineage_state import read_state
from infra.store.base import ObjectStore
from infra.store.local import FileStore
from tasks.lineage.settings import (
    parse_settings,
    pause_lineage,
    read_lineage,
    read_lineages,
    spec_from_options,
    watched_from_options,
)
from tasks.spec import AdaptSpec, TaskSpec
from tests.stored_versions import store_version

STORED = """\
tasks: [billing, returns]
strategy: replay
adapter: {rank: 8, alpha: 12}
train: {max_steps: 7, learning_rate: 0.1}
gate: {approval: manual}
"""


@pytest.fixture
def store(tmp_path: Path) -> ObjectStore:
    """A store with the file of one lineage, `support`."""
    found = FileStore(tmp_path / "store")
    found.put_bytes("lineages/support.yaml", STORED.encode())
    return found


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def adapt(store: ObjectStore, path: Path | None = None, *settings: str, **given: str | None) -> AdaptSpec:
    return spec_from_options(store, path, settings=settings, **{"task": None, "data": None, "test_data": None, **given})


def test_a_lineage_file_has_what_was_given_and_keeps_a_hold_through_mistakes(
    store: ObjectStore, tmp_path: Path
) -> None:
    text = "lineage: l\ntrain: {learning_rate: 0.0001}\nrehearsal: {rows: 64}\n"
    path = write(tmp_path / "l.yaml", text)

    def add() -> Any:
        found = CliRunner().invoke(app, ["lineage", "apply", str(path), "--home", str(tmp_path)])
        assert found.exit_code == 0, found.output
        return yaml.safe_load(store.get_bytes("lineages/l.yaml"))

    assert add() == yaml.safe_load(text), "later defaults of the other settings reach the lineage"
    pause_lineage(store, "l", "the labels are being corrected")
    store.put_bytes("lineages/l.yaml", store.get_bytes("lineages/l.yaml") + b"no_setting: 1\n")
    with pytest.raises(ConfigError):
        read_lineage(store, "l")
    assert add() == yaml.safe_load(text)
    assert read_state(store, "l").paused == "the labels are being corrected"


def test_options_alone_make_a_spec(store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    spec = adapt(store, None, "strategy=seq_lora", task="t", data="x.csv", lineage="l")
    assert (spec.task.name, spec.task.data) == ("t", str(tmp_path / "x.csv"))
    assert (spec.lineage, spec.strategy, spec.gate) == ("l", "seq_lora", GateConfig())


@pytest.mark.parametrize("given", [{}, {"task": "t"}, {"data": "x.csv"}])
def test_neither_spec_nor_task_and_data_is_wrong_use(store: ObjectStore, given: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="--task NAME and --data FILE"):
        adapt(store, **given)


def test_spec_and_task_together_are_wrong_use(store: ObjectStore, tmp_path: Path) -> None:
    path = write(tmp_path / "s.yaml", "task: {name: t, data: x.csv}\n")
    with pytest.raises(ConfigError, match="either"):
        adapt(store, path, task="u")


def test_what_is_not_said_comes_from_the_lineage_s_file(store: ObjectStore) -> None:
    spec = adapt(store, task="t", data="x.csv", lineage="support")
    watched = watched_from_options(store, None, tasks=None, lineage="support")
    for found in (spec, watched):
        assert (found.lineage, found.strategy) == ("support", "replay")
        assert found.adapter == AdapterConfig(rank=8, alpha=12)
        assert (found.train.max_steps, found.gate.approval) == (7, "manual")
    assert adapt(store, task="t", data="x.csv", lineage="default").gate == GateConfig(), "it has no file"


def test_the_only_lineage_is_meant_where_none_is_named(store: ObjectStore, tmp_path: Path) -> None:
    assert adapt(store, task="t", data="x.csv").lineage == "support"
    assert adapt(FileStore(tmp_path / "empty"), task="t", data="x.csv").lineage == "default"
    store.put_bytes("lineages/desk.yaml", b"strategy: deal\n")
    with pytest.raises(
        ConfigError, match=r"several lineages \(desk, support\); give --lineage NAME, or set DEAL_LINEAGE"
    ):
        adapt(store, task="t", data="x.csv")


def test_without_files_every_lineage_with_a_version_learns_what_lands(tmp_path: Path) -> None:
    store = FileStore(tmp_path / "files")

    def learn() -> list[str]:
        return [spec.lineage for spec in read_lineages(store).good]

    assert learn() == ["default"]
    for lineage in ("demo", "desk"):
        store_version(store, {}, lineage)
    assert learn() == ["demo", "desk"] and read_state(store, "demo").paused is None
    pause_lineage(store, "demo", "holiday")
    assert learn() == ["demo", "desk"], "a pause of one lineage must not stop the others"
    assert [read_state(store, name).paused for name in learn()] == ["holiday", None]
    store.put_bytes("lineages/support.yaml", STORED.encode())
    assert learn() == ["support"]
    with pytest.raises(ConfigError, match=r"There is no .*demo"):
        read_lineage(store, "demo")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["train.num_epochs=1", "train.learning_rate=1e-4"], {"train": {"num_epochs": 1, "learning_rate": 1e-4}}),
        (["task.labels=[a, b]"], {"task": {"labels": ["a", "b"]}}),
        (["base_model=owner/name=x"], {"base_model": "owner/name=x"}),
        (["gate.max_drop_points=null"], {"gate": {"max_drop_points": None}}),
    ],
)
def test_a_setting_is_read_as_yaml(settings: list[str], expected: dict[str, Any]) -> None:
    assert parse_settings(settings) == expected


@pytest.mark.parametrize("setting", ["train", "=1", "train.=1", "train.num_epochs=[1", "deal=1 and more"])
def test_a_text_that_is_no_setting_is_wrong_use(store: ObjectStore, setting: str) -> None:
    with pytest.raises(ConfigError, match=r"--set|deal"):
        adapt(store, None, setting, task="t", data="x.csv")


def test_a_setting_and_a_part_of_it_contradict_each_other() -> None:
    with pytest.raises(ConfigError, match=r"--set gives train both a value and train\.seed"):
        parse_settings(["train=1", "train.seed=2"])


def test_options_win_over_the_spec_and_it_key_by_key_over_the_lineage_s_file(
    store: ObjectStore, tmp_path: Path
) -> None:
    said = {"lineage": "support", "adapter": {"rank": 4}, "train": {"max_steps": 3}, "gate": {"min_gain_points": 1}}
    path = write(tmp_path / "s.yaml", yaml.safe_dump({**said, "task": {"name": "t", "data": "x.csv"}}))
    for found in (
        adapt(store, path, "strategy=deal"),
        watched_from_options(store, path, tasks=None, settings=["strategy=deal"]),
    ):
        assert (found.strategy, found.adapter) == ("deal", AdapterConfig(rank=4, alpha=12))
        assert (found.train.max_steps, found.train.learning_rate) == (3, 0.1)
        assert (found.gate.min_gain_points, found.gate.approval) == (1, "manual")
    automatic = write(tmp_path / "a.yaml", yaml.safe_dump({"lineage": "support", "gate": {"approval": "automatic"}}))
    assert watched_from_options(store, automatic, tasks=None).gate.approval == "automatic"


@pytest.mark.parametrize("lineage", ["support", "other"])
def test_the_lineage_of_the_options_says_whose_file_counts(store: ObjectStore, tmp_path: Path, lineage: str) -> None:
    path = write(tmp_path / "s.yaml", "lineage: support\ntask: {name: t, data: x.csv}\n")
    spec = adapt(store, path, lineage=lineage)
    assert (spec.lineage, spec.gate.approval) == (lineage, "manual" if lineage == "support" else "automatic")


def test_a_watch_looks_at_the_tasks_of_the_options_else_of_the_spec_else_of_the_file(
    store: ObjectStore, tmp_path: Path
) -> None:
    def tasks(text: str | None, given: list[str] | None = None) -> tuple[str, ...]:
        path = write(tmp_path / "s.yaml", text) if text else None
        return watched_from_options(store, path, tasks=given, lineage="support" if path is None else None).tasks

    assert tasks(None) == ("billing", "returns")
    assert tasks("lineage: support\ntasks: [bank]\n") == ("bank",)
    assert tasks("lineage: support\ntasks: []\n") == ()
    assert tasks("lineage: support\ntasks: [bank]\n", ["clinic"]) == ("clinic",)
    assert tasks("lineage: other\n") == ()


def test_a_base_in_the_lineage_s_file_is_never_a_folder_of_the_caller(
    store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    store.put_bytes("lineages/support.yaml", b"base_model: base\n")
    path = write(tmp_path / "s.yaml", "lineage: support\ntask: {name: t, data: x.csv}\n")
    assert adapt(store, path).base_model == "base"
    assert adapt(store, task="t", data="x.csv", lineage="support").base_model == "base"
    assert adapt(store, path, "base_model=base").base_model == str(tmp_path / "base")


@pytest.mark.parametrize(
    ("stored", "said", "expected"),
    [
        ("gat: {approval: manual}", "{}", "support.yaml: unknown key 'gat'"),
        ("lineage: other", "{}", "is about lineage 'other'"),
        ("{}", "strategy: magic", "s.yaml over file:"),
        ("memory: tests", "{}", "support.yaml: 'memory' is no setting any more: set rehearsal.rows, "),
        ("deal: {core: free}", "deal: {energy: 0.5}", "support.yaml: deal.core is free"),
        ("consolidate: {when_spent: true}", "{}", "consolidate.when_spent needs gate.max_total_drop_points"),
        ("{}", "lineage: a/b\nx: 1", "s.yaml: 'lineage' is 'a/b'"),
        ("{}", "lineage: ../b", "s.yaml: 'lineage' is '../b'"),
        ("{}", "lineage: 5", "s.yaml: lineage is 5; give a text"),
    ],
)
def test_what_does_not_fit_is_named_with_its_place(
    store: ObjectStore, tmp_path: Path, stored: str, said: str, expected: str
) -> None:
    store.put_bytes("lineages/support.yaml", stored.encode())
    values: dict[str, Any] = {"lineage": "support", **yaml.safe_load(said)}
    with pytest.raises(ConfigError) as caught:
        watched_from_options(store, write(tmp_path / "s.yaml", yaml.safe_dump(values)), tasks=None)
    assert expected in str(caught.value)


@pytest.fixture
def given_to(store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., SimpleNamespace]:
    """Runs a command up to its flow, and returns what the flow would be given."""
    monkeypatch.setenv("DEAL_STORE_URI", store.uri)
    monkeypatch.setattr("deal_pipeline.server.embedded.enter_home", lambda home, **_: tmp_path)

    def invoke(flow: str, *words: str) -> SimpleNamespace:
        found: list[SimpleNamespace] = []

        def seen(spec: Any, **options: Any) -> None:
            found.append(SimpleNamespace(spec=spec, **options))
            raise ConfigError("seen")

        monkeypatch.setitem(sys.modules, f"flows.{flow}", SimpleNamespace(**{flow: seen}))
        monkeypatch.setattr(Session, "run", lambda self, start, **_: start())
        result = CliRunner().invoke(app, ["adapt", *words])
        assert found, result.output
        return found[0]

    return invoke


def test_deal_adapt_gives_the_flow_what_the_lineage_s_file_says(given_to: Callable[..., SimpleNamespace]) -> None:
    given = given_to("adapt", "--task", "t", "--data", "x.csv", "--lineage", "support", "--set", "strategy=deal")
    assert (given.spec.gate.approval, given.spec.train.max_steps, given.spec.strategy) == ("manual", 7, "deal")
    assert given.again is False
    assert given_to("adapt", "--task", "t", "--data", "x.csv", "--force").again is True


def test_deal_watch_gives_the_flow_what_the_lineage_s_file_says(
    given_to: Callable[..., SimpleNamespace], tmp_path: Path
) -> None:
    given = given_to("watch", "--watch", "--lineage", "support")
    assert (given.spec.gate.approval, given.spec.train.max_steps) == ("manual", 7)
    assert given.spec.tasks == ("billing", "returns")
    assert given_to("watch", "--watch", "--lineage", "support", "--task", "bank").spec.tasks == ("bank",)
    path = write(tmp_path / "support.yaml", "lineage: support\n" + STORED.replace("manual", "automatic"))
    given = given_to("watch", str(path), "--watch", "--once")
    assert (given.spec.tasks, given.spec.gate.approval) == (("billing", "returns"), "automatic")
    assert (given.once, given.poll_seconds) == (True, 2.0)
    given = given_to("watch", "--watch", "--poll", "5")
    assert (given.once, given.poll_seconds) == (False, 5.0)


def test_a_run_on_a_server_is_given_what_the_lineage_s_file_says(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEAL_STORE_URI", store.uri)
    checked: TypeAdapter[AdaptSpec] = TypeAdapter(AskedSpec)
    task = {"name": "t", "data": "x.csv"}
    spec = checked.validate_python({"lineage": "support", "task": task, "gate": {"min_gain_points": 1}})
    assert (spec.gate.min_gain_points, spec.gate.approval, spec.train.max_steps) == (1, "manual", 7)
    complete = AdaptSpec(lineage="support", task=TaskSpec(name="t", data="x.csv"))
    assert checked.validate_python(complete) is complete, "one that code has made says everything"
    store.put_bytes("lineages/support.yaml", b"gat: {}\n")
    with pytest.raises(ValueError, match="unknown key 'gat'"):
        checked.validate_python({"lineage": "support", "task": task})
