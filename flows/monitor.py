"""Monitor: compare the live traffic of champions with their answers to the test rows, and announce what has changed."""

from __future__ import annotations

from prefect import flow

from infra.tracking.registry import open_registry
from tasks.context import current_store
from tasks.lineage.history import known_lineages
from tasks.lineage.settings import for_each
from tasks.monitoring.look import MonitorResult, look_at
from tasks.progress import Stages, reporter


@flow(name="monitor", flow_run_name="monitor-{lineage}")
async def monitor(lineage: str, data: str | None = None, rebase: bool = False) -> MonitorResult:
    """Compare the live traffic of a lineage's champion with its reference. No model is needed.

    Args:
        lineage: The lineage.
        data: File of answers that another server gave, instead of the prediction log. Nothing is announced then.
        rebase: Compare with the present live rows from now on, until another version is champion.

    Raises:
        RegistryError: The lineage has no champion.
        ConfigError: The file cannot be used, there are too few rows for a rebase, or `data` comes with `rebase`.
    """
    stages = Stages()
    found = await stages.run("compare", look_at, lineage, data, rebase)
    left_out = f"; {found.num_faulty} rows cannot be read and were left out" if found.num_faulty else ""
    stages.done("compare", (found.problem or f"{found.num_rows} rows of version {found.version}") + left_out)
    for alarm in found.new_alarms:
        reporter().said(f"{lineage}, {alarm.task}: {alarm.kind}. {'; '.join(alarm.reasons)}")
    return found


@flow(name="monitor-lineages")
async def monitor_lineages(lineages: tuple[str, ...] = ()) -> list[MonitorResult]:
    """Look at the live traffic of several lineages' champions, one after another.

    Args:
        lineages: Their names; empty: all lineages that have a champion.

    Raises:
        DealError: Some lineages could not be looked at. All others were.
    """
    registry = open_registry()
    names = lineages or known_lineages(current_store())

    async def look(name: str) -> MonitorResult | None:
        return await monitor(name) if lineages or registry.champion(name) else None

    return [each for each in await for_each(names, look, "could not be looked at") if each is not None]
