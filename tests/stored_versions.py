"""Versions and runs in a store, made without a training."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from deal_core.config import AdapterConfig
from deal_core.data.schema import TaskSchema
from deal_core.evaluation.accuracy_matrix import AccuracyMatrix
from infra.outcomes import Action
from infra.promotions import ENDING, Change, Move, PromotionLog
from infra.run_journal import Run
from infra.store import keys
from infra.store.base import ObjectStore
from infra.store.stored import write_stored
from infra.versions import UNREGISTERED, Since, Version, Versions
from tasks.lineage.record import FrozenRows, KnownTask, LineageRecord
from tasks.references import BaseRef

CREATED = datetime(2020, 5, 30, tzinfo=UTC)

VERSION = Version(
    lineage="l",
    task="bank",
    parent_version=None,
    run_key="",
    strategy="deal",
    base_sha256="b" * 64,
    dataset_sha256="d" * 64,
    landed_sha256="e" * 64,
    config_sha256="c" * 64,
    adapter_uri="",
    adapter_sha256="",
    files_sha256={},
    accepted=True,
    train_seconds=1.0,
    average_accuracy=0.5,
    forgetting=None,
    backward_transfer=None,
    forward_transfer=None,
    accuracies={"bank": 0.5},
)


def store_version(
    store: ObjectStore, files: Mapping[str, bytes], lineage: str = "l", *, uri: str | None = None, **changes: Any
) -> Version:
    """Store the files of an adapter by name, and register its version, which its gate accepted.

    `uri` is the adapter's folder in the store; None: the one that its run would have.
    """
    run_key = hashlib.sha256(f"{lineage} {len(Versions(store).all(lineage))}".encode()).hexdigest()
    uri = uri or keys.adapter_uri(lineage, keys.short_run(run_key))
    for name, content in files.items():
        store.put_bytes(f"{uri}/{name}", content)
    own = {
        "lineage": lineage,
        "run_key": run_key,
        "landed_sha256": run_key,
        "adapter_uri": uri,
        "adapter_sha256": run_key,
        "files_sha256": {name: (hashlib.sha256(content).hexdigest(),) for name, content in files.items()},
    }
    return Versions(store).register(VERSION.model_copy(update={**own, **changes}))


def move(store: ObjectStore, version: str, action: Action = "promoted", lineage: str = "l", **changes: Any) -> Move:
    """Write a move to the promotion log."""
    log = PromotionLog(store)
    last = log.last(lineage)
    before = last.champion if last else None
    change = Change(
        action=action,
        lineage=lineage,
        version=version,
        before=before,
        **{"champion": version if action in ENDING else before, "who": "Ada", "why": "a test", **changes},
    )
    written = log.add(last, change)
    assert written is not None
    return written


def run_key(number: int) -> str:
    """The key of a run. Its short key ends with the number."""
    return f"{number:016d}" + "0" * 48


def version(number: int, parent: int | None = None, **changes: Any) -> Version:
    """A version that its gate rejected, unless the changes say otherwise. They may name fields of `Since`."""
    own = {
        "version": str(number),
        "created": CREATED,
        "parent_version": None if parent is None else str(parent),
        "run_key": run_key(number),
        "landed_sha256": f"{number:064d}",
        "adapter_uri": keys.adapter_uri("l", keys.short_run(run_key(number))),
        "accepted": False,
        "since": Since(**{name: changes.pop(name) for name in set(Since.model_fields) & changes.keys()}),
    }
    return VERSION.model_copy(update={**own, **changes})


def unregistered(number: int, parent: int | None = None, **changes: Any) -> Version:
    """A version to register. `number` makes its run key."""
    return version(number, parent, **changes).model_copy(update={"version": UNREGISTERED})


def put_version(store: ObjectStore, stored: Version) -> str:
    """Store a version under its own number; return its key."""
    key = keys.version_key(stored.lineage, int(stored.version))
    write_stored(store, key, stored)
    return key


def run(number: int, parent: int | None = None, **changes: Any) -> Run:
    """A run that has failed, unless the changes say otherwise."""
    values: dict[str, Any] = {
        "lineage": "l",
        "task": "t",
        "run_key": run_key(number),
        "dataset_uri": "datasets/t/d/l/s",
        "dataset_sha256": "d",
        "num_rows": {"train": 9, "test": 3, "rejected": 0},
        "base_sha256": "b",
        "parent_version": None if parent is None else str(parent),
        "params": {},
        "state": "failed",
        "started": CREATED,
    }
    return Run(**{**values, **changes})


def known_task(schema: TaskSchema, uri: str = "d", num_rows: int = 9) -> KnownTask:
    """A task that a version knows, with the dataset that judges it."""
    tests = (FrozenRows(dataset_uri=uri, num_rows=num_rows),)
    return KnownTask(schema=schema, tests=tests, max_prompt_tokens=9, max_new_tokens=9)


def lineage_record(*tasks: KnownTask) -> LineageRecord:
    """The record of a version of lineage `l` that knows these tasks."""
    return LineageRecord(
        lineage="l",
        base=BaseRef(source="b", name="b", sha256="b"),
        strategy="deal",
        adapter=AdapterConfig(),
        tasks=tasks,
        matrix=AccuracyMatrix(),
    )
