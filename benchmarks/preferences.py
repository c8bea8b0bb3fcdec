"""What the learning rate of preferences (DPO) does: preferred answers, and plain English that is lost.

    OMP_NUM_THREADS=1 python -m benchmarks.preferences

The pairs are made of the work orders of examples/repairs: the better answer says when somebody may come, the worse one
is the same order without it. Each rate is a first arrival, on the test rows of the example.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import typer
from datasets import Dataset, disable_progress_bars

from benchmarks.method.versions import train_into
from benchmarks.output import RESULTS, Base, Out, write_result
from deal_core.adapter.state import adapter_on
from deal_core.base_model.load import load_base
from deal_core.base_model.sources import DEFAULT_BASE
from deal_core.config import AdapterConfig, TrainConfig
from deal_core.data.schema import TaskSchema
from deal_core.evaluation.answering import ServedTask
from deal_core.evaluation.evaluate import evaluate_task
from deal_core.general.perplexity import perplexity
from deal_core.method_config import MethodConfig
from deal_core.training.train import TrainingSetup
from infra.settings import HomeSettings

ROWS = Path(__file__).parents[1] / "examples" / "repairs" / "messages.jsonl"
RATES = (1e-4, 3e-4, 1e-3)
TASK = TaskSchema(
    name="orders",
    format="completion",
    metric="preference",
    learns_preferences=True,
    instruction="Write a work order of one sentence about the following message of a tenant.",
)
TRAIN = TrainConfig(max_prompt_tokens=192, max_answer_tokens=40, checkpoint_steps=0)
ASKED = ServedTask(schema=TASK, max_prompt_tokens=TRAIN.max_prompt_tokens, max_new_tokens=40)


def pairs(split: str) -> Dataset:
    """The orders of a split that end with the tenant's times, each with the same order without them."""
    rows = []
    for line in ROWS.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        order, separator, _ = row["work_order"].partition(";")
        if separator and row["split"] == split:
            rows.append({"input": row["message"], "output": row["work_order"], "rejected": f"{order}."})
    return Dataset.from_list(rows)


def main(
    base: Base = DEFAULT_BASE,
    out: Out = RESULTS / "preferences.json",
) -> None:
    """Learn with every rate, and write the figures."""
    disable_progress_bars()
    model, train_rows, test_rows = load_base(base, HomeSettings().cache_dir), pairs("train"), pairs("test")
    before = perplexity(model.model, model.tokenizer)
    figures: list[dict[str, Any]] = []
    for rate in RATES:
        setup = TrainingSetup(
            task=TASK,
            strategy="deal",
            adapter=AdapterConfig(),
            method=MethodConfig(),
            train=replace(TRAIN, preference_learning_rate=rate),
        )
        with TemporaryDirectory() as folder:
            adapter = Path(folder) / "adapter"
            result = train_into(adapter, model, train_rows, setup)
            with adapter_on(model.model, adapter) as version:
                judged = evaluate_task(version, model.tokenizer, ASKED, test_rows)
                ratio = perplexity(version, model.tokenizer) / before
        figures.append(
            {
                "rate": rate,
                "preferred": judged.accuracy,
                "perplexity_ratio": ratio,
                "loss": result.losses[-1][1],
                "steps": result.num_steps,
            }
        )
        typer.echo(str(figures[-1]))
    write_result(out, {"base": model.name, "train": len(train_rows), "test": len(test_rows), "rates": figures})


if __name__ == "__main__":
    typer.run(main)
