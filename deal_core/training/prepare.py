"""What precedes a training: the choice of rows, then the mask of their answers' tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from datasets import Dataset

from deal_core.base_model.load import BaseModel
from deal_core.selection.choose import ChosenRows, choose_rows
from deal_core.training.token_mask import MASK_FILE, mask_tokens, require_no_labels
from deal_core.training.train import TrainingSetup

SELECTION_FILE = "selection.json"
OnStage = Callable[[int, int, str], None]


class PreparedRows(NamedTuple):
    """The rows that are trained on."""

    rows: Dataset
    notes: tuple[str, ...]
    """What was chosen and masked, for people."""
    chosen: ChosenRows | None
    """The choice; None: every row is trained on."""


def prepare_rows(
    rows: Dataset,
    setup: TrainingSetup,
    lend_base: Callable[[], BaseModel],
    *,
    parent_folder: Path | None,
    folder: Path,
    on_stage: OnStage,
) -> PreparedRows:
    """Choose rows by `setup.method.selection` and mask tokens by `setup.method.token_mask`, each if it is on.

    Args:
        rows: All training rows, columns input and output, and sha256 if rows are to be named by it.
        setup: The task, the settings and the seed.
        lend_base: Returns the base model without an adapter. It is called only if a model reads rows.
        parent_folder: Folder of the parent version's adapter; None for the first task of a lineage.
        folder: Keeps both results for a second call with the same arguments; it must outlive the run's checkpoints.
        on_stage: Called with the number of rows that a model has read, the number that it will read, and for what.

    Raises:
        ConfigError: The score is not known or cannot be used, or tokens of a task with labels are to be masked.
        AdapterStateError: The parent's adapter does not fit the base.
    """
    require_no_labels(setup.method, setup.task)
    notes: list[str] = []
    chosen = None
    if setup.method.selection.is_on:
        chosen = choose_rows(
            rows, setup, lend_base, parent_folder=parent_folder, journal=folder / SELECTION_FILE,
            on_progress=lambda done, total: on_stage(done, total, "choosing rows"),
        )  # fmt: skip
        rows = rows.select(chosen.rows)
        notes += chosen.notes
    if setup.method.token_mask.is_on:
        masked = mask_tokens(
            rows, setup, lend_base, parent_folder=parent_folder, file=folder / MASK_FILE,
            on_progress=lambda done, total: on_stage(done, total, "masking tokens"),
        )  # fmt: skip
        rows = masked.rows
        notes.append(masked.note)
    return PreparedRows(rows, tuple(notes), chosen)
