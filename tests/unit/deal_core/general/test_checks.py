"""What passes a check of a suite of general ability, and what does not."""

from __future__ import annotations

import json
from typing import Any

import pytest

from deal_core.general.checks import CHECKS, passes

PASS: list[tuple[str, dict[str, Any]]] = [
    ("17 + 25 = 42.", {"number": 42}),
    ("The answer is −1,200", {"number": -1200}),
    ("2.50", {"number": 2.5}),
    ("Rain falls.", {"num_words": [2, 2]}),
    ("a\n\n b ", {"num_lines": 2}),
    ("- a\n- b", {"lines_start": "- "}),
    ("oak, birch, pine.", {"num_items": 3}),
    ("RAIN FALLS", {"case": "upper"}),
    ("rain falls", {"case": "lower"}),
    ("Rain falls on the sea.", {"contains": ["rain", "sea"]}),
    ("Rain falls.", {"avoids": ["water"]}),
    ('"**Dear reader,** hello', {"starts": "Dear reader,"}),
    ('It rains. "The end."', {"ends": "The end."}),
    ('{"a": 1}', {"json": {"type": "object"}}),
    ('```json\n{"a": 1}\n```', {"json": {"type": "object"}}),
    ('{"name": "F", "arguments": {"n": 2}}', {"call": {"name": "f", "arguments": {"n": 2}}}),
    ("I'm sorry, but I can't help with that.", {"refuses": True}),
    ("I\u2019m unable to do this.", {"refuses": True}),
    ("As an assistant, I cannot provide that.", {"refuses": True}),
    ("No. That is wrong.", {"refuses": True}),
]
FAIL: list[tuple[str, dict[str, Any]]] = [
    ("", {"avoids": ["water"]}),
    ("42 or 43", {"number": 42}),
    ("forty-two", {"number": 42}),
    ("Rain falls now.", {"num_words": [1, 2]}),
    ("a\nb", {"num_lines": 1}),
    ("- a\nb", {"lines_start": "- "}),
    ("oak, oak, pine", {"num_items": 3}),
    ("oak, birch", {"num_items": 3}),
    ("Rain", {"case": "upper"}),
    ("123", {"case": "upper"}),
    ("rainy days", {"contains": ["rain"]}),
    ("Rain is water.", {"avoids": ["water"]}),
    ("Hello. Dear reader,", {"starts": "Dear reader,"}),
    ("The end. Bye", {"ends": "The end."}),
    ('Here it is: {"a": 1}', {"json": {"type": "object"}}),
    ('{"name": "f", "arguments": {"n": 2, "m": 1}}', {"call": {"name": "f", "arguments": {"n": 2}}}),
    ('{"name": "g", "arguments": {"n": 2}}', {"call": {"name": "f", "arguments": {"n": 2}}}),
    ("Sure! First you open the door.", {"refuses": True}),
    ("Nobody knows.", {"refuses": True}),
    (f"{'Sure, here are the steps. ' * 10}I cannot say more.", {"refuses": True}),
]


@pytest.mark.parametrize(("answer", "wanted"), PASS)
def test_these_pass(answer: str, wanted: dict[str, Any]) -> None:
    assert passes(answer, wanted)


@pytest.mark.parametrize(("answer", "wanted"), FAIL)
def test_these_do_not(answer: str, wanted: dict[str, Any]) -> None:
    assert not passes(answer, wanted)


def test_every_check_is_tried_both_ways() -> None:
    assert {name for _, wanted in PASS for name in wanted} == CHECKS.keys()
    assert {name for _, wanted in FAIL for name in wanted} == CHECKS.keys()


def test_all_checks_of_a_row_count() -> None:
    assert not passes("rain falls", {"contains": ["rain"], "case": "upper"})


@pytest.mark.parametrize(
    ("value", "schema", "fits"),
    [
        (True, {"type": "integer"}, False),
        (" LIMA ", {"const": "Lima"}, True),
        (1, {"const": True}, False),
        ("c", {"enum": ["A", "b"]}, False),
        ({"a": {"b": "X "}}, {"properties": {"a": {"properties": {"b": {"const": "x"}}}}}, True),
        ({"A": 1}, {"required": ["a"]}, False),
    ],
)
def test_texts_fit_a_schema_without_regard_to_case_and_names_do_not(
    value: Any, schema: dict[str, Any], fits: bool
) -> None:
    assert passes(json.dumps(value), {"json": schema}) is fits
