"""Suites: a folder of tasks, which test rows settings may be chosen on, and which cells share what."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.continual.cell import Cell, make_cell
from benchmarks.continual.suites import SUITES, SuiteTask, digest_of, load_suite, name_of, order_of, tasks_folder
from deal_core.config import AdapterConfig, TrainConfig
from deal_core.data.schema import TaskSchema
from deal_core.errors import ConfigError, DataValidationError
from deal_core.method_config import DealConfig, MethodConfig, RehearsalConfig
from deal_core.strategies import OWN

ROWS = [{"text": f"text {i}", "label": "ab"[i % 2]} for i in range(10)]


@pytest.fixture
def json_lines(tmp_path: Path) -> Path:
    folder = tmp_path / "lines"
    folder.mkdir()
    described = {"agnews": {"instruction": "What is it?", "labels": ["a", "b"]}}
    (folder / "tasks.json").write_text(json.dumps(described))
    for part in ("train", "test"):
        (folder / f"agnews.{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return folder


def test_json_lines_are_read_in_order(json_lines):
    task = load_suite(json_lines, ("agnews",))["agnews"]
    assert task.train == tuple({"input": row["text"], "output": row["label"]} for row in ROWS)
    assert (task.schema.labels, task.schema.instruction) == (("a", "b"), "What is it?")


def test_the_question_of_a_long_paragraph_comes_first_and_other_rows_stay(json_lines):
    asked = "question: Why?\ncandidate answer: A question: no."
    rows = [f"paragraph: Long.\nIs it? question: yes.\n{asked}", "sentence 1: paragraph: no question"]
    for part in ("train", "test"):
        lines = "".join(json.dumps({"text": text, "label": "a"}) + "\n" for text in rows)
        (json_lines / f"agnews.{part}.jsonl").write_text(lines)
    task = load_suite(json_lines, ("agnews",))["agnews"]
    for read in (task.train, task.test):
        assert [row["input"] for row in read] == [f"{asked}\nparagraph: Long.\nIs it? question: yes.", rows[1]]


def test_rows_of_prompt_and_completion_are_a_task_of_generation(json_lines):
    """It is scored by ROUGE-L against every reference, and has rows of its own to choose settings on."""
    rows = [{"prompt": f"text {i}", "completion": "a cat", "references": ["a cat", "one cat"]} for i in range(6)]
    described = json.loads((json_lines / "tasks.json").read_text())
    described["summary"] = {"instruction": "Sum up.", "labels": None}
    (json_lines / "tasks.json").write_text(json.dumps(described))
    for part in ("train", "dev", "test"):
        (json_lines / f"summary.{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[: len(part)]))
    task = load_suite(json_lines, ("summary",))["summary"]
    assert (task.schema.format, task.schema.metric, task.schema.labels) == ("completion", "rouge_l", ())
    assert [len(task.part(part)) for part in ("dev", "reported")] == [3, 4] and len(task.train) == 5
    assert task.test[0] == {"input": "text 0", "output": "a cat", "references": ["a cat", "one cat"]}


def test_a_line_separator_inside_a_text_is_no_new_row(json_lines):
    row = json.dumps({"text": "one\u2028two\x85three", "label": "a"}, ensure_ascii=False)
    (json_lines / "agnews.test.jsonl").write_text(row + "\n", encoding="utf-8")
    assert [row["input"] for row in load_suite(json_lines, ("agnews",))["agnews"].test] == ["one\u2028two\x85three"]


@pytest.mark.parametrize(("suffix", "reference"), [("", "main"), ("@v2", "v2")])
def test_tasks_of_a_dataset_of_the_hub_are_those_of_its_files(json_lines, offline_hub, suffix, reference):
    repository, revision = offline_hub / "datasets--somebody--tasks", "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(json_lines, repository / "snapshots" / revision)
    (repository / "refs").mkdir()
    (repository / "refs" / reference).write_text(revision)
    folder = tasks_folder("hf://datasets/somebody/tasks" + suffix)
    assert load_suite(folder, ("agnews",)) == load_suite(tasks_folder(str(json_lines)), ("agnews",))


def test_a_dataset_that_cannot_be_fetched_gives_one_clear_error(offline_hub):
    with pytest.raises(ConfigError, match="The dataset 'somebody/else' could not be fetched from the Hub") as caught:
        tasks_folder("hf://datasets/somebody/else")
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="give hf://datasets/OWNER/NAME"):
        tasks_folder("hf://somebody/else")


GOOD = json.dumps(ROWS[0]).encode()
NO_TASK = r"tasks\.json does not say what task 'agnews' asks; give it an 'instruction', a text, and 'labels', a list of"


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("agnews.train.jsonl", GOOD + b'\n\n{"text": \n', r"line 3\) of .*train\.jsonl cannot be read \(.*; correct"),
        ("agnews.train.jsonl", b'\n{"text": "x"}\n', r"line 2\) of .*train\.jsonl lacks 'text' or 'label'; give"),
        ("agnews.test.jsonl", GOOD + b'\n["x", "a"]\n', r"line 2\) of .*test\.jsonl cannot be read \(not an object"),
        (
            "agnews.test.jsonl",
            GOOD + b'\n{"text": "x", "label": "a", "references": ["\xff"]}\n',
            r"line 2\) of .*test\.jsonl is not UTF-8",
        ),
        ("tasks.json", b'{\n"agnews": {"labels": ["a"]\n', r"tasks\.json cannot be read as JSON \(.*line 3"),
        ("tasks.json", b'{"agnews": {"instruction": "What is it?"}}', NO_TASK),
        ("tasks.json", b'{"agnews": {"instruction": "What is it?", "labels": "ab"}}', NO_TASK),
        ("agnews.test.jsonl", b'{"text": "x", "label": "c"}\n', r"the labels c, which .*tasks\.json does not list"),
        ("agnews.train.jsonl", b"\n\n", r"agnews\.train\.jsonl holds no rows; give it at least one"),
    ],
)
def test_a_broken_file_of_json_lines_is_named_with_its_line(file, content, message, json_lines):
    (json_lines / file).write_bytes(content)
    with pytest.raises(DataValidationError, match=message):
        load_suite(json_lines, ("agnews",))


def test_a_folder_without_tasks_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="holds no tasks"):
        load_suite(tmp_path / "nowhere", ("agnews",))


@pytest.mark.parametrize(("num_rows", "num_dev"), [(500, 200), (7600, 200), (277, 110), (56, 22)])
def test_no_row_is_both_chosen_on_and_reported(num_rows, num_dev):
    rows = tuple({"input": str(i), "output": "a"} for i in range(num_rows))
    task = SuiteTask(schema=TaskSchema(name="t", labels=("a", "b")), train=(), test=rows)
    assert task.part("dev") == rows[:num_dev] and task.part("reported") == rows[num_dev:]
    assert task.part("reported", 5) == rows[num_dev : num_dev + 5]


@pytest.mark.parametrize(("num_rows", "part"), [(2, "dev"), (0, "dev"), (0, "reported")])
def test_a_part_without_rows_is_refused_by_task_and_part(num_rows, part):
    row = {"input": "x", "output": "a"}
    task = SuiteTask(schema=TaskSchema(name="t", labels=("a", "b")), train=(), test=(row,) * num_rows)
    message = f"Task 't' has no row in part '{part}', having {num_rows} test rows; give it 3 or more"
    with pytest.raises(DataValidationError, match=message):
        task.part(part)
    enough = SuiteTask(schema=task.schema, train=(), test=(row,) * 3)
    assert enough.part("dev") and enough.part("reported")


def test_the_digest_follows_the_rows_and_not_the_order_of_tasks(json_lines):
    tasks = load_suite(json_lines, ("agnews",))
    task = tasks["agnews"]
    two = {"a": task, "b": task}
    assert digest_of(two) == digest_of(dict(reversed(two.items())))
    changed = SuiteTask(schema=task.schema, train=task.train, test=task.test[:-1])
    assert digest_of({"agnews": changed}) != digest_of(tasks)


def test_the_digest_of_what_was_read_stays_since_stored_cells_are_named_by_it(json_lines):
    digest = digest_of(load_suite(json_lines, ("agnews",)))
    assert digest == "311ad866987286851f98f0b7d2a519a14ac258705424360871fc10a7da30c653"


def test_orders_of_a_suite_hold_the_same_tasks():
    for suite, orders in SUITES.items():
        assert len({frozenset(tasks) for tasks in orders.values()}) == 1
        for order, tasks in orders.items():
            assert name_of(tasks) == (suite, order) and order_of(suite, order) == tasks
        assert name_of(tuple(sorted(tasks)))[0] == suite
    assert name_of(tuple(sorted(SUITES["15"]["1"]))) == ("15", "any")
    assert name_of(("x", "y")) == ("own", "x, y")
    with pytest.raises(ConfigError, match="Suite '5' is not known"):
        order_of("5", "1")
    with pytest.raises(ConfigError, match="Suite 4 has no order '9'"):
        order_of("4", "9")


def cell(strategy: str = "deal", tasks: tuple[str, ...] = ("c", "a", "b"), **changes: object) -> Cell:
    given = {
        "method": MethodConfig(),
        "seed": 1,
        "rows": 10,
        "part": "dev",
        "max_test_rows": None,
        "scored": "all",
        "adapter": AdapterConfig(),
        "train": TrainConfig(),
        "base": "b",
        "data": "d",
        **changes,
    }
    return make_cell(strategy, tasks, **given)


def test_a_cell_is_decided_by_what_its_strategy_reads():
    other = MethodConfig(deal=DealConfig(core="frozen"), rehearsal=RehearsalConfig(rows=7))
    assert cell().digest() != cell(method=other).digest() != cell(method=replace(other, deal=DealConfig())).digest()
    assert cell("replay", method=replace(other, deal=DealConfig())) == cell("replay", method=other) != cell("replay")
    assert cell("seq_lora", method=other) == cell("seq_lora") and cell("seq_lora").method == {}
    assert cell("replay", method=other).method["rehearsal.rows"] == 7
    with pytest.raises(ConfigError, match="Strategy 'seq_lora' has no option 'weight'; it takes none"):
        cell("seq_lora", method=MethodConfig(strategy_options={"weight": 7.0}))


def test_a_bound_has_no_order_and_no_settings():
    one, other = cell("joint"), cell("joint", ("b", "c", "a"), method=MethodConfig(deal=DealConfig(core="frozen")))
    assert one == other and one.tasks == ("a", "b", "c") and one.method == {}
    assert cell("base", seed=1) == cell("base", seed=2) and cell("joint", seed=1) != cell("joint", seed=2)
    with pytest.raises(ConfigError, match="strategy is 'dael'; give deal, "):
        cell("dael")


def test_what_is_scored_after_each_task():
    assert [cell(scored="all").scored_after(t) for t in range(3)] == [("c", "a"), ("c", "a", "b"), ("c", "a", "b")]
    assert [cell(scored="ends").scored_after(t) for t in range(3)] == [("c",), ("a",), ("c", "a", "b")]
    assert [cell(scored="last").scored_after(t) for t in range(3)] == [(), (), ("c", "a", "b")]


def test_a_first_task_is_shared_where_it_is_plain_lora_and_keeps_nothing_else():
    shared, none = cell("seq_lora").shared_digest(), RehearsalConfig(rows=0)
    assert shared is not None
    assert cell(method=MethodConfig(rehearsal=none)).shared_digest() == shared
    assert cell(method=MethodConfig(rehearsal=none, deal=DealConfig(energy=0.5))).shared_digest() == shared
    assert cell("seq_lora", tasks=("c", "a", "x")).shared_digest() == shared
    for changes in ({"scored": "ends"}, {"seed": 2}, {"tasks": ("c", "x", "a")}):  # it scores the second task too
        assert cell("seq_lora", **changes).shared_digest() not in (shared, None)
    for rows in (1, 50):
        assert cell(method=MethodConfig(rehearsal=RehearsalConfig(rows=rows))).shared_digest() is None
    for strategy in set(OWN) - {"seq_lora"} | {"joint", "per_task"}:
        assert cell(strategy).shared_digest() is None
