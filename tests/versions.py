"""Versions and runs of lineage `l`, as its store has them."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from infra.promotions import Change, Move, PromotionLog
from infra.run_journal import Run
from infra.store import keys
from infra.store.base import ObjectStore
from infra.versions import UNREGISTERED, Since, Version

CREATED = datetime(2020, 5, 30, tzinfo=UTC)


def run_key(number: int) -> str:
    """The key of a run. Its short key ends with the number."""
    return f"{number:016d}" + "0" * 48


def version(number: int, parent: int | None = None, **changes: Any) -> Version:
    """A version that was rejected, unless the changes say otherwise. They may name fields of `Since`."""
    since = {name: changes.pop(name) for name in set(Since.model_fields) & changes.keys()}
    values: dict[str, Any] = {
        "lineage": "l",
        "version": str(number),
        "created": CREATED,
        "task": "t",
        "parent_version": None if parent is None else str(parent),
        "run_key": run_key(number),
        "strategy": "deal",
        "base_sha256": "b",
        "dataset_sha256": "d",
        "landed_sha256": f"landed {number}",
        "config_sha256": "c",
        "adapter_uri": f"adapters/l/{number:016d}",
        "adapter_sha256": "a",
        "files_sha256": {},
        "accepted": False,
        "train_seconds": 1.0,
        "average_accuracy": None,
        "forgetting": None,
        "backward_transfer": None,
        "forward_transfer": None,
        "accuracies": {},
        "since": Since(**since),
    }
    return Version(**{**values, **changes})


def unregistered(number: int, parent: int | None = None, **changes: Any) -> Version:
    """A version to register. `number` makes its run key."""
    return version(number, parent, **changes).model_copy(update={"version": UNREGISTERED})


def put_version(store: ObjectStore, stored: Version) -> str:
    """Store a version under its own number; return its key."""
    key = keys.version_key(stored.lineage, int(stored.version))
    store.put_bytes(key, stored.model_dump_json().encode())
    return key


def move(store: ObjectStore, version: str, action: str = "promoted", **changes: Any) -> Move:
    """Add a move to the promotion log of lineage `l`."""
    log = PromotionLog(store)
    last = log.last("l")
    champion = last.champion if last else None
    values: dict[str, Any] = {
        "action": action,
        "lineage": "l",
        "version": version,
        "before": champion,
        "champion": version if action in ("promoted", "rolled back") else champion,
        "who": "gate",
        "why": "a test",
        "run": "r",
    }
    made = log.add(last, Change(**{**values, **changes}))
    assert made is not None
    return made


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
