"""An arrival of many rows of which few are trained on: seconds and peak memory, on the tests' tiny base model.

    OMP_NUM_THREADS=1 python -m benchmarks.selection

Each number of rows is measured in a process of its own: a lineage has learned a first task, and an arrival of that many
generated rows is its second. A share of it is chosen by a score and learned. The tiny base shows what rows cost besides
the model; a real base adds its weights and its activations, which do not depend on the number of rows.
"""

from __future__ import annotations

import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import typer
from datasets import Dataset, disable_progress_bars

from benchmarks.ingest import CHUNK_ROWS, TASK, text_of
from benchmarks.output import alone, write_result
from benchmarks.tiny_base import build_tiny_base
from deal_core.base_model.load import BaseModel, load_base
from deal_core.config import AdapterConfig, TrainConfig
from deal_core.method_config import MethodConfig, SelectionConfig
from deal_core.selection.choose import choose_rows
from deal_core.training.train import TrainingSetup, train_adapter

OUT = Path(__file__).parent / "results" / "selection.json"
TRAIN = TrainConfig(num_epochs=1, max_prompt_tokens=96, checkpoint_steps=0)
FIRST_ROWS = 200


def write_rows(path: Path, num_rows: int) -> None:
    """Write generated rows as ingest stores them, a chunk at a time."""
    schema = pa.schema([("input", pa.string()), ("output", pa.string()), ("sha256", pa.string())])

    def rows(first: int) -> Iterator[dict[str, str]]:
        for number in range(first, min(first + CHUNK_ROWS, num_rows)):
            label = TASK.labels[number % len(TASK.labels)]
            yield {"input": text_of(number), "output": label, "sha256": f"{number:064x}"}

    with pq.ParquetWriter(path, schema) as writer:
        for first in range(0, num_rows, CHUNK_ROWS):
            writer.write_table(pa.Table.from_pylist(list(rows(first)), schema))


def choose_and_train(num_rows: int, score: str, keep: float, max_scored: int) -> dict[str, Any]:
    """Let a lineage of one task learn the chosen rows of a second arrival; return what it took."""
    disable_progress_bars()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        build_tiny_base(folder / "base")
        base = load_base(str(folder / "base"), folder / "cache", precision="fp32")
        method = MethodConfig(selection=SelectionConfig(keep=keep, score=score, max_scored=max_scored))
        setup = TrainingSetup(task=TASK, strategy="deal", adapter=AdapterConfig(), method=method, train=TRAIN)
        write_rows(folder / "first.parquet", FIRST_ROWS)
        write_rows(folder / "rows.parquet", num_rows)
        first = Dataset.from_parquet(str(folder / "first.parquet"), cache_dir=str(folder / "first-rows"))
        _train(base, first, setup, None, folder / "first")
        before, started = peak_bytes(), time.perf_counter()
        rows = Dataset.from_parquet(str(folder / "rows.parquet"), cache_dir=str(folder / "rows"))
        chosen = choose_rows(
            rows, setup, lambda: base, parent_folder=folder / "first", journal=folder / "selection.json"
        )
        selected = time.perf_counter()
        result = _train(base, rows.select(chosen.rows), setup, folder / "first", folder / "second")
        return {
            "rows": num_rows, "chosen": len(chosen.rows), "steps": result.num_steps, "notes": list(chosen.notes),
            "seconds": {"choose": selected - started, "train": time.perf_counter() - selected},
            "peak_bytes": {"before": before, "after": peak_bytes()},
        }  # fmt: skip


def _train(base: BaseModel, rows: Dataset, setup: TrainingSetup, parent: Path | None, out: Path) -> Any:
    return train_adapter(
        base, rows, setup, parent_folder=parent, output_folder=out,
        checkpoint_folder=out.with_name(f"{out.name}-checkpoints"),
    )  # fmt: skip


def peak_bytes() -> int:
    """The largest memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main(
    rows: Annotated[list[int] | None, typer.Option(help="Rows of the arrival.", show_default="10000, 100000")] = None,
    score: Annotated[str, typer.Option(help="Score to choose by.")] = "loss",
    keep: Annotated[float, typer.Option(help="Share of the rows that is trained on.")] = 0.01,
    max_scored: Annotated[int, typer.Option(help="Most rows that the model reads.")] = 20_000,
    out: Annotated[Path, typer.Option(help="File of the figures.")] = OUT,
) -> None:
    """Measure each number of rows and write the figures."""
    sizes = rows or [10_000, 100_000]
    runs = [alone(choose_and_train, size, score, keep, max_scored) for size in sizes]
    write_result(out, {"score": score, "keep": keep, "max_scored": max_scored, "runs": runs})


if __name__ == "__main__":
    typer.run(main)
