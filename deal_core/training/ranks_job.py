"""What the processes of one training are told: everything that `train_adapter` needs, as a JSON file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter

from deal_core.base_model.load import Precision
from deal_core.config import AdapterConfig, MethodConfig, TrainConfig
from deal_core.data.schema import TaskSchema


@dataclass(frozen=True, kw_only=True)
class TrainingJob:
    """The arguments of `train_adapter`, by reference; those of the same name mean the same.

    Attributes:
        base_source: As for `load_base`.
        base_sha256: The model that must be found there.
        cache_folder: As for `load_base`.
        precision: As for `load_base`.
        rows_file: Parquet file of the training rows.
    """

    base_source: str
    base_sha256: str
    cache_folder: Path
    precision: Precision = "auto"
    parent_folder: Path | None
    rows_file: Path
    task: TaskSchema
    old_tasks: tuple[TaskSchema, ...] = ()
    strategy: str
    adapter: AdapterConfig
    method: MethodConfig
    train: TrainConfig
    output_folder: Path
    checkpoint_folder: Path

    def write(self, path: Path) -> None:
        """Write it as JSON."""
        path.write_bytes(TypeAdapter(TrainingJob).dump_json(self, indent=2))

    @classmethod
    def read(cls, path: Path) -> TrainingJob:
        """Read what `write` wrote."""
        return TypeAdapter(cls).validate_json(path.read_bytes())
