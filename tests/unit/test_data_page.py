"""docs/data.md says what a file may look like, as the code has it."""

from __future__ import annotations

import re
from pathlib import Path

from deal_core.data.columns import CONVENTIONS
from deal_core.data.schema import COLUMNS_OF_FORMAT, OPTIONAL_OF_FORMAT, PREFERENCE_COLUMNS

ROOT = Path(__file__).parents[2]


def test_the_page_lists_every_name_that_a_column_may_have() -> None:
    told: dict[str, tuple[str, ...]] = {}
    kinds: dict[str, list[str]] = {}
    page = (ROOT / "docs" / "data.md").read_text()
    section = page.partition("## What a file holds")[2].partition("\n## ")[0]
    kind = ""
    for first, name, others in re.findall(r"^\| ([a-z]*) ?\| `(\w+)` \| (.*)\|$", section, re.MULTILINE):
        kind = first or kind
        kinds.setdefault(kind, []).append(name)
        told[name] = (name, *re.findall(r"`(\w+)`", others))
    assert told == CONVENTIONS
    assert tuple(kinds.pop("preference")) == PREFERENCE_COLUMNS, "in place of the answer of a completion or a chat"
    of_kind = {kind: {*names, *kinds["any"]} for kind, names in kinds.items() if kind != "any"}
    assert of_kind == {kind: {*names, *OPTIONAL_OF_FORMAT[kind]} for kind, names in COLUMNS_OF_FORMAT.items()}
