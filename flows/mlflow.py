"""MLflow in step with the store: what it lacks is written, and a person's move of the alias is looked at."""

from __future__ import annotations

from prefect import flow

from flows.lock import LineageBusyError, lock_lineage
from infra.store.base import ObjectStore
from infra.store.opening import open_store
from infra.versions import Versions
from tasks.mlflow_mirror import Synced, sync_lineage
from tasks.progress import raise_if_stopped, reporter, to_the_end


async def mirror_all(store: ObjectStore, lineages: tuple[str, ...] = ()) -> list[Synced]:
    """Do what `sync_mlflow` does, without a flow run."""
    results = []
    for lineage in lineages or Versions(store).lineages():
        raise_if_stopped()
        synced = await mirror(store, lineage)
        if synced is None:
            reporter().said(f"A run works on lineage '{lineage}', and writes into MLflow at its end.")
        else:
            results.append(synced)
    return results


@flow(name="sync-mlflow")
async def sync_mlflow(lineages: tuple[str, ...] = ()) -> list[Synced]:
    """Write into MLflow what it lacks of the store. A lineage that is being learned is left to its run.

    Args:
        lineages: Their names; empty: all lineages that have a version.
    """
    return await mirror_all(open_store(), lineages)


async def mirror(store: ObjectStore, lineage: str) -> Synced | None:
    """Bring MLflow in step with a lineage; None: a run holds the lineage, and does it at its end.

    An error of MLflow is in the result, never raised.
    """
    try:
        async with lock_lineage(lineage, wait=False):
            return await to_the_end(sync_lineage, store, lineage)
    except LineageBusyError:
        return None
