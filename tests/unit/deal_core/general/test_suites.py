"""The suites that ship with the project: their rows, and how a model is asked."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

from benchmarks.general_suites import GENERATED, content
from deal_core.base_model.load import load_base
from deal_core.config import SUITES, EvaluateConfig
from deal_core.errors import ConfigError
from deal_core.evaluation.generation import Confidence, GivenAnswer
from deal_core.general import suites
from deal_core.general.checks import passes
from deal_core.general.suites import MAX_NEW_TOKENS, ROWS_FOLDER, VERSIONS, Suite, read_rows

CONSTANTS = ("", "yes", "0", "1", "{}", "[]", "null", "card lost", "The answer is not known.")
"""Answers of a model that has collapsed."""


def scores(name: str, answers: list[str]) -> list[bool]:
    return [passes(answer, row["checks"]) for answer, row in zip(answers, read_rows(name), strict=True)]


def examples(name: str) -> list[str]:
    return [row["answer"] for row in read_rows(name)]


@pytest.mark.parametrize("name", MAX_NEW_TOKENS)
def test_every_row_can_be_passed_and_no_constant_answer_passes_many(name: str) -> None:
    rows = read_rows(name)
    assert 50 <= len(rows) <= 100
    assert len({row["prompt"] for row in rows}) == len(rows)
    assert all(scores(name, examples(name)))
    for answer in (*CONSTANTS, *examples(name)[:3] * (name != "refusal")):
        assert sum(scores(name, [answer] * len(rows))) <= 0.05 * len(rows), answer
    first, *others = examples(name)
    if name != "refusal":
        assert sum(scores(name, [*others, first])) <= 0.15 * len(rows), "the examples of other rows"


@pytest.mark.parametrize("name", GENERATED)
def test_the_files_are_what_the_templates_give(name: str) -> None:
    assert (ROWS_FOLDER / f"{name}.jsonl").read_text(encoding="utf-8") == content(name)


SCORED = {
    "arithmetic": "1643b1ee0349",
    "instructions": "a69ce6eeee9b",
    "json": "0fbf99719e75",
    "refusal": "cf32dde79ccf",
    "tools": "64087f3abc48",
}
"""Digest of what each suite asks, and of how its rows score the examples of all suites, in the versions of today."""


@pytest.mark.parametrize("name", SCORED)
def test_a_suite_that_scores_otherwise_has_another_version(name: str) -> None:
    """If this fails, raise the suite's number in VERSIONS, and write the new digest here."""
    rows = read_rows(name)
    answers = [*CONSTANTS, *(example for other in SUITES for example in examples(other)[::3])]
    of_answers = [tuple(map(float, scores(name, [answer] * len(rows)))) for answer in answers]
    of_all = repr((VERSIONS[name], tuple(row["prompt"] for row in rows), MAX_NEW_TOKENS[name], of_answers))
    assert hashlib.sha256(of_all.encode()).hexdigest()[:12] == SCORED[name]


@pytest.fixture
def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each suite has its first three rows alone."""
    suites._load.cache_clear()
    monkeypatch.setattr(suites, "read_rows", lambda name: read_rows(name)[:3])
    yield
    suites._load.cache_clear()


@pytest.mark.usefixtures("few_rows")
def test_a_model_is_asked_by_its_chat_template_or_without_one(tiny_base: Path, tmp_path: Path) -> None:
    base, suite, seen = load_base(str(tiny_base), tmp_path), Suite("arithmetic"), []
    assert {*suite.score(base.model, base.tokenizer, on_progress=seen.append)} <= {0.0, 1.0}
    assert sum(seen) == len(suite) == 3 and suite.identity == f"arithmetic {VERSIONS['arithmetic']}"
    assert suite.served_task(base.tokenizer).schema.uses_chat_template
    base.tokenizer.chat_template = None
    task = suite.served_task(base.tokenizer)
    assert not task.schema.uses_chat_template and task.schema.template == "{text}\nAnswer:"


@pytest.mark.usefixtures("few_rows")
def test_an_engine_answers_in_the_models_place(tiny_base: Path, tmp_path: Path) -> None:
    base = load_base(str(tiny_base), tmp_path)
    right, wrong, _ = examples("tools")[:3]

    def answer(task: Any, inputs: Any, on_progress: Any) -> list[GivenAnswer]:
        assert (task.max_new_tokens, list(inputs)) == (96, [row["prompt"] for row in read_rows("tools")[:3]])
        return [GivenAnswer(text, Confidence(1.0, None), False) for text in (right, right, "no")]

    assert right != wrong and Suite("tools").score(base.model, base.tokenizer, answer) == (1.0, 0.0, 0.0)


@pytest.mark.parametrize("name", ["maths", "lm_eval:", "json,tools", "json"])
def test_a_suite_that_is_unknown_or_named_twice_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="twice" if name == "json" else r"give arithmetic, .*, tools or lm_eval:NAME"):
        EvaluateConfig(general=("json", name))


@pytest.mark.parametrize("name", ["json", "lm_eval:missing-task"])
def test_without_the_harness_no_suite_can_be_asked(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    suites._load.cache_clear()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError) as error:
        Suite(name)
    assert error.value.code == "harness-missing"
    suites._load.cache_clear()


@pytest.mark.nightly
def test_a_task_that_the_harness_lacks_is_refused() -> None:
    with pytest.raises(ConfigError) as error:
        Suite("lm_eval:missing-task")
    assert error.value.code == "harness-task"
