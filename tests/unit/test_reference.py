"""The generated pages of docs/ say what the code says."""

from __future__ import annotations

from pathlib import Path

import pytest

from docs.site.reference import PAGES

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("name", PAGES)
def test_a_generated_page_is_the_one_that_the_code_gives(name: str) -> None:
    assert (DOCS / name).read_text() == PAGES[name](), "write it again with: python -m docs.site.reference"
