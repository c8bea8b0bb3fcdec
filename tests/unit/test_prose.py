"""README.md and docs/ stay short and plain: few words, short sentences, no idioms.

A sentence is what a reader reads in one breath. Code blocks, tables, pictures and headings are not counted. A list item
is a paragraph of its own.
"""

from __future__ import annotations

import re
from pathlib import Path
from statistics import mean

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MAX_WORDS = 16_000
MAX_MEAN_SENTENCE = 18
MAX_SENTENCE = 35
MAX_COLUMNS = 120

BREAK = "\n\n"
LEFT_OUT = [
    r"^[ ]*```.*?^[ ]*```[ ]*$",  # code blocks
    r"^[ ]*\|.*$",  # tables
    r"^#.*$",  # headings
    r"^!\[.*$",  # pictures
]
ITEM = r"^[ ]*(?:[-*]|\d+\.|\[\^\w+\]:)[ ]+"
ABBREVIATION = r"\b(?:e\.g|i\.e|al|cf|vs|Eq|no)\.$"


def sentences(page: str) -> list[str]:
    """The sentences of a Markdown page, links and code spans as one reads them."""
    for pattern in LEFT_OUT:
        page = re.sub(pattern, BREAK, page, flags=re.MULTILINE | re.DOTALL if "```" in pattern else re.MULTILINE)
    page = re.sub(ITEM, BREAK, page, flags=re.MULTILINE)
    page = re.sub(r"`[^`]*`", "CODE", page)
    page = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", page)
    found: list[str] = []
    for paragraph in re.split(r"\n\s*\n", page):
        whole = True
        for part in re.split(r"(?<=[.!?:;])[*_)\"”]*\s+", " ".join(paragraph.split())):
            if whole:
                found.append(part)
            else:
                found[-1] += f" {part}"
            whole = not re.search(ABBREVIATION, part) and not part.endswith((":", ";"))
    return [sentence for sentence in found if words(sentence)]


def words(text: str) -> list[str]:
    """What holds a letter or a digit."""
    return [word for word in text.split() if re.search(r"\w", word)]
