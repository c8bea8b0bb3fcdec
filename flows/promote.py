"""Promote: a person moves the champion of a lineage, forwards or back."""

from __future__ import annotations

from prefect import flow
from pydantic import BaseModel, ConfigDict

from deal_core.errors import RegistryError
from flows.history import find_version
from flows.lock import hold_lineage
from infra.registry import open_registry


class Promotion(BaseModel):
    """From which version to which."""

    model_config = ConfigDict(frozen=True)

    lineage: str
    before: str | None
    version: str


@flow(name="promote", flow_run_name="promote-{lineage}-{version}")
async def promote(lineage: str, version: str) -> Promotion:
    """Make a version the champion; the next arrival continues from it.

    Args:
        lineage: whose champion.
        version: the version's number; one that its gate accepted.

    Raises:
        RegistryError: there is no such version, its gate rejected it, or it is champion already.
    """
    async with hold_lineage(lineage):
        registry = open_registry()
        found = find_version(registry, lineage, version)
        champion = registry.champion(lineage)
        if champion and champion.version == found.version:
            raise RegistryError(f"Version {version} of '{lineage}' is its champion already.")
        registry.set_alias(lineage, "champion", found.version)
        return Promotion(lineage=lineage, before=champion.version if champion else None, version=found.version)
