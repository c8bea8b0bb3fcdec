"""Near duplicates are found without comparing all pairs, and rare labels are named."""

from __future__ import annotations

import random

from deal_core.data.row_warnings import balance_warning, copies_warning, near_duplicates

WORDS = ("card", "money", "transfer", "account", "refund", "parcel", "delay", "clinic", "letter", "doctor", "invoice")


def texts(num: int, seed: int = 0) -> list[str]:
    """Texts of forty random words."""
    generator = random.Random(seed)
    return [" ".join(generator.choice(WORDS) for _ in range(40)) for _ in range(num)]


def test_near_copies_are_found_wherever_they_lie():
    originals = texts(300)
    first, *between, last = originals[200].split()
    # another first word also changes the beginning of the sorted words, so one order alone finds each of the next two
    copies = {
        originals[3].upper() + "!": 3,
        originals[50] + " aa": 50,
        "aa " + originals[99]: 99,
        " ".join([last, *between, first]): 200,
    }
    found = near_duplicates([*originals, *copies])
    assert {row: first for row, first in found.items() if row >= 300} == {
        300 + place: first for place, first in enumerate(copies.values())
    }
    assert not any(row < 300 for row in found)


def test_short_texts_and_texts_of_their_own_are_no_copies():
    assert not near_duplicates(["yes", "yes!", "yes?"]) and not near_duplicates(texts(200)) and not near_duplicates([])


def test_the_warning_names_rows_as_it_is_told():
    rows = [*texts(5), texts(5)[2] + "."]
    assert copies_warning(rows, lambda row: f"row {row}") == (
        "1 of 6 training rows that were compared are near copies of another: row 5 of row 2"
    )
    assert copies_warning(texts(5), str) is None


def test_rare_labels_are_named_and_even_ones_are_not():
    assert balance_warning({"a": 0, "b": 0}) is None, "no row is good"
    assert balance_warning({"a": 100, "b": 11, "c": 40}) is None and balance_warning({}) is None
    warning = balance_warning({"a": 100, "b": 10, "c": 0})
    assert warning is not None and "2 of 3 labels have few rows (c 0, b 10) against 100" in warning
