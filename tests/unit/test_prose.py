"""README.md and docs/ are plain: a limit of a sentence's length, of a line's width, and no idioms.

The counter is simple on purpose. Words hold a letter; tables count, code blocks do not. Sentences are those of running
text and list items: headings, tables and pictures are left out, and a code span is one word.
"""

from __future__ import annotations

import re
from pathlib import Path
from statistics import mean

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MAX_MEAN_SENTENCE = 18
MAX_SENTENCE = 35
MAX_COLUMNS = 120

CODE_BLOCK = re.compile(r"^ *```.*?^ *```$", re.MULTILINE | re.DOTALL)
NO_TEXT = re.compile(r"^(?: *\||#|!\[).*$", re.MULTILINE)
"""Tables, headings and pictures."""
ITEM = re.compile(r"^ *(?:[-*]|\d+\.|\[\^\w+\]:) ", re.MULTILINE)
FOOTNOTE = re.compile(r"\[\^\w+\]")
CODE_SPAN = re.compile(r"`[^`]*`")
LINK = re.compile(r"\[([^\]]*)\]\([^)]*\)")
END = re.compile(r"(?<=[.!?])[*_)\"”]*\s+")
IDIOMS = re.compile(r"\b(?:beside|whichever|so many|for good|is none|nobody|whoever|anew|somebody)\b", re.IGNORECASE)


def text_of(page: str) -> str:
    """A Markdown page without code blocks, and with links and code spans as one reads them."""
    return LINK.sub(r"\1", CODE_SPAN.sub("CODE", CODE_BLOCK.sub("\n\n", page)))


def words(text: str) -> list[str]:
    """What holds a letter."""
    return [word for word in text.split() if re.search(r"[^\W\d_]", word)]


def sentences(page: str) -> list[str]:
    """The sentences of a Markdown page."""
    text = FOOTNOTE.sub("", ITEM.sub("\n\n", NO_TEXT.sub("\n\n", text_of(page))))
    paragraphs = [" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text)]
    return [sentence for paragraph in paragraphs for sentence in END.split(paragraph) if words(sentence)]


def test_the_counter_counts_what_a_reader_reads() -> None:
    page = (
        "# Head\n\nOne `a b c` two. **Three!** See\n[the page](x.md)[^1].\n\n- item\n\n| a | 1 |\n\n```sh\nrun\n```\n"
    )
    assert sentences(page) == ["One CODE two.", "**Three!", "See the page.", "item"]
    assert len(words(text_of(page))) == 10


def test_all_pages_together_have_short_sentences() -> None:
    texts = [page.read_text() for page in PAGES]
    assert mean(len(words(sentence)) for text in texts for sentence in sentences(text)) <= MAX_MEAN_SENTENCE


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_is_plain(page: Path) -> None:
    text = page.read_text()
    assert not [sentence for sentence in sentences(text) if len(words(sentence)) > MAX_SENTENCE]
    lines = NO_TEXT.sub("", CODE_BLOCK.sub("", text)).splitlines()
    assert not [line for line in lines if len(line) > MAX_COLUMNS]
    assert not IDIOMS.findall(text_of(text))


def anchor(heading: str) -> str:
    """The anchor of a heading, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", CODE_SPAN.sub(lambda span: span[0][1:-1], heading)).strip().lower().replace(" ", "-")


@pytest.mark.parametrize(
    "page", [*PAGES, ROOT / "CONTRIBUTING.md", *(ROOT / "benchmarks").glob("*.md")], ids=lambda page: page.name
)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", CODE_BLOCK.sub("", page.read_text())):
        name, _, part = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), target
        if part:
            headings = re.findall(r"^#+ (.*)$", CODE_BLOCK.sub("", file.read_text()), re.MULTILINE)
            assert part in [anchor(heading) for heading in headings], target
