"""The stage that makes an accepted version the champion."""

from __future__ import annotations

from prefect import task

from infra.store.opening import open_store
from infra.versions import Version, Versions
from tasks.adaptation.run import STAGE
from tasks.lineage.promotion import promote_accepted
from tasks.progress import staged

_ENDS = {"promoted": "is champion", "awaiting approval": "awaits approval", "rollout": "is tried on live traffic"}


@task(name="promote", **STAGE)
@staged("promote", lambda version: f"version {version.version} {_ENDS[version.outcome]}")
def promote_version(version: Version) -> Version:
    """Promote an accepted version, or begin its rollout, unless a person must approve it; return it as it is then."""
    store = open_store()
    promote_accepted(store, version)
    promoted = Versions(store).find(version.lineage, version.version)
    assert promoted is not None, "versions stay"
    return promoted
