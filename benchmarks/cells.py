"""Cells with the settings that the comparisons of methods share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deal_core.benchmark.cell import Cell, make_cell
from deal_core.benchmark.suites import Part, digest_of, load_suite
from deal_core.config import AdapterConfig, TrainConfig
from deal_core.method_config import MethodConfig
from tasks.references import BaseRef


def benchmark_cell(
    strategy: str,
    method: MethodConfig,
    tasks: tuple[str, ...],
    *,
    base: BaseRef,
    data: Path,
    seed: int,
    rows: int,
    part: Part = "dev",
    **fields: Any,
) -> Cell:
    """Return a cell whose answer is the likeliest label, scored right after a task was learned and in the end.

    Args:
        strategy: Name of the strategy.
        method: Its settings.
        tasks: The tasks, in the order in which they are learned.
        base: The base model.
        data: Folder of the tasks.
        seed: Seed of the cell.
        rows: Training rows per task.
        part: The test rows that are scored: dev to choose settings, reported for what a page claims.
        fields: Further fields of the cell.
    """
    return make_cell(
        strategy,
        tasks,
        method=method,
        seed=seed,
        train=TrainConfig(max_prompt_tokens=160, checkpoint_steps=0, seed=seed),
        rows=rows,
        part=part,
        max_test_rows=None,
        scored="ends",
        scoring="likeliest",
        adapter=AdapterConfig(),
        base=f"{base.name} {base.sha256}",
        data=digest_of(load_suite(data, tasks)),
        **fields,
    )
