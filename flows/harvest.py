"""Harvest: reviewed right answers to logged texts land in the inbox as an ordinary file."""

from __future__ import annotations

from prefect import flow

from tasks.monitoring.harvest import HarvestResult, harvest_feedback
from tasks.progress import reporter


@flow(name="harvest", flow_run_name="harvest-{task}")
def harvest(task: str, lineage: str = "default") -> HarvestResult:
    """Write the reviewed right answers of a task into its inbox. What was harvested before does not land again.

    Args:
        task: The task.
        lineage: The lineage whose champion answered.

    Raises:
        ConfigError: The lineage does not know the task.
        RegistryError: The lineage has no champion.
    """
    result = harvest_feedback(task, lineage)
    landed = f"{result.num_rows} rows landed as {result.key}" if result.key else "nothing to harvest"
    reporter().said(f"Feedback on {task} of {lineage}: {landed}.")
    return result
