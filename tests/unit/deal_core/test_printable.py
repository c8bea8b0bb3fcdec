"""Texts from outside are shown without characters that control a terminal, and no longer than a screen."""

from __future__ import annotations

import json

import pytest

from deal_core.printable import brief, listed, printable, printable_json

UNSAFE = ["\x1b[31m", "\x9b31m", "\x07", "\r", "\x08", "\x7f", "\x00", "\u202e", "\u2066", "\u2029", "\ud800", "\u061c"]


@pytest.mark.parametrize("text", UNSAFE, ids=ascii)
def test_what_a_terminal_acts_on_is_escaped(text: str) -> None:
    shown = printable(f"a{text}b")
    assert shown.startswith("a\\") and shown.endswith("b") and text[0] not in shown
    assert shown.encode()
    dumped = printable_json(json.dumps([f"a{text}b"], ensure_ascii=False))
    assert text[0] not in dumped and json.loads(dumped) == [f"a{text}b"]


@pytest.mark.parametrize("text", ["a\nb\tc", "Straße, naïve, 東京, क्‍ष, می‌خواهم, 👩‍🚀", "[red]x[/]"])
def test_text_of_any_language_stays(text: str) -> None:
    assert printable(text) == text


def test_long_lists_and_long_names_are_cut() -> None:
    assert listed([f"l{n}" for n in range(1000)], most=3) == "l0, l1, l2 and 997 more"
    assert listed(["x" * 1000, "\x1b"]) == f"{'x' * 39}…, \\x1b"
    assert listed([]) == ""


def test_a_value_is_written_briefly_whatever_its_size() -> None:
    laughs: list[object] = ["x"]
    for _ in range(200):
        laughs = [laughs] * 9
    for value in (laughs, "x" * 10**6, 10**5000, {n: n for n in range(10**5)}, b"x" * 10**6):
        assert len(brief(value)) < 1000
    assert brief(True) == "True" and brief("3") == "'3'" and brief((1.5,)) == "(1.5,)"
