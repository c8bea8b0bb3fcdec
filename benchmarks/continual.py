"""Continual learning on a folder of tasks: one strategy against another, same rows, same steps, paired.

    python -m benchmarks.continual --data FOLDER --order 1 --order 3 --seed 0 --seed 1

FOLDER holds tasks.json ({task: {instruction, labels}}) and TASK.train.jsonl / TASK.test.jsonl with rows of text and
label. Each cell (order, seed, strategy, settings) is one JSON file; cells already there are not run again.
"""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from datasets import disable_progress_bars
from pydantic import BaseModel, ConfigDict
from transformers.utils import logging as transformers_logging

from benchmarks.continual_cell import Cell, digest_of_tasks, run_cell
from benchmarks.continual_table import BASELINE, write_summary
from deal_core.config import AdapterConfig, MethodConfig, TrainConfig
from deal_core.errors import ConfigError
from deal_core.models import DEFAULT_BASE, load_base
from flows.spec import parse
from infra.settings import HomeSettings

ORDERS: dict[str, tuple[str, ...]] = {
    "1": ("dbpedia", "amazon", "yahoo", "agnews"),
    "2": ("dbpedia", "amazon", "agnews", "yahoo"),
    "3": ("yahoo", "amazon", "agnews", "dbpedia"),
}
PROTOCOL = {"max_prompt_tokens": 160, "checkpoint_steps": 0}
"""Where the benchmark's TrainConfig departs from the defaults."""


class Settings(BaseModel):
    """What every cell of a run shares."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    train: TrainConfig
    method: MethodConfig


def read_settings(train: str, method: str) -> Settings:
    """Return the settings with the fields of two JSON objects, parts of them nested, in place of the defaults.

    Raises:
        typer.BadParameter: A text is no JSON object, or does not fit.
    """
    try:
        values = {"train": {**PROTOCOL, **_json_object(train)}, "method": _json_object(method)}
        return parse(Settings, values, "settings")
    except ConfigError as error:
        raise typer.BadParameter(str(error)) from error


def _json_object(text: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{text!r} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{text!r} is no JSON object; give one such as {{}}.")
    return values


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
    method: Annotated[str, typer.Option(help="Changes to MethodConfig, as JSON.")] = "{}",
    last_only: Annotated[bool, typer.Option(help="Score after the last task alone: for choosing settings.")] = False,
    out: Annotated[Path, typer.Option(help="Folder of the cells.")] = Path("benchmarks/results/continual"),
    work: Annotated[Path, typer.Option(help="Folder for what cells share.")] = Path("benchmark-work"),
) -> None:
    """Run the cells that are missing, then write summary.json and summary.md beside them."""
    disable_progress_bars()
    transformers_logging.set_verbosity_error()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    loaded = load_base(base, HomeSettings().cache_dir)
    settings = read_settings(train, method)
    for name in strategy or [BASELINE, "deal"]:
        for each in order:
            tasks = ORDERS.get(each) or tuple(each.split(","))
            for number in seed:
                cell = Cell(
                    strategy=name,
                    order=each,
                    tasks=tasks,
                    seed=number,
                    rows=rows,
                    test_rows=(test_from, test_to),
                    last_only=last_only,
                    adapter=AdapterConfig(rank=rank),
                    train=replace(settings.train, seed=number),
                    method=None if name == BASELINE else settings.method,  # it reads none
                    base=f"{loaded.name} {loaded.sha256}",
                    data=digest_of_tasks(data, tasks),
                )
                path = out / f"{name}-{number}-{cell.digest()}.json"
                if path.is_file():
                    continue
                outcome = run_cell(loaded, cell, data=data, first_tasks=work / "first-tasks")
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps({"settings": cell.to_json(), **outcome}, indent=1) + "\n")
                typer.echo(f"{name}, order {each}, seed {number}: {path.name}", err=True)
    write_summary(out)


if __name__ == "__main__":
    typer.run(main)
