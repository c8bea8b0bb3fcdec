"""How many wrong labels `selection.noise` finds: precision and recall on tasks whose labels were made wrong.

    OMP_NUM_THREADS=1 python -m benchmarks.label_noise --data FOLDER

A share of a task's labels is replaced by another label of the task, see `benchmarks.noisy_pool`. The base model reads
the rows once, since their texts stay the same.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from datasets import Dataset, disable_progress_bars

from benchmarks.noisy_pool import corrupted
from benchmarks.output import write_result
from deal_core.base_model.load import load_base
from deal_core.benchmark.suites import load_suite
from deal_core.config import EvaluateConfig, TrainConfig
from deal_core.selection.label_noise import features, suspected_labels
from infra.settings import HomeSettings

OUT = Path(__file__).parent / "results" / "label_noise.json"
SHARES = (0.0, 0.1, 0.3)


def found_in(features_ND: Any, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Figures of one task with wrong labels: how many rows are suspected, and how many of these are wrong."""
    checked = suspected_labels(features_ND, [row["label"] for row in rows], seed=0)
    wrong = {number for number, row in enumerate(rows) if "was" in row}
    num_right = sum(each.row in wrong for each in checked.suspects)
    return {
        "wrong": len(wrong), "suspected": len(checked.suspects), "suspected_and_wrong": num_right,
        "agreement": checked.agreement, "skill": checked.skill,
    }  # fmt: skip


def main(
    data: Annotated[Path, typer.Option(help="Folder of tasks.")],
    task: Annotated[list[str] | None, typer.Option(help="Tasks.", show_default="agnews, dbpedia, amazon")] = None,
    rows: Annotated[int, typer.Option(help="Training rows per task; the first rows are used.")] = 300,
    base: Annotated[str, typer.Option(help="Base model.")] = "smollm2-135m-instruct",
    out: Annotated[Path, typer.Option(help="File of the figures.")] = OUT,
) -> None:
    """Measure each task with each share of wrong labels, and write the figures."""
    disable_progress_bars()
    names = tuple(task or ("agnews", "dbpedia", "amazon"))
    suite, model = load_suite(data, names), load_base(base, HomeSettings().cache_dir)
    figures = {}
    for name in names:
        inputs = Dataset.from_list(list(suite[name].train[:rows]))["input"]
        features_ND = features(
            model.model, model.tokenizer, suite[name].schema, inputs,
            max_prompt_tokens=TrainConfig().max_prompt_tokens, max_batch_tokens=EvaluateConfig().max_batch_tokens,
        )  # fmt: skip
        figures[name] = {str(share): found_in(features_ND, corrupted(suite[name], share, 0)[:rows]) for share in SHARES}
        typer.echo(f"{name}: {figures[name]}")
    write_result(out, {"base": model.name, "rows": rows, "tasks": figures})


if __name__ == "__main__":
    typer.run(main)
