"""One cell of the continual benchmark: learn the tasks of an order one after another, score after each."""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset

from deal_core.adapter.state import adapter_on
from deal_core.config import AdapterConfig, EvaluateConfig, MethodConfig, TrainConfig
from deal_core.data.schema import TaskSchema
from deal_core.evaluate import match_references
from deal_core.models import BaseModel
from deal_core.train import train_adapter

SCHEMA_VERSION = 1
Rows = list[dict[str, str]]
Task = tuple[TaskSchema, Rows, Rows]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """Everything that decides a cell's figures; its digest names the file."""

    strategy: str
    order: str
    tasks: tuple[str, ...]
    seed: int
    rows: int
    test_rows: tuple[int, int]
    last_only: bool
    adapter: AdapterConfig
    train: TrainConfig
    method: MethodConfig | None
    base: str
    data: str

    def to_json(self) -> dict[str, Any]:
        """The cell as a dict of JSON types."""
        return json.loads(json.dumps({"schema_version": SCHEMA_VERSION, **asdict(self)}))

    def digest(self) -> str:
        """Twelve hexadecimal digits over all fields."""
        return _digest(self.to_json())

    def shares_first_task(self) -> bool:
        """Whether its first task is plain LoRA and nothing is kept from it beside the adapter."""
        method = self.method or MethodConfig()
        is_plain_deal = self.strategy == "deal" and method.deal.sides == "both" and method.rehearsal.texts != "stored"
        return self.strategy == "seq_lora" or is_plain_deal

    def first_task_digest(self) -> str:
        """Over what decides a first task that is shared."""
        return _digest([self.tasks[0], self.rows, asdict(self.adapter), asdict(self.train), self.base, self.data])


def digest_of_tasks(folder: Path, tasks: tuple[str, ...]) -> str:
    """Digest of the files of these tasks."""
    digest = hashlib.sha256()
    for name in sorted(tasks):
        for part in ("train", "test"):
            digest.update(f"{name}.{part}\0".encode() + (folder / f"{name}.{part}.jsonl").read_bytes())
    digest.update((folder / "tasks.json").read_bytes())
    return digest.hexdigest()


def load_task(folder: Path, name: str) -> Task:
    """Return a task's schema, training rows and test rows, as input and output."""
    described = json.loads((folder / "tasks.json").read_text())[name]
    schema = TaskSchema(name=name, labels=tuple(described["labels"]), instruction=described["instruction"])

    def rows(part: str) -> Rows:
        lines = (folder / f"{name}.{part}.jsonl").read_text().splitlines()
        return [{"input": row["text"].strip(), "output": row["label"].strip()} for row in map(json.loads, lines)]

    return schema, rows("train"), rows("test")


def run_cell(base: BaseModel, cell: Cell, *, data: Path, first_tasks: Path) -> dict[str, Any]:
    """Learn the tasks; return which test rows are right after each, and what the tasks after the first cost.

    A first task that is the same for several strategies is trained and scored once and shared through `first_tasks`.
    """
    tasks = [load_task(data, name) for name in cell.tasks]
    method = cell.method or MethodConfig()
    correct: list[dict[str, str]] = []
    notes: list[list[str]] = []
    seconds = {"train": 0.0, "evaluate": 0.0}
    with tempfile.TemporaryDirectory() as work:
        parent: Path | None = None
        for t, (schema, train_rows, _) in enumerate(tasks):
            is_shared = t == 0 and cell.shares_first_task()
            folder = first_tasks / cell.first_task_digest() if is_shared else Path(work) / f"{t}"
            if not (folder / "method.json").is_file():
                result = train_adapter(
                    base,
                    parent_folder=parent,
                    rows=Dataset.from_list(train_rows[: cell.rows]),
                    task=schema,
                    strategy=cell.strategy,
                    adapter=cell.adapter,
                    method=method,
                    train=cell.train,
                    output_folder=folder,
                    checkpoint_folder=Path(work) / "checkpoints",
                    old_tasks=[old for old, _, _ in tasks[:t]],
                )
                if t > 0:
                    seconds["train"] += result.seconds
                    notes.append(list(result.notes))
            parent = folder
            if cell.last_only and t < len(tasks) - 1:
                continue
            started = time.perf_counter()
            correct.append(_score(base, folder, tasks[: t + 1], cell, keep=is_shared))
            seconds["evaluate"] += time.perf_counter() - started if t > 0 else 0.0
    return {"correct": correct, "seconds_after_first_task": seconds, "notes": notes}


def _score(base: BaseModel, folder: Path, tasks: list[Task], cell: Cell, *, keep: bool) -> dict[str, str]:
    """For every task a string of 0 and 1, one per test row; kept beside a shared adapter."""
    first, after_last = cell.test_rows
    kept = folder / f"correct-{first}-{after_last}.json"
    if keep and kept.is_file():
        return dict(json.loads(kept.read_text()))
    scores = {}
    limit = cell.train.max_prompt_tokens
    with adapter_on(base.model, folder) as model:
        for schema, _, test_rows in tasks:
            rows = Dataset.from_list(test_rows[first:after_last])
            matches = match_references(model, base.tokenizer, schema, rows, EvaluateConfig(), max_prompt_tokens=limit)
            scores[schema.name] = "".join(str(int(is_match)) for is_match in matches)
    if keep:
        kept.write_text(json.dumps(scores))
    return scores


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]
