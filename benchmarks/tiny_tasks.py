"""A folder of small tasks that `benchmarks.compare` reads: for tests, and for what measures the chain alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

COLOURS_AND_SIZES = {"colours": ("red", "green"), "sizes": ("large", "small")}


def write_tasks(
    parent: Path, labels_of: Mapping[str, Sequence[str]] = COLOURS_AND_SIZES, *, num_train: int = 16, num_test: int = 8
) -> Path:
    """Write tasks as JSON lines: two labels that take turns, and stand in their texts. Return the folder."""
    folder = parent / "data"
    folder.mkdir()
    tasks = {name: {"instruction": f"Which of the {name}?", "labels": labels} for name, labels in labels_of.items()}
    (folder / "tasks.json").write_text(json.dumps(tasks))
    for name, labels in labels_of.items():
        for part, num_rows in (("train", num_train), ("test", num_test)):
            rows = [{"text": f"{part} {i} of {labels[i % 2]}", "label": labels[i % 2]} for i in range(num_rows)]
            (folder / f"{name}.{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
