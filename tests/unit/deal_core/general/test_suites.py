"""The suites that ship with the project: their rows, and how a model is asked."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.general_suites import GENERATED, content
from deal_core.base_model.load import load_base
from deal_core.config import SUITES, EvaluateConfig
from deal_core.errors import ConfigError
from deal_core.evaluation.generation import Confidence, GivenAnswer
from deal_core.general.suites import MAX_NEW_TOKENS, ROWS_FOLDER, VERSIONS, read_suite, suite_of

CONSTANTS = ("", "yes", "0", "1", "{}", "[]", "null", "card lost", "The answer is not known.")
"""Answers of a model that has collapsed."""


@pytest.mark.parametrize("name", SUITES)
def test_every_row_can_be_passed_and_no_constant_answer_passes_many(name: str) -> None:
    suite = read_suite(name)
    assert 50 <= len(suite) <= 100
    assert len({*suite.prompts}) == len(suite)
    assert set(suite.scores_of(suite.examples)) == {1.0}
    for answer in (*CONSTANTS, *suite.examples[:3] * (name != "refusal")):
        assert sum(suite.scores_of([answer] * len(suite))) <= 0.05 * len(suite), answer


@pytest.mark.parametrize("name", sorted({*SUITES} - {"refusal"}))
def test_the_examples_of_other_rows_do_not_pass(name: str) -> None:
    suite = read_suite(name)
    others = (*suite.examples[1:], suite.examples[0])
    assert sum(suite.scores_of(others)) <= 0.15 * len(suite)


@pytest.mark.parametrize("name", GENERATED)
def test_the_files_are_what_the_templates_give(name: str) -> None:
    assert (ROWS_FOLDER / f"{name}.jsonl").read_text(encoding="utf-8") == content(name)


def test_there_is_a_file_for_each_name() -> None:
    assert {path.stem for path in ROWS_FOLDER.iterdir()} == {*SUITES} == MAX_NEW_TOKENS.keys()


SCORED = {
    "arithmetic": "1643b1ee0349",
    "instructions": "a69ce6eeee9b",
    "json": "0fbf99719e75",
    "refusal": "cf32dde79ccf",
    "tools": "64087f3abc48",
}
"""Digest of what each suite asks, and of how its rows score the examples of all suites, in the versions of today."""


@pytest.mark.parametrize("name", SUITES)
def test_a_suite_that_scores_otherwise_has_another_version(name: str) -> None:
    """If this fails, raise the suite's number in VERSIONS, and write the new digest here."""
    suite = read_suite(name)
    assert suite.identity == f"{name} {VERSIONS[name]}"
    answers = [*CONSTANTS, *(example for other in SUITES for example in read_suite(other).examples[::3])]
    scores = [suite.scores_of([answer] * len(suite)) for answer in answers]
    of_all = repr((VERSIONS[name], suite.prompts, MAX_NEW_TOKENS[name], scores))
    assert hashlib.sha256(of_all.encode()).hexdigest()[:12] == SCORED[name]


def test_a_model_is_asked_by_its_chat_template_or_without_one(tiny_base: Path, tmp_path: Path) -> None:
    base = load_base(str(tiny_base), tmp_path)
    suite = read_suite("arithmetic")
    few = replace(suite, prompts=suite.prompts[:2], checks=suite.checks[:2])
    seen = []
    assert {*few.score(base.model, base.tokenizer, on_progress=seen.append)} <= {0.0, 1.0}
    assert sum(seen) == 2
    assert few.asked(base.tokenizer).schema.uses_chat_template
    base.tokenizer.chat_template = None
    task = few.asked(base.tokenizer)
    assert not task.schema.uses_chat_template and task.schema.template == "{text}\nAnswer:"


def test_an_engine_answers_in_the_models_place(tiny_base: Path, tmp_path: Path) -> None:
    base = load_base(str(tiny_base), tmp_path)
    suite = read_suite("tools")

    def answer(task, inputs, on_progress):
        assert (task.max_new_tokens, tuple(inputs)) == (96, suite.prompts)
        return [GivenAnswer(text, Confidence(1.0, None), False) for text in suite.examples]

    assert suite.score(None, base.tokenizer, answer) == (1.0,) * len(suite)


@pytest.mark.parametrize("name", ["maths", "lm_eval:", "json,tools"])
def test_an_unknown_suite_is_refused_with_the_names_that_there_are(name: str) -> None:
    with pytest.raises(ConfigError, match=r"give arithmetic, .*, tools or lm_eval:NAME"):
        EvaluateConfig(general=("json", name))


def test_a_suite_is_named_once() -> None:
    with pytest.raises(ConfigError, match="twice"):
        EvaluateConfig(general=("json", "json"))


def test_without_the_harness_its_tasks_are_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"lm_eval:missing-task, which needs .* pip install '\.\[harness\]'"):
        suite_of("lm_eval:missing-task")
