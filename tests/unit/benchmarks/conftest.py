"""A folder of two small tasks for benchmarks that train."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

LABELS = {"dbpedia": ("red", "green"), "agnews": ("large", "small")}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder with two tasks of forty training rows."""
    folder = tmp_path / "data"
    folder.mkdir()
    tasks = {name: {"instruction": f"Which of {labels}?", "labels": labels} for name, labels in LABELS.items()}
    (folder / "tasks.json").write_text(json.dumps(tasks))
    for name, labels in LABELS.items():
        for part, num_rows in (("train", 40), ("test", 12)):
            rows = [{"text": f"{part} {i} of {labels[i % 2]}", "label": labels[i % 2]} for i in range(num_rows)]
            (folder / f"{name}.{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
