"""The digests of inputs that have landed."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from deal_core.config import DataConfig
from deal_core.data.dataset import Landing, build_dataset
from deal_core.data.schema import TaskSchema
from deal_core.data.source_files import files_at
from infra.store.local import FileStore
from tasks.landed_inputs import inputs_of_dataset

Damage = Callable[[random.Random, bytes], bytes]


def flip(chance: random.Random, content: bytes) -> bytes:
    place = chance.randrange(len(content))
    return content[:place] + bytes([content[place] ^ (1 << chance.randrange(8))]) + content[place + 1 :]


def cut(chance: random.Random, content: bytes) -> bytes:
    return content[: chance.randrange(len(content))]


def blank(chance: random.Random, content: bytes) -> bytes:
    place = chance.randrange(len(content))
    size = chance.randrange(1, 64)
    return content[:place] + bytes(size) + content[place + size :]


@pytest.mark.parametrize("damage", [flip, cut, blank])
def test_damaged_rows_are_unknown_and_never_read_as_others(tmp_path: Path, damage: Damage) -> None:
    """Other digests would name other answers, and the answers to the damaged rows would count as searched for."""
    rows = [{"text": f"text number {number}", "label": ("dog", "cat")[number % 2]} for number in range(60)]
    (tmp_path / "pets.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = TaskSchema(name="pets", labels=("dog", "cat"))
    manifest = build_dataset(
        Landing(sources=files_at(tmp_path / "pets.jsonl"), task=task, config=DataConfig()), tmp_path / "dataset"
    )
    content, store = (tmp_path / "dataset" / "train.parquet").read_bytes(), FileStore(tmp_path / "store")
    key = f"datasets/pets/{manifest.sha256}/l/s/train.parquet"

    def read(stored: bytes) -> set[str] | None:
        store.put_bytes(key, stored)
        ((name, inputs),) = inputs_of_dataset(store, manifest.task, manifest.sha256)
        assert name == key
        return inputs

    whole = read(content)
    assert whole is not None and len(whole) == manifest.num_train
    chance, num_unknown = random.Random(1), 0
    for _ in range(200):
        inputs = read(damage(chance, content))
        num_unknown += inputs is None
        assert inputs is None or inputs == whole
    assert num_unknown
