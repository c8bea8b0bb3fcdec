"""What is said of a lineage that has no champion."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

import tasks.lineage.history
from deal_core.errors import RegistryError
from tasks.lineage.history import find_version


@pytest.mark.parametrize(
    ("versions", "remedy", "other"),
    [((), "adapt it first", "deal promote"), (("1", "2"), "deal promote N --lineage l", "adapt it first")],
)
def test_the_remedy_for_a_missing_champion_depends_on_whether_there_are_versions(
    monkeypatch: pytest.MonkeyPatch, versions: tuple[str, ...], remedy: str, other: str
) -> None:
    registry: Any = SimpleNamespace(champion=lambda lineage: None, versions=lambda lineage, newest: versions)
    monkeypatch.setattr(tasks.lineage.history, "open_reader", lambda: registry)
    with pytest.raises(RegistryError, match=remedy) as caught:
        find_version(registry, "l", None)
    assert other not in str(caught.value)
