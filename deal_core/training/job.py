"""A training whose arguments can be written to a file, so that several processes can run it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset
from pydantic import TypeAdapter

from deal_core.base_model.load import BaseModel, Precision
from deal_core.data.schema import TaskSchema
from deal_core.strategies.strategy import TaskTexts
from deal_core.training.train import OtherRows, TrainingResult, TrainingSetup, train_adapter
from deal_core.training.trainer import OnLog


@dataclass(frozen=True, kw_only=True)
class TextsFile:
    """`TaskTexts` whose rows lie in a Parquet file."""

    task: TaskSchema
    file: Path
    max_prompt_tokens: int
    max_new_tokens: int

    def read(self) -> TaskTexts:
        """Return the texts. The rows stay on disk and are memory-mapped."""
        return TaskTexts(
            task=self.task,
            rows=read_rows(self.file),
            max_prompt_tokens=self.max_prompt_tokens,
            max_new_tokens=self.max_new_tokens,
        )


@dataclass(frozen=True, kw_only=True)
class TrainingJob:
    """The arguments of `train_adapter`, with files in place of rows.

    Attributes:
        base_source: As for `load_base`, like `cache_folder` and `precision`.
        base_sha256: Digest of the base model that `base_source` must hold.
        rows_file: Parquet file of the training rows.
        old_texts: Texts of old tasks that may be asked about.
    """

    base_source: str
    base_sha256: str
    cache_folder: Path
    precision: Precision = "auto"
    parent_folder: Path | None
    rows_file: Path
    old_texts: tuple[TextsFile, ...] = ()
    setup: TrainingSetup
    output_folder: Path
    checkpoint_folder: Path

    def write(self, path: Path) -> None:
        """Write the job as JSON."""
        path.write_bytes(TypeAdapter(TrainingJob).dump_json(self, indent=2))

    @classmethod
    def read(cls, path: Path) -> TrainingJob:
        """Read the job from a file of `write`."""
        return TypeAdapter(cls).validate_json(path.read_bytes())

    def run(self, base: BaseModel, on_log: OnLog | None = None) -> TrainingResult:
        """Do the job in this process; with several processes, each of them calls this."""
        return train_adapter(
            base,
            read_rows(self.rows_file),
            self.setup,
            parent_folder=self.parent_folder,
            others=OtherRows(old_texts=[each.read() for each in self.old_texts]),
            output_folder=self.output_folder,
            checkpoint_folder=self.checkpoint_folder,
            on_log=on_log,
        )


def read_rows(file: Path) -> Dataset:
    """Read rows from a Parquet file. They stay on disk and are memory-mapped."""
    return Dataset.from_parquet(str(file), cache_dir=str(file.parent))
