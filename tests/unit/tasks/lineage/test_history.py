"""What is said of a lineage that has no champion."""

from __future__ import annotations

from pathlib import Path

import pytest

from deal_core.errors import RegistryError
from tasks.context import current_store
from tasks.lineage.history import find_version
from tests.stored_versions import put_version, version


@pytest.mark.parametrize(
    ("num_versions", "remedy", "other"),
    [(0, "adapt it first", "deal version promote"), (2, "deal version promote N --lineage l", "adapt it first")],
)
def test_the_remedy_for_a_missing_champion_depends_on_whether_there_are_versions(
    home: Path, num_versions: int, remedy: str, other: str
) -> None:
    for number in range(num_versions):
        put_version(current_store(), version(number + 1, accepted=True))
    with pytest.raises(RegistryError, match=remedy) as caught:
        find_version(current_store(), "l", None)
    assert other not in str(caught.value)
