"""Versions in a store, made without a training."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from infra.promotions import ENDING, Action, Change, Move, PromotionLog
from infra.store import keys
from infra.store.base import ObjectStore
from infra.versions import Version, Versions

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
        champion=version if action in ENDING else before,
        who="Ada",
        why="a test",
        **changes,
    )
    written = log.add(last, change)
    assert written is not None
    return written
