"""docs/guide.md says what a file may look like, and which variables there are, as the code has it."""

from __future__ import annotations

import re
from pathlib import Path

from deal_core.data.columns import CONVENTIONS
from deal_core.data.schema import COLUMNS_OF_FORMAT, OPTIONAL_OF_FORMAT, PREFERENCE_COLUMNS

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "guide.md").read_text()


def test_the_guide_lists_every_name_that_a_column_may_have() -> None:
    told: dict[str, tuple[str, ...]] = {}
    kinds: dict[str, list[str]] = {}
    section = GUIDE.partition("## What a file holds")[2].partition("\n## ")[0]
    kind = ""
    for first, name, others in re.findall(r"^\| ([a-z]*) ?\| `(\w+)` \| (.*)\|$", section, re.MULTILINE):
        kind = first or kind
        kinds.setdefault(kind, []).append(name)
        told[name] = (name, *re.findall(r"`(\w+)`", others))
    assert told == CONVENTIONS
    assert tuple(kinds.pop("preference")) == PREFERENCE_COLUMNS, "in place of the answer of a completion or a chat"
    of_kind = {kind: {*names, *kinds["any"]} for kind, names in kinds.items() if kind != "any"}
    assert of_kind == {kind: {*names, *OPTIONAL_OF_FORMAT[kind]} for kind, names in COLUMNS_OF_FORMAT.items()}


def test_every_variable_of_the_guide_is_a_setting() -> None:
    known = (ROOT / "infra" / "settings.py").read_text()
    named = set(re.findall(r"`(DEAL_\w+)`", GUIDE.partition("## Where it runs")[2]))
    assert {"DEAL_S3_ACCESS_KEY_ID", "DEAL_ARTIFACT_URI"} <= named
    assert not [name for name in named if not re.search(rf"\b{name}\b", known)]
