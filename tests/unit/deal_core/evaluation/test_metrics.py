"""Scores of answers against values worked out by hand from the definitions."""

from __future__ import annotations

import sys
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deal_core.config import METRICS as NAMES
from deal_core.errors import ConfigError
from deal_core.evaluation.metrics import (
    METRICS,
    MODULES_VARIABLE,
    collapsed,
    label_figures,
    metric_name,
    rouge1,
    rouge_l,
    score_answers,
    scored_otherwise,
)

WORDS = st.lists(st.sampled_from("abc"), max_size=7)


ADA = '{"name": "Ada", "age": 36}'
NESTED = '{"tags": ["A", {"n": 1}], "who": {"name": "Ada"}}'
SCORES: dict[str, list[tuple[str, str, float]]] = {
    "exact": [
        (" Card Lost\n", "card lost", 1),
        ("STRASSE", "straße", 1),
        ("card  lost", "card lost", 0),
        ("re\u0301clamation", "r\u00e9clamation", 1),
        ("", "a", 0),
    ],
    "contains": [
        ("It is a lost card.", "Lost  card", 1),
        ("It is lost", "lost card", 0),
        ("discard it", "card", 0),
        ("C++!", "c++", 1),
        ("答案是北京。", "北京", 1),
        ("It costs 5.", "5", 1),
        ("pages 3-5", "5", 1),
        ("$5, or 6", "5", 1),
        ("The total is 5.75 euros.", "5", 0),
        ("a ratio of 0.5", "5", 0),
        ("1,500 euros", "500", 0),
        ("the answer is -5", "5", 0),
        ("−5", "5", 0),
        ("the answer is -5", "-5", 1),
        ("राम ने कमला को देखा", "कमल", 0),  # a word does not end before a vowel sign
        ("राम ने कमल को देखा", "कमल", 1),
    ],
    "rouge_l": [("die Größe zählt", "Größe zählt nicht", 4 / 6), ("это дом", "это дом", 1)],
    "json_fields": [
        ('{"name": " ada ", "age": 36}', ADA, 1),
        ('{"age": 36}', ADA, 1 / 2),
        ('{"name": "Ada", "age": 37}', ADA, 1 / 2),
        ('{"name": "Ada", "age": 36, "city": "x"}', ADA, 2 / 3),
        ("Ada, 36", ADA, 0),
        ("[1]", ADA, 0),
        ('{"name": "Ada", "age": true}', ADA, 1 / 2),
        ('{"tags": ["a", {"n": 1}], "who": {"name": " ada"}}', NESTED, 1),
        ('{"tags": ["a", {"n": true}], "who": {"name": "Ada"}}', NESTED, 1 / 2),
    ],
}


@pytest.mark.parametrize("metric", SCORES)
def test_a_metric_scores_as_it_is_defined(metric: str) -> None:
    answers, references, expected = zip(*SCORES[metric], strict=True)
    assert score_answers(metric, answers, references) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("answer", "expected", "score"),
    [("the cat sat", "The Cat", 0.8), ("a a a", "a", 0.5), ("a", "b", 0.0), ("", "", 1.0), ("", "a", 0.0)],
)
def test_rouge1_is_the_f1_of_shared_words(answer: str, expected: str, score: float) -> None:
    assert rouge1(answer, expected) == pytest.approx(score)


@given(st.text(alphabet="ab \n"), st.text(alphabet="ab \n"))
def test_rouge1_is_symmetric_and_bounded(answer: str, expected: str) -> None:
    assert 0.0 <= rouge1(answer, expected) <= 1.0
    assert rouge1(answer, expected) == rouge1(expected, answer)


def longest_common(first: list[str], second: list[str]) -> int:
    """The textbook recursion, row by row."""
    row = [0] * (len(second) + 1)
    for word in first:
        before, row = row, [0]
        for column, other in enumerate(second):
            row.append(before[column] + 1 if word == other else max(before[column + 1], row[-1]))
    return row[-1]


@given(WORDS, WORDS)
def test_rouge_l_is_the_f1_of_the_longest_common_subsequence(answer: list[str], expected: list[str]) -> None:
    found = rouge_l(" ".join(answer), ", ".join(expected).upper())
    common, total = longest_common(answer, expected), len(answer) + len(expected)
    assert found == pytest.approx(2 * common / total if total else 1.0)


def test_an_answer_with_several_references_has_the_score_of_the_best() -> None:
    assert score_answers("rouge_l", ["one cat", "a dog"], [["a cat", "one cat"], ["a cat", "one cat"]]) == (1.0, 0.5)
    assert score_answers("exact", ["b", "c"], [["a", "b"], "d"]) == (1.0, 0.0)


def test_every_known_metric_has_a_function_and_a_name() -> None:
    assert tuple(METRICS) == NAMES
    assert scored_otherwise({"bank": "exact", "notes": "rouge_l"}).endswith("notes by ROUGE-L.")
    assert scored_otherwise({"bank": "exact"}) == "" and metric_name("ours:polite") == "polite"


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "own_scores.py").write_text(
        "def half(answer, reference):\n    return 0.5\n\ndef wild(answer, reference):\n    return 7\n\n"
        "def broken(answer, reference):\n    raise KeyError(answer)\n\nNUMBER = 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv(MODULES_VARIABLE, "other, own_scores")
    monkeypatch.delitem(sys.modules, "own_scores", raising=False)
    return "own_scores"


def test_a_function_of_an_allowed_module_scores(own_module: str) -> None:
    assert score_answers(f"{own_module}:half", ["a", "b"], ["a", "c"]) == (0.5, 0.5)


@pytest.mark.parametrize(
    ("name", "message"),
    [("wild", "returned 7.0"), ("broken", "failed \\(KeyError\\)"), ("NUMBER", "no function"), ("absent", "not found")],
)
def test_a_function_that_cannot_score_is_named(own_module: str, name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        score_answers(f"{own_module}:{name}", ["secret"], ["a"])
    with pytest.raises(ConfigError) as raised:
        score_answers(f"{own_module}:broken", ["secret"], ["a"])
    assert raised.value.__cause__ is None and raised.value.__suppress_context__, "a log would show the answer"


def test_a_module_that_is_not_allowed_is_not_even_imported(own_module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MODULES_VARIABLE, "other")
    with pytest.raises(ConfigError, match="does not allow the module 'own_scores'; it allows other"):
        score_answers(f"{own_module}:half", ["a"], ["a"])
    assert "own_scores" not in sys.modules


def test_recall_and_share_of_each_label():
    answers = [" Good", "bad", "bad", "BAD ", "who knows"]
    figures = label_figures(answers, ["good", "good", "bad", "bad", "good"], ("Good", "Bad", "Neutral"))
    assert [(each.label, each.num_rows, each.recall, each.share) for each in figures] == [
        ("Good", 3, pytest.approx(1 / 3), 0.2),
        ("Bad", 2, 1.0, 0.6),
        ("Neutral", 0, None, 0.0),
        (None, 0, None, 0.2),
    ]


@pytest.mark.parametrize(
    ("answers", "expected"),
    [("aaaaaaaaab", "a"), ("aaaaabbbbb", None), ("xxxxxxxxab", None), ("aabbcccccc", "c")],
)
def test_a_collapse_is_a_label_that_is_answered_far_too_often(answers, expected):
    figures = label_figures(list(answers), list("aaabbbbccc"), ("a", "b", "c"))
    found = collapsed(figures)
    assert (found.label if found else None) == expected


@pytest.mark.parametrize(
    ("right", "wrong"),
    [("मैं घर गया", "मैं घर गयी"), ("กิน", "กัน"), ("كَتَبَ", "كُتِبَ"), ("caf\u00e9", "cafe")],
)
def test_vowel_signs_and_accents_belong_to_their_words(right: str, wrong: str) -> None:
    assert rouge_l(unicodedata.normalize("NFD", right), right) == 1 > rouge_l(wrong, right)
