"""What MkDocs needs to know of the repository: pages outside docs/, pages made from the code, and where links lead.

The files are written for the repository's own page. A link goes from file to file there, and is changed to go from page
to page here.
"""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

import nbformat
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import get_plugin_logger
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from nbconvert import MarkdownExporter

from docs.site.reference import SITE_PAGES

ROOT = Path(__file__).parents[2]
PAGES = {
    "README.md": "index.md",
    "docs/README.md": "pages.md",
    "docs/quickstart.ipynb": "quickstart.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/arrival_check.md": "arrival_check_figures.md",
    "benchmarks/few_rows.md": "few_rows.md",
    "benchmarks/intervals.md": "intervals.md",
    "benchmarks/scaling.md": "scaling.md",
    "benchmarks/consolidation.md": "consolidation_figures.md",
    "benchmarks/data_efficiency.md": "data_efficiency_figures.md",
    "LICENSE": "LICENSE.txt",
    "CITATION.cff": "CITATION.cff",
}
"""File in the repository → its name on the site. Other files of docs/ keep their names."""
FILES = {page: file for file, page in PAGES.items()}
CODE = re.compile(r"(^ *```.*?^ *```$)", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(\]\()((?!https?:|#)[^)#\s]+)")
TABLE_STYLE = re.compile(r'<style scoped>.*?</style>|(?<=<table) border="1" class="dataframe"', re.DOTALL)
"""The look of a pandas table; the site has its own."""
ITEM = re.compile(r"^(?:[-*]|\d+\.) ")

logger = get_plugin_logger(__name__)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are outside docs/, and those that are made from the code."""
    for file, page in PAGES.items():
        if file.endswith(".ipynb"):
            notebook = nbformat.read(ROOT / file, as_version=4)
            content, resources = MarkdownExporter().from_notebook_node(notebook)
            content = TABLE_STYLE.sub("", content)
            for name, picture in resources["outputs"].items():
                files.append(File.generated(config, name, content=picture))
        else:
            content = (ROOT / file).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=content))
    for page, content_of in SITE_PAGES.items():
        files.append(File.generated(config, page, content=content_of()))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Change links and the indent of list items. Code blocks stay as they are, apart from their indent."""
    name = page.file.src_uri
    file = PurePosixPath(FILES.get(name, f"docs/{name}"))
    parts = CODE.split(markdown)
    parts[::2] = [LINK.sub(lambda link: link[1] + site_address(link[2], file), part) for part in parts[::2]]
    return indented("".join(parts))


def site_address(target: str, file: PurePosixPath) -> str:
    """Return where a link of a file leads on the site.

    Args:
        target: The link, relative to the file's folder.
        file: The file, relative to the repository.
    """
    path = os.path.normpath(file.parent / target)
    if path in PAGES:
        return PAGES[path]
    if not path.startswith("docs/"):
        logger.warning("%s links to %s, which is not on the site", file, target)
    return path.removeprefix("docs/")


def indented(markdown: str) -> str:
    """Indent what belongs to a list item by four spaces, which Python-Markdown asks for; GitHub takes two or three."""
    lines, is_in_item = [], False
    for line in markdown.split("\n"):
        if ITEM.match(line):
            is_in_item = True
        elif line and not line.startswith("  "):
            is_in_item = False
        elif line and is_in_item:
            width = 3 if line.startswith("   ") else 2
            line = "    " + line[width:]
        lines.append(line)
    return "\n".join(lines)
