"""Cells of the protocol by which methods are chosen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deal_core.benchmark.cell import Cell, make_cell
from deal_core.benchmark.suites import digest_of, load_suite
from deal_core.config import AdapterConfig, TrainConfig
from deal_core.method_config import MethodConfig
from tasks.references import BaseRef


def development_cell(
    strategy: str,
    method: MethodConfig,
    tasks: tuple[str, ...],
    *,
    base: BaseRef,
    data: Path,
    seed: int,
    rows: int,
    **fields: Any,
) -> Cell:
    """Return a cell that is judged on development rows, with the likeliest label as the answer.

    Args:
        strategy: Name of the strategy.
        method: Its settings.
        tasks: The tasks, in the order in which they are learned.
        base: The base model.
        data: Folder of the tasks.
        seed: Seed of the cell.
        rows: Training rows per task.
        fields: Further fields of the cell.
    """
    return make_cell(
        strategy,
        tasks,
        method=method,
        seed=seed,
        train=TrainConfig(max_prompt_tokens=160, checkpoint_steps=0, seed=seed),
        rows=rows,
        part="dev",
        max_test_rows=None,
        scored="ends",
        scoring="likeliest",
        adapter=AdapterConfig(),
        base=f"{base.name} {base.sha256}",
        data=digest_of(load_suite(data, tasks)),
        **fields,
    )
