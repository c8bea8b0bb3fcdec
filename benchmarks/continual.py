"""Continual learning on a folder of tasks: one strategy against another, same rows, same steps, paired.

    python -m benchmarks.continual --data FOLDER --order 1 --order 3 --seed 0 --seed 1

FOLDER holds tasks.json ({task: {instruction, labels}}) and TASK.train.jsonl / TASK.test.jsonl with rows of text and
label. Each cell (order, seed, strategy, settings) is one JSON file; cells already there are not run again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from datasets import Dataset, disable_progress_bars
from transformers.utils import logging as transformers_logging

from benchmarks.continual_table import write_summary
from deal_core.adapter.state import adapter_on
from deal_core.config import AdapterConfig, DealConfig, EvaluateConfig, TrainConfig
from deal_core.data.schema import TaskSchema
from deal_core.evaluate import match_references
from deal_core.models import DEFAULT_BASE, BaseModel, load_base
from deal_core.train import train_adapter
from infra.settings import HomeSettings

ORDERS: dict[str, tuple[str, ...]] = {
    "1": ("dbpedia", "amazon", "yahoo", "agnews"),
    "2": ("dbpedia", "amazon", "agnews", "yahoo"),
    "3": ("yahoo", "amazon", "agnews", "dbpedia"),
}
SCHEMA_VERSION = 1


def load_task(folder: Path, name: str) -> tuple[TaskSchema, list[dict[str, str]], list[dict[str, str]]]:
    """Return a task's schema, training rows and test rows, as input and output."""
    described = json.loads((folder / "tasks.json").read_text())[name]
    schema = TaskSchema(name=name, labels=tuple(described["labels"]), instruction=described["instruction"])

    def rows(part: str) -> list[dict[str, str]]:
        lines = (folder / f"{name}.{part}.jsonl").read_text().splitlines()
        return [{"input": row["text"].strip(), "output": row["label"].strip()} for row in map(json.loads, lines)]

    return schema, rows("train"), rows("test")


def run_cell(
    base: BaseModel,
    *,
    data: Path,
    tasks: tuple[str, ...],
    strategy: str,
    num_rows: int,
    test_slice: slice,
    adapter: AdapterConfig,
    deal: DealConfig,
    train: TrainConfig,
    first_tasks: Path,
    last_only: bool = False,
) -> dict[str, Any]:
    """Learn the tasks one after another; return the raw matrix R[t][i] row by row, with what it cost.

    The first task is plain LoRA for every strategy, so its adapter is trained once and shared through `first_tasks`.
    """
    loaded = {name: load_task(data, name) for name in tasks}
    correct: list[dict[str, str]] = []
    notes: list[list[str]] = []
    seconds = {"train": 0.0, "evaluate": 0.0}
    steps = 0
    with tempfile.TemporaryDirectory() as work:
        parent: Path | None = None
        for t, name in enumerate(tasks):
            schema, train_rows, _ = loaded[name]
            is_shared = t == 0 and deal.sides == "both"
            key = json.dumps([name, num_rows, asdict(adapter), asdict(train), base.sha256])
            folder = first_tasks / hashlib.sha256(key.encode()).hexdigest()[:16] if is_shared else Path(work) / f"{t}"
            if not (folder / "method.json").is_file():
                result = train_adapter(
                    base,
                    parent_folder=parent,
                    rows=Dataset.from_list(train_rows[:num_rows]),
                    task=schema,
                    strategy=strategy,
                    adapter=adapter,
                    deal=deal,
                    train=train,
                    output_folder=folder,
                    checkpoint_folder=Path(work) / "checkpoints",
                )
                seconds["train"] += result.seconds
                steps += result.num_steps
                notes.append(list(result.notes))
            parent = folder
            if last_only and t < len(tasks) - 1:
                continue
            started = time.perf_counter()
            known = folder / f"correct-{test_slice.start}-{test_slice.stop}.json"
            if is_shared and known.is_file():
                correct.append(json.loads(known.read_text()))
            else:
                correct.append(_score(base, folder, [loaded[seen] for seen in tasks[: t + 1]], test_slice, train))
            if is_shared:
                known.write_text(json.dumps(correct[0]))
            seconds["evaluate"] += time.perf_counter() - started
    return {"tasks": list(tasks), "correct": correct, "steps": steps, "seconds": seconds, "notes": notes}


def _score(
    base: BaseModel, folder: Path | None, tasks: list[Any], test_slice: slice, train: TrainConfig
) -> dict[str, str]:
    """For every task a string of 0 and 1, one per test row."""
    scores = {}
    with adapter_on(base.model, folder) as model:
        for schema, _, test_rows in tasks:
            rows = Dataset.from_list(test_rows[test_slice])
            matches = match_references(
                model, base.tokenizer, schema, rows, EvaluateConfig(), max_prompt_tokens=train.max_prompt_tokens
            )
            scores[schema.name] = "".join(str(int(is_match)) for is_match in matches)
    return scores


def _override(config: Any, changes: dict[str, Any]) -> Any:
    fields = asdict(config)
    unknown = sorted(set(changes) - set(fields))
    if unknown:
        raise typer.BadParameter(f"{type(config).__name__} has no {', '.join(unknown)}; it has {', '.join(fields)}.")
    return replace(config, **{k: tuple(v) if isinstance(v, list) else v for k, v in changes.items()})


def main(
    data: Annotated[Path, typer.Option(help="Folder of tasks.", exists=True, file_okay=False)],
    order: Annotated[list[str], typer.Option(help=f"Order of tasks: {', '.join(ORDERS)}, or names with commas.")],
    seed: Annotated[list[int], typer.Option(help="Seed of initialisation and row order.")],
    strategy: Annotated[list[str] | None, typer.Option(help="Strategies to compare.")] = None,
    rows: Annotated[int, typer.Option(help="Training rows per task.")] = 300,
    test_from: Annotated[int, typer.Option(help="First test row.")] = 200,
    test_to: Annotated[int, typer.Option(help="Test row after the last.")] = 500,
    rank: Annotated[int, typer.Option(help="Rank of the adapter.")] = 16,
    base: Annotated[str, typer.Option(help="Base model.")] = DEFAULT_BASE,
    train: Annotated[str, typer.Option(help="Changes to TrainConfig, as JSON.")] = "{}",
    deal: Annotated[str, typer.Option(help="Changes to DealConfig, as JSON.")] = "{}",
    last_only: Annotated[bool, typer.Option(help="Score after the last task alone: for choosing settings.")] = False,
    out: Annotated[Path, typer.Option(help="Folder of the cells and the summary.")] = Path(
        "benchmarks/results/continual"
    ),
    work: Annotated[Path, typer.Option(help="Folder for what cells share.")] = Path("benchmark-work"),
) -> None:
    """Run the cells that are missing, then write summary.json and summary.md."""
    disable_progress_bars()
    transformers_logging.set_verbosity_error()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    loaded: BaseModel | None = None
    for name in strategy or ["seq_lora", "deal"]:
        for each in order:
            for number in seed:
                train_config = _override(TrainConfig(max_prompt_tokens=160, checkpoint_steps=0), json.loads(train))
                settings = {
                    "schema_version": SCHEMA_VERSION,
                    "strategy": name,
                    "order": each,
                    "seed": number,
                    "rows": rows,
                    "test_rows": [test_from, test_to],
                    "last_only": last_only,
                    "adapter": asdict(AdapterConfig(rank=rank)),
                    "train": asdict(replace(train_config, seed=number)),
                    "deal": asdict(_override(DealConfig(), json.loads(deal))) if name == "deal" else None,
                }
                digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
                path = out / f"{name}-{each}-{number}-{digest}.json"
                if path.is_file():
                    continue
                loaded = loaded or load_base(base, HomeSettings().cache_dir)
                cell = run_cell(
                    loaded,
                    data=data,
                    tasks=ORDERS.get(each) or tuple(each.split(",")),
                    strategy=name,
                    num_rows=rows,
                    test_slice=slice(test_from, test_to),
                    adapter=AdapterConfig(rank=rank),
                    deal=_override(DealConfig(), json.loads(deal)),
                    train=replace(train_config, seed=number),
                    first_tasks=work / "first-tasks",
                    last_only=last_only,
                )
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps({"settings": settings, "base": loaded.name, **cell}, indent=1) + "\n")
                typer.echo(f"{path.name}: AA {_average(cell):.1f}, {sum(cell['seconds'].values()):.0f} s", err=True)
    write_summary(out)


def _average(cell: dict[str, Any]) -> float:
    last = cell["correct"][-1]
    return 100 * sum(bits.count("1") / len(bits) for bits in last.values()) / len(last)


if __name__ == "__main__":
    typer.run(main)
