"""A folder of two small tasks for benchmarks that train."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.tiny_tasks import write_tasks

LABELS = {"dbpedia": ("red", "green"), "agnews": ("large", "small")}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder with two tasks of forty training rows."""
    return write_tasks(tmp_path, LABELS, num_train=40, num_test=12)
