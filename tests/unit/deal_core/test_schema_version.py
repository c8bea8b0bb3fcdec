"""Files of another release are refused."""

from __future__ import annotations

import pytest

from deal_core.errors import StoreError
from deal_core.schema_version import require_schema_version


@pytest.mark.parametrize("values", [{"schema_version": 3}, {"schema_version": "2"}, {}, [], None])
def test_what_another_release_wrote_is_refused_with_what_to_do(values: object) -> None:
    message = r"^a\.json has schema version .*, this release reads 2; make it again\.$"
    with pytest.raises(StoreError, match=message):
        require_schema_version(values, 2, "a.json", StoreError, "make it again")


def test_what_this_release_reads_passes() -> None:
    assert require_schema_version({"schema_version": 2, "a": 1}, 2, "a.json", StoreError) == {"a": 1}
