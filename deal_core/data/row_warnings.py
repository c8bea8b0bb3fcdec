"""Warnings about rows that are good one by one and odd together: near duplicates, and labels with few rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from rapidfuzz import fuzz, utils

from deal_core.safe_text import listed

MAX_COMPARED = 20_000
"""Rows that are compared; of more, the first ones."""
MIN_SIMILARITY = 90.0
"""Similarity of near duplicates, 0 to 100: twice the length of the longest common subsequence, divided by the length of
both texts. Case, punctuation and white space do not count."""
MIN_CHARS = 20
"""Shorter texts are similar by chance."""
NUM_NEIGHBOURS = 4
"""Texts that each is compared with, in every order."""
MAX_SHOWN = 5
MAX_RATIO = 10
"""Rows of the commonest label per row of the rarest one."""

_ORDERS: tuple[Callable[[str], str], ...] = (str, lambda text: text[::-1], lambda text: " ".join(sorted(text.split())))


def near_duplicates(texts: Sequence[str]) -> dict[int, int]:
    """Return the rows that are near copies of another row, with an earlier row that each resembles.

    Comparing all pairs would take hours. The texts are sorted three times: by their beginnings, their ends, and their
    words. Each is compared with its neighbours in every order (the sorted-neighbourhood method of Hernández and Stolfo,
    1995). So copies that differ in their beginning, their end and many words are not found.
    """
    plain = [utils.default_process(text) for text in texts[:MAX_COMPARED]]
    rows = [row for row, text in enumerate(plain) if len(text) >= MIN_CHARS]
    found: dict[int, int] = {}
    for key in _ORDERS:
        order = sorted(rows, key=lambda row: (key(plain[row]), row))
        for distance in range(1, NUM_NEIGHBOURS + 1):
            for one, other in zip(order, order[distance:], strict=False):
                first, second = min(one, other), max(one, other)
                if second not in found and fuzz.ratio(plain[first], plain[second], score_cutoff=MIN_SIMILARITY):
                    found[second] = first
    return dict(sorted(found.items()))


def copies_warning(texts: Sequence[str], name_of: Callable[[int], str]) -> str | None:
    """Return a warning about near duplicates among the rows' inputs, with a few of them; None if there are none.

    `name_of` names a row, given its number.
    """
    found = near_duplicates(texts)
    if not found:
        return None
    shown = listed([f"{name_of(row)} of {name_of(first)}" for row, first in found.items()], most=MAX_SHOWN, width=200)
    return (
        f"{len(found):,} of {min(len(texts), MAX_COMPARED):,} training rows that were compared are near copies of "
        f"another: {shown}"
    )


def balance_warning(counts: Mapping[str, int]) -> str | None:
    """Return a warning if labels have no rows, or far fewer than the commonest; None if no label is that rare."""
    most = max(counts.values(), default=0)
    rare = sorted((count, label) for label, count in counts.items() if count * MAX_RATIO <= most)
    if not rare or not most:
        return None
    few = listed([f"{label} {count:,}" for count, label in rare], most=MAX_SHOWN)
    return (
        f"{len(rare)} of {len(counts)} labels have few rows ({few}) against {most:,} of the commonest: the model will "
        "seldom answer with them; add rows of these labels"
    )
