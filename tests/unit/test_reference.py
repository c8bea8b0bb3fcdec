"""The generated pages of docs/ say what the code says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from docs.site.reference import PAGES

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", PAGES)
def test_a_generated_page_is_the_one_that_the_code_gives(name: str) -> None:
    """A process of its own knows no strategies of other packages."""
    code = f"import sys; from docs.site.reference import PAGES; sys.stdout.write(PAGES[{name!r}]())"
    page = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert (ROOT / "docs" / name).read_text() == page, "write it again with: python -m docs.site.reference"
