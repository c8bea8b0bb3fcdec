"""The spec: what it accepts, what it says of mistakes, and which settings make another run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from deal_core.config import AdapterConfig
from deal_core.errors import ConfigError
from deal_core.judging_config import RolloutTerms
from tasks.lineage.choices import changed_settings, settings_of
from tasks.spec import AdaptSpec, LineageSpec, TaskSpec, parse, read_spec

EXAMPLES = Path(__file__).parents[3] / "examples"


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*/spec.yaml")), ids=lambda path: path.parent.name)
def test_example_specs_are_read_and_name_files_that_exist(path: Path) -> None:
    spec = read_spec(path)
    assert Path(spec.task.data).is_file()
    assert spec.task.test_data is None or Path(spec.task.test_data).is_file()


def test_spec_survives_json(tmp_path: Path) -> None:
    spec = read_spec(
        write(tmp_path / "s.yaml", "task: {name: t, data: x.csv, labels: [a, b]}\nadapter: {target_modules: [q, v]}\n")
    )
    assert AdaptSpec.model_validate_json(spec.model_dump_json()) == spec


def test_relative_paths_start_at_the_spec_and_uris_stay(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    text = "base_model: base\ntask: {name: t, data: a/x.csv, test_data: 's3://bucket/test.csv'}\n"
    spec = read_spec(write(tmp_path / "s.yaml", text))
    assert spec.task.data == str(tmp_path / "a" / "x.csv")
    assert spec.task.test_data == "s3://bucket/test.csv"
    assert spec.base_model == str(tmp_path / "base")


def test_a_base_that_is_no_path_stays_a_name(tmp_path: Path) -> None:
    spec = read_spec(write(tmp_path / "s.yaml", "base_model: org/model\ntask: {name: t, data: x.csv}\n"))
    assert spec.base_model == "org/model"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "train: {learning_rat: 1}\ntask: {name: t, data: x}",
            "unknown key 'train.learning_rat'; remove it, or give one of learning",
        ),
        (
            "lineages: x\ntask: {name: t, data: x}",
            "unknown key 'lineages'; remove it, or give one of schema_version, lineage",
        ),
        (
            "task: {name: t, data: x, lables: [a]}",
            "unknown key 'task.lables'; remove it, or give one of format, labels",
        ),
        ("instruction: x\ntask: {name: t, data: x}", "unknown key 'instruction'; write it as 'task.instruction'"),
        ("num_epochs: 2\ntask: {name: t, data: x}", "unknown key 'num_epochs'; write it as 'train.num_epochs'"),
        ("task: {name: t}", "key 'task.data' is missing"),
        ("task: {name: ../t, data: x}", "'task.name' is '../t'"),
        ("lineage: a/b\ntask: {name: t, data: x}", "'lineage' is 'a/b'"),
        ("schema_version: 2\ntask: {name: t, data: x}", "schema_version is 2; give 1"),
        ("strategy: magic\ntask: {name: t, data: x}", "strategy is 'magic'; give deal, seq_lora"),
        ("adapter: {rank: 1}\ntask: {name: t, data: x}", "adapter.rank is 1; give at least 2"),
        (
            "strategy: deal\nstrategy_options: {w: 1}\ntask: {name: t, data: x}",
            "'deal' has no option 'w'; it takes none",
        ),
        ("- a list", "holds list, not a mapping"),
        ("a: b: c", "is not valid YAML"),
    ],
)
def test_a_mistake_is_named_with_its_place(tmp_path: Path, text: str, expected: str) -> None:
    path = write(tmp_path / "s.yaml", text)
    with pytest.raises(ConfigError) as caught:
        read_spec(path)
    assert expected in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("gate", "judge", "reject"),
        ("gate", "max_judged_rows", 100),
        ("train", "report_to", "[tensorboard]"),
        ("train", "min_steps", 0),
        ("train", "group_by_length", "true"),
        ("evaluate", "max_batch_tokens", 4096),
        ("train", "recentre_steps", 50),
        ("deal", "kernel", "spline"),
        ("monitor", "alpha", 0.1),
    ],
)
def test_a_setting_that_is_gone_is_refused_with_what_to_do(tmp_path: Path, part: str, name: str, value: object) -> None:
    path = write(tmp_path / "s.yaml", f"{part}: {{{name}: {value}}}\ntask: {{name: t, data: x}}\n")
    with pytest.raises(ConfigError, match=rf"s\.yaml: unknown key '{part}\.{name}'; remove it, or give one of \w+"):
        read_spec(path)


REHEARSAL = "set rehearsal.rows, the training rows that are kept of each task (0 keeps none), and rehearsal.per_step"


def test_a_memory_is_refused_with_the_settings_in_its_place(tmp_path: Path) -> None:
    """One sentence, also where a lineage's file has the setting."""
    path = write(tmp_path / "s.yaml", "memory: tests\ntask: {name: t, data: x}\n")
    with pytest.raises(ConfigError) as caught:
        read_spec(path)
    assert str(caught.value) == f"{path}: 'memory' is no setting any more: {REHEARSAL}"
    with pytest.raises(ConfigError, match=re.escape(f"l.yaml: 'memory' is no setting any more: {REHEARSAL}")):
        parse(LineageSpec, {"memory": "tests"}, "l.yaml")
    path.write_text("rehearsal: {texts: both}\ntask: {name: t, data: x}\n")
    with pytest.raises(ConfigError, match=r"unknown key 'rehearsal\.texts'; remove it, or give one of rows, per_step"):
        read_spec(path)


def test_old_tasks_are_rehearsed_by_two_settings() -> None:
    schema = AdaptSpec.model_json_schema()
    settings = schema["$defs"]["RehearsalConfig"]["properties"]
    assert {name: setting["default"] for name, setting in settings.items()} == {"rows": 50, "per_step": 4}


def test_every_mistake_is_named_at_once(tmp_path: Path) -> None:
    path = write(tmp_path / "s.yaml", "lineage: a/b\nx: 1\ntask: {name: t, data: x}\n")
    with pytest.raises(ConfigError, match=r"lineage.*unknown key 'x'"):
        read_spec(path)


def test_a_missing_spec_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no file"):
        read_spec(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    "change",
    [
        "train: {max_steps: 3}",
        "deal: {energy: 0.9}",
        "gate: {max_drop_points: 1}",
        "train: {max_answer_tokens: 3}",
        "train: {warmup_share: 0.1}",
        "rehearsal: {rows: 0}",
        "rehearsal: {per_step: 2}",
        "data: {test_share: 0.3}",
        "task: {name: t, data: x, prompt: chat}",
        "train: {quantize: 4bit}",
        "strategy_options: {weight: 3}",
    ],
)
def test_every_setting_makes_another_run(change: str) -> None:
    adapter = AdapterConfig()
    plain = {"task": {"name": "t", "data": "x"}}
    before = parse(AdaptSpec, plain, "a").config_sha256(adapter, "deal")
    after = parse(AdaptSpec, {**plain, **yaml.safe_load(change)}, "b").config_sha256(adapter, "deal")
    assert before != after


def test_adapter_strategy_and_instruction_make_another_run() -> None:
    plain = parse(AdaptSpec, {"task": {"name": "t", "data": "x"}}, "a")
    told = parse(AdaptSpec, {"task": {"name": "t", "data": "x", "instruction": "Which?"}}, "b")
    digests = {
        plain.config_sha256(AdapterConfig(), "deal"),
        plain.config_sha256(AdapterConfig(rank=8), "deal"),
        plain.config_sha256(AdapterConfig(rslora=True), "deal"),
        plain.config_sha256(AdapterConfig(), "seq_lora"),
        told.config_sha256(AdapterConfig(), "deal"),
    }
    assert len(digests) == 5


def test_what_reports_may_show_is_no_setting_of_the_run() -> None:
    plain = {"task": {"name": "t", "data": "x"}}
    shown, hidden = (
        parse(AdaptSpec, {**plain, "data": {"include_texts": value, "test_share": 0.3}}, "a") for value in (True, False)
    )
    assert shown.config_sha256(AdapterConfig(), "deal") == hidden.config_sha256(AdapterConfig(), "deal")
    assert hidden.config_sha256(AdapterConfig(), "deal") != parse(AdaptSpec, plain, "b").config_sha256(
        AdapterConfig(), "deal"
    )


def test_selection_is_a_setting_of_the_run() -> None:
    plain = {"task": {"name": "t", "data": "x"}}
    off, named, kept = (
        parse(AdaptSpec, {**plain, "selection": change}, "a") for change in ({}, {"noise": "name"}, {"keep": 0.5})
    )
    assert len({spec.config_sha256(AdapterConfig(), "deal") for spec in (off, named, kept)}) == 3
    assert settings_of(kept, AdapterConfig(), "deal")["selection"]["keep"] == 0.5
    assert kept.method.selection.keep == 0.5
    with pytest.raises(ConfigError, match=r"selection.score is 'unknown'; give random, "):
        parse(AdaptSpec, {**plain, "selection": {"keep": 0.5, "score": "unknown"}}, "a")


@pytest.mark.parametrize(
    "how",
    [{"num_processes": 2}, {"attention": "eager"}, {"padding_free": True}, {"torch_compile": True}],
    ids=lambda how: next(iter(how)),
)
def test_how_a_step_is_computed_is_no_setting_of_the_run(how: dict[str, Any]) -> None:
    adapter, plain = AdapterConfig(), {"task": {"name": "t", "data": "x"}}
    usual, other = (parse(AdaptSpec, {**plain, "train": train}, "a") for train in ({}, how))
    assert usual.config_sha256(adapter, "deal") == other.config_sha256(adapter, "deal")
    assert changed_settings(other, usual.model_dump(mode="json"), "1") == ()


def test_how_a_version_is_tried_is_no_setting_of_the_run() -> None:
    adapter, plain = AdapterConfig(), {"task": {"name": "t", "data": "x"}}
    tried = parse(AdaptSpec, {**plain, "gate": {"rollout": "canary", "rollout_share": 0.2, "rollout_rows": 9}}, "a")
    assert tried.config_sha256(adapter, "deal") == parse(AdaptSpec, plain, "b").config_sha256(adapter, "deal")
    assert tried.gate.rollout_terms == RolloutTerms("canary", 0.2, 9, 10.0, 0.95)
    shadow = parse(AdaptSpec, {**plain, "gate": {"rollout": "shadow"}}, "a").gate.rollout_terms
    assert shadow is not None and shadow.share == 1.0
    with pytest.raises(ConfigError, match="rollout_share is 1"):
        parse(AdaptSpec, {**plain, "gate": {"rollout": "canary", "rollout_share": 1}}, "a")


def test_where_the_file_lies_is_no_setting() -> None:
    adapter = AdapterConfig()
    here = parse(AdaptSpec, {"task": {"name": "t", "data": "here.csv"}}, "a")
    there = parse(AdaptSpec, {"task": {"name": "t", "data": "s3://there/x.csv"}}, "b")
    assert here.config_sha256(adapter, "deal") == there.config_sha256(adapter, "deal")


def test_what_is_retained_changes_no_run() -> None:
    adapter, task = AdapterConfig(), {"name": "t", "data": "x"}
    plain = parse(AdaptSpec, {"task": task}, "a")
    retained = parse(AdaptSpec, {"task": task, "data": {"retain_training_rows": True}}, "b")
    assert plain.config_sha256(adapter, "deal") == retained.config_sha256(adapter, "deal")


def test_given_tells_only_what_was_said() -> None:
    assert TaskSpec(name="t", data="x", labels=("a", "b")).given() == {"labels": ("a", "b")}


def test_lineage_spec_has_no_task() -> None:
    with pytest.raises(ConfigError, match="unknown key 'task'"):
        parse(LineageSpec, {"task": {"name": "t", "data": "x"}}, "a")


def test_labels_are_a_list_or_a_mapping_from_the_files_cells(tmp_path: Path) -> None:
    text = "task: {name: t, data: x.csv, labels: {'0': bad, '1': good, n/a: good}}"
    task = read_spec(write(tmp_path / "s.yaml", text)).task
    assert task.given() == {"labels": {"0": "bad", "1": "good", "n/a": "good"}}
    assert TaskSpec(**task.model_dump()) == task, "as a flow's parameter"


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ("{'0': 1}", "task.labels.0 is 1; give a text"),
        ("[a, 1]", "task.labels.1 is 1; give a text"),
        ("7", "task.labels is 7; give a list"),
    ],
)
def test_wrong_labels_are_named_once(labels: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        read_spec(write(tmp_path / "s.yaml", f"task: {{name: t, data: x.csv, labels: {labels}}}"))
    assert message in str(error.value) and ";" not in str(error.value).replace("; give a", "")


def test_the_turns_that_are_learned_are_part_of_the_digest() -> None:
    def digest(**task: Any) -> str:
        values = {"task": {"name": "t", "data": "x.csv", "labels": ["a"], **task}}
        return parse(AdaptSpec, values, "spec").config_sha256(AdapterConfig(), "deal")

    assert len({digest(), digest(assistant_turns="last"), digest(assistant_turns="all")}) == 3


def test_the_container_of_an_azure_address_is_no_user() -> None:
    plain = {"lineage": "l", "task": {"name": "t", "data": "abfs://rows@account.dfs.core.windows.net/may.csv"}}
    assert parse(AdaptSpec, plain, "a").task.data.startswith("abfs://rows@")
    for address in ("abfs://me:key@account/may.csv", "s3://me@bucket/may.csv", "abfs://rows@account/may.csv?sig=abc"):
        with pytest.raises(ConfigError, match="contains a user, password or token"):
            parse(AdaptSpec, {**plain, "task": {"name": "t", "data": address}}, "a")
