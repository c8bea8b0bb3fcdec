"""Recall and share of each label, and when one label has taken over."""

from __future__ import annotations

import pytest

from deal_core.evaluation.label_figures import collapsed, label_figures


def test_recall_and_share_of_each_label():
    answers = [" Good", "bad", "bad", "BAD ", "who knows"]
    figures = label_figures(answers, ["good", "good", "bad", "bad", "good"], ("Good", "Bad", "Neutral"))
    assert [(each.label, each.num_rows, each.recall, each.share) for each in figures] == [
        ("Good", 3, pytest.approx(1 / 3), 0.2), ("Bad", 2, 1.0, 0.6), ("Neutral", 0, None, 0.0), (None, 0, None, 0.2),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("answers", "expected"),
    [("aaaaaaaaab", "a"), ("aaaaabbbbb", None), ("xxxxxxxxab", None), ("aabbcccccc", "c")],
)
def test_a_collapse_is_a_label_that_is_answered_far_too_often(answers, expected):
    figures = label_figures(list(answers), list("aaabbbbccc"), ("a", "b", "c"))
    found = collapsed(figures)
    assert (found.label if found else None) == expected
