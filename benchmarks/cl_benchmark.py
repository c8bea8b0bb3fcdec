"""Write tasks in the layout of CL_Benchmark as the files that `benchmarks.compare` reads.

    python -m benchmarks.cl_benchmark CL_BENCHMARK OUT

CL_Benchmark has a folder FAMILY/TASK/ for every task, with labels.json, train.json and test.json (or dev.json), which
are lists of objects with sentence and label. Some of its files are sorted by label, so the rows are shuffled, in the
same way every time. The family gives the instruction.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Annotated, Any

import typer

from deal_core.data.reading.readers import read_rows
from deal_core.errors import DataValidationError

ORDER_SEED = 0
FAMILIES = {
    "TC": "What is the topic of the following paragraph? Choose one from the option.",
    "SC": "What is the sentiment of the following paragraph? Choose one from the option.",
    "NLI": 'What is the logical relationship between the "sentence 1" and the "sentence 2"? '
    "Choose one from the option.",
    "QQP": 'Whether the "first sentence" and the "second sentence" have the same meaning? Choose one from the option.',
    "BoolQA": "According to the following passage, is the question true or false? Choose one from the option.",
    "MultiRC": "According to the following passage and question, is the candidate answer true or false? "
    "Choose one from the option.",
    "WiC": "Given a word and two sentences, whether the word is used with the same sense in both sentence? "
    "Choose one from the option.",
    "COPA": "Which choice is the more plausible? Choose one from the option.",
}
"""Family of tasks → the benchmark's instruction for it."""


def convert(source: Path, out: Path) -> list[str]:
    """Write tasks.json, and TASK.train.jsonl and TASK.test.jsonl of every task; return the tasks.

    Raises:
        DataValidationError: A family is not known, or a file has other content.
    """
    tasks: dict[str, dict[str, Any]] = {}
    out.mkdir(parents=True, exist_ok=True)
    for home in sorted(path.parent for path in source.glob("*/*/train.json")):
        family, name = home.parent.name, home.name
        if family not in FAMILIES:
            raise DataValidationError(f"{home} is of family {family!r}; the families are {', '.join(FAMILIES)}.")
        tasks[name] = {"instruction": FAMILIES[family], "labels": json.loads((home / "labels.json").read_text())}
        test_file = home / "test.json" if (home / "test.json").is_file() else home / "dev.json"
        for part, file in (("train", home / "train.json"), ("test", test_file)):
            rows = [_row(file, row) for row in read_rows(file)]
            random.Random(ORDER_SEED).shuffle(rows)
            (out / f"{name}.{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (out / "tasks.json").write_text(json.dumps(tasks, indent=1) + "\n")
    return list(tasks)


def _row(file: Path, row: Any) -> dict[str, Any]:
    if row.fault is not None:
        raise DataValidationError(f"Row {row.number} (line {row.line}) of {file} cannot be read ({row.fault.why}).")
    if not {"sentence", "label"} <= row.values.keys():
        raise DataValidationError(f"Row {row.number} of {file} lacks 'sentence' or 'label'; give the row both.")
    return {"text": row.values["sentence"], "label": row.values["label"]}


def main(
    source: Annotated[Path, typer.Argument(help="Folder in the layout of CL_Benchmark.")],
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
) -> None:
    """Convert all tasks."""
    typer.echo(f"{', '.join(convert(source, out)) or 'no task'} written to {out}")


if __name__ == "__main__":
    typer.run(main)
