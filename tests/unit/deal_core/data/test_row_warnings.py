"""Rare labels are named."""

from __future__ import annotations

from deal_core.data.row_warnings import balance_warning


def test_rare_labels_are_named_and_even_ones_are_not():
    assert balance_warning({"a": 0, "b": 0}) is None, "no row is good"
    assert balance_warning({"a": 100, "b": 11, "c": 40}) is None and balance_warning({}) is None
    warning = balance_warning({"a": 100, "b": 10, "c": 0})
    assert warning is not None and "2 of 3 labels have few rows (c 0, b 10) against 100" in warning
