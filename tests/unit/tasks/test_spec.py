"""The spec: what it accepts, what it says of mistakes, and which settings make another run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

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


def test_a_setting_that_was_replaced_is_refused_with_those_in_its_place() -> None:
    """One sentence, in a spec and in a lineage's file."""
    for kind, values in ((AdaptSpec, {"task": {"name": "t", "data": "x"}}), (LineageSpec, {})):
        with pytest.raises(ConfigError, match=r"^l\.yaml: 'memory' is no setting any more: set rehearsal\.rows, "):
            parse(kind, {**values, "memory": "tests"}, "l.yaml")


def test_every_mistake_is_named_at_once(tmp_path: Path) -> None:
    path = write(tmp_path / "s.yaml", "lineage: a/b\nx: 1\ntask: {name: t, data: x}\n")
    with pytest.raises(ConfigError, match=r"lineage.*unknown key 'x'"):
        read_spec(path)


PLAIN: dict[str, Any] = {"task": {"name": "t", "data": "x"}}


def run_of(change: dict[str, Any], strategy: str = "deal", **adapter: Any) -> str:
    """The digest of the settings by which a run is known."""
    return parse(AdaptSpec, {**PLAIN, **change}, "a").config_sha256(AdapterConfig(**adapter), strategy)


@pytest.mark.parametrize(
    "change",
    [
        {"train": {"max_steps": 3}},
        {"train": {"max_answer_tokens": 3}},
        {"train": {"warmup_share": 0.1}},
        {"train": {"quantize": "4bit"}},
        {"deal": {"energy": 0.9}},
        {"gate": {"max_drop_points": 1}},
        {"rehearsal": {"rows": 0}},
        {"rehearsal": {"per_step": 2}},
        {"data": {"test_share": 0.3}},
        {"selection": {"noise": "name"}},
        {"selection": {"keep": 0.5}},
        {"strategy_options": {"weight": 3}},
        {"task": {**PLAIN["task"], "prompt": "chat"}},
        {"task": {**PLAIN["task"], "instruction": "Which?"}},
        {"task": {**PLAIN["task"], "assistant_turns": "last"}},
        {"task": {**PLAIN["task"], "assistant_turns": "all"}},
    ],
    ids=str,
)
def test_what_changes_the_result_makes_another_run(change: dict[str, Any]) -> None:
    assert run_of(change) != run_of({})


def test_adapter_and_strategy_make_another_run() -> None:
    others = [
        run_of({}, rank=8),
        run_of({}, rslora=True),
        run_of({}, strategy="seq_lora"),
    ]
    assert len({run_of({}), *others}) == 4


@pytest.mark.parametrize(
    "change",
    [
        {"task": {"name": "t", "data": "s3://there/x.csv"}},
        {"data": {"include_texts": True}},
        {"data": {"retain_training_rows": True}},
        {"gate": {"rollout": "canary", "rollout_share": 0.2, "rollout_rows": 9}},
        {"train": {"num_processes": 2}},
        {"train": {"attention": "eager"}},
        {"train": {"padding_free": True}},
        {"train": {"torch_compile": True}},
    ],
    ids=str,
)
def test_what_changes_no_result_makes_no_other_run(change: dict[str, Any]) -> None:
    assert run_of(change) == run_of({})
    if "train" in change:
        before, after = (parse(AdaptSpec, {**PLAIN, **given}, "a") for given in ({}, change))
        assert changed_settings(after, before.model_dump(mode="json"), "1") == (), "nor is it noted"


def test_a_rollout_has_its_terms() -> None:
    canary = parse(AdaptSpec, {**PLAIN, "gate": {"rollout": "canary", "rollout_share": 0.2, "rollout_rows": 9}}, "a")
    assert canary.gate.rollout_terms == RolloutTerms("canary", 0.2, 9, 10.0, 0.95)
    shadow = parse(AdaptSpec, {**PLAIN, "gate": {"rollout": "shadow"}}, "a").gate.rollout_terms
    assert shadow is not None and shadow.share == 1.0
    with pytest.raises(ConfigError, match="rollout_share is 1"):
        parse(AdaptSpec, {**PLAIN, "gate": {"rollout": "canary", "rollout_share": 1}}, "a")


def test_a_selection_is_logged_and_its_score_must_be_one() -> None:
    kept = parse(AdaptSpec, {**PLAIN, "selection": {"keep": 0.5}}, "a")
    assert settings_of(kept, AdapterConfig(), "deal")["selection"]["keep"] == kept.method.selection.keep == 0.5
    with pytest.raises(ConfigError, match=r"selection.score is 'unknown'; give random, "):
        parse(AdaptSpec, {**PLAIN, "selection": {"keep": 0.5, "score": "unknown"}}, "a")


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


def test_the_container_of_an_azure_address_is_no_user() -> None:
    plain = {"lineage": "l", "task": {"name": "t", "data": "abfs://rows@account.dfs.core.windows.net/may.csv"}}
    assert parse(AdaptSpec, plain, "a").task.data.startswith("abfs://rows@")
    for address in ("abfs://me:key@account/may.csv", "s3://me@bucket/may.csv", "abfs://rows@account/may.csv?sig=abc"):
        with pytest.raises(ConfigError, match="contains a user, password or token"):
            parse(AdaptSpec, {**plain, "task": {"name": "t", "data": address}}, "a")
