"""The documentation's site builds without a warning, and its links, settings and commands are right."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import fields
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit

import click
import pytest
import typer.main

from deal_core.config import TrainConfig
from deal_core.judging_config import GateConfig
from deal_core.method_config import SelectionConfig
from deal_pipeline.cli.app import app

ROOT = Path(__file__).resolve().parents[3]
COMMAND_BLOCK = re.compile(r"^ *```sh\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
NAMED_COMMAND = re.compile(r"""\bdeal ([a-z]+)(?: ([a-z][a-z-]+))?([^"'<;,)`\n]*?--[^"'<;,)`\n]*)""")
"""A command with an option, in a sentence of a message or of a page that the product writes."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_no_page_loads_from_elsewhere(site: Path) -> None:
    """That every link leads somewhere is checked by the build: it is strict, and mkdocs.yml says what it validates."""
    pages = [path for path in site.rglob("*.html") if path.name != "404.html"]
    assert len(pages) > 20
    for page in pages:
        tags = r'<(?:img|script|link|iframe)\b[^>]*\b(?:src|href)="([^"]*)"'
        loaded = re.findall(tags, page.read_text(encoding="utf-8"))
        assert loaded and not [address for address in loaded if urlsplit(address).netloc], page


def test_every_setting_has_its_line_with_its_meaning(site: Path) -> None:
    page = (site / "settings" / "index.html").read_text()
    rows = dict(re.findall(r"<tr>\s*<td><code>(\w+)</code></td>\s*<td>.*?</td>\s*<td>(.*?)</td>", page, re.DOTALL))
    kinds = (TrainConfig, GateConfig, SelectionConfig)
    names = {field.name for kind in kinds for field in fields(kind)}
    names |= {"lineage", "instruction"}
    assert names <= rows.keys()
    assert [name for name in names - {"lineage"} if not rows[name].strip()] == []
    assert "at least 0. Default <code>0.001</code>" in page, "limits and defaults come from the fields"


def test_every_variable_has_its_line_with_its_meaning(site: Path) -> None:
    page = (site / "environment" / "index.html").read_text()
    rows = dict(re.findall(r"<tr>\s*<td><code>(\w+)</code></td>\s*<td>.*?</td>\s*<td>(.*?)</td>", page, re.DOTALL))
    named = set(re.findall(r"\bDEAL_[A-Z0-9_]*[A-Z0-9]\b", (ROOT / "infra" / "settings.py").read_text()))
    assert named <= rows.keys()
    assert set(re.findall(r"`(DEAL_\w+)`", (ROOT / "docs" / "operate.md").read_text())) <= rows.keys()
    assert [name for name, meaning in rows.items() if not meaning.strip()] == []


def shown_commands() -> list[tuple[str, list[str]]]:
    """Every `deal` command in a block of the pages."""
    found = []
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for block in COMMAND_BLOCK.findall(page.read_text()):
            for line in block.replace("\\\n", " ").splitlines():
                for part in re.split(r"&&|\||;", line.partition(" #")[0]):
                    words = shlex.split(part) if part.strip().startswith("deal ") else []
                    found += [(page.name, words[1:])] if words else []
    return found


@cache
def all_commands() -> click.Command:
    """The tree of the program's commands."""
    return typer.main.get_command(app)


def find_command(where: object, words: Sequence[str]) -> tuple[click.Command, list[str]]:
    """The command whose name the words begin with, and the words after its name. They stand in `where`."""
    command = all_commands()
    left = list(words)
    while (subcommands := getattr(command, "commands", None)) and not left[0].startswith("-"):
        assert left[0] in subcommands, f"{where}: there is no command {left[0]}"
        command = subcommands[left.pop(0)]
    return command, left


@pytest.mark.parametrize(("page", "arguments"), shown_commands(), ids=lambda value: " ".join(value)[:60])
def test_the_program_takes_every_command_that_a_page_shows(page: str, arguments: list[str]) -> None:
    """The names of commands and options; README's commands are run by test_readme.py."""
    command, left = find_command(page, arguments)
    if hasattr(command, "commands"):
        assert left[0] in ("-h", "--help", "--version", "--install-completion"), f"{page}: {left[0]}"
    else:
        command.make_parser(click.Context(command)).parse_args(left)


def test_the_program_takes_every_option_that_its_messages_name() -> None:
    folders = ("flows", "tasks", "infra", "deal_core", "deal_pipeline")
    sources = [path for name in folders for kind in ("*.py", "*.j2") for path in (ROOT / name).rglob(kind)]
    num_options = 0
    for source in sources:
        text = re.sub(r'"\s*\n\s*f?"', "", source.read_text(encoding="utf-8"))  # a string in several parts
        for first, second, rest in NAMED_COMMAND.findall(text):
            command, _ = find_command(source, (first, second))
            taken = {option for parameter in command.params for option in parameter.opts}
            for option in re.findall(r"(?<![\w-])--[a-z][a-z-]*", rest.partition(" deal ")[0]):
                num_options += 1
                assert option in taken, f"{source}: deal {first} {second} has no {option}"
    assert num_options > 100, "the expression finds them"
