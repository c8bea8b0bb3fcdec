"""Copy a benchmark's tasks with wrong labels among the training rows. Test rows stay as they are.

    python -m benchmarks.noisy_pool --data FOLDER --out noisy --task dbpedia --share 0.3

The copy has another digest than the tasks, so `python -m benchmarks.compare --data noisy` makes cells of its own.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.continual.suites import SuiteTask, load_suite


def corrupted(task: SuiteTask, share: float, seed: int) -> list[dict[str, Any]]:
    """The training rows, each with another label of the task with probability `share`; `was` has the right one."""
    generator = random.Random(f"{seed} {task.schema.name}")
    rows = []
    for row in task.train:
        others = [label for label in task.schema.labels if label != row["output"]]
        is_wrong = generator.random() < share and bool(others)
        label = generator.choice(others) if is_wrong else row["output"]
        rows.append({"text": row["input"], "label": label, **({"was": row["output"]} if is_wrong else {})})
    return rows


def main(
    data: Annotated[Path, typer.Option(help="Folder of tasks.")],
    out: Annotated[Path, typer.Option(help="Folder of the copy.")],
    task: Annotated[list[str], typer.Option(help="Tasks to copy.")],
    share: Annotated[float, typer.Option(help="Share of wrong labels.", min=0, max=1)] = 0.3,
    seed: Annotated[int, typer.Option(help="Decides which labels are wrong.")] = 0,
) -> None:
    """Write the copy."""
    suite = load_suite(data, tuple(task))
    out.mkdir(parents=True, exist_ok=True)
    described = {}
    for name, clean in suite.items():
        described[name] = {"instruction": clean.schema.instruction, "labels": list(clean.schema.labels)}
        test = [{"text": row["input"], "label": row["output"]} for row in clean.test]
        for part, rows in (("train", corrupted(clean, share, seed)), ("test", test)):
            lines = [json.dumps(row, ensure_ascii=False) for row in rows]
            (out / f"{name}.{part}.jsonl").write_text("\n".join([*lines, ""]), encoding="utf-8")
    (out / "tasks.json").write_text(json.dumps(described, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
