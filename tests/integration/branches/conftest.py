"""Small tasks, and a lineage that has learned three of them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from deal_core.adapter.files import ADAPTER_FILES
from flows.branch import BranchResult
from flows.relearn import relearn
from infra.store.opening import open_store
from infra.versions import Version, Versions
from tests.adapting import run
from tests.conftest import MakeOnce
from tests.integration.conftest import NO_MLFLOW

LABELS = ("warm", "cold")
TASKS = ("taps", "beds", "cars")
SETTINGS: dict[str, Any] = {"strategy": "deal", "rehearsal": {"rows": 50}}


def small_task(folder: Path, name: str, part: str = "") -> dict[str, Any]:
    """A task of 32 rows with two labels, every fifth a test row. Another `part` has other rows."""
    file = folder / f"{name}{part}.jsonl"
    rows = [
        {
            "text": f"{name}{part} {n}: the {('red', 'blue')[n % 2]} one",
            "label": LABELS[n % 2],
            "split": "train" if n % 5 else "test",
        }
        for n in range(32)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"name": name, "data": str(file), "instruction": "Which?", "labels": list(LABELS)}


def champion() -> Version:
    """The champion of lineage `l`."""
    version = Versions(open_store()).champion("l")
    assert version is not None
    return version


def adapter(version: Version) -> dict[str, bytes]:
    """The weights, the configuration and the method's state of a version, as bytes."""
    store = open_store()
    places = {name: f"{version.adapter_uri}/{name}" for name in ADAPTER_FILES}
    found = {name: store.get_bytes(key) for name, key in places.items() if store.exists(key)}
    assert len(found) >= 2
    return found


def delete(task: str, **options: Any) -> BranchResult:
    """Delete the only arrival of a task, and relearn."""
    arrival = next(version for version in Versions(open_store()).all("l") if version.task == task)
    return asyncio.run(relearn("l", arrival.dataset_sha256, who="tester", **options))


def learn_tasks(folder: Path, base: Path, tasks: Sequence[str] = TASKS, **settings: Any) -> None:
    """Let lineage `l` of the home in a folder learn tasks; its settings are those of `three_tasks` otherwise."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", NO_MLFLOW)
        for name in tasks:
            assert run(base, small_task(folder, name), **{**SETTINGS, **settings}).status == "promoted"


@pytest.fixture(scope="session")
def three_tasks(tiny_base: Path, home_made_once: MakeOnce) -> Path:
    """A home whose lineage `l` has learned taps, beds and cars, from files in its folder."""
    return home_made_once("three-tasks-deal-50", lambda folder: learn_tasks(folder, tiny_base))


@pytest.fixture
def learned(three_tasks: Path, copy_to_home: Callable[[Path], Path], without_mlflow: None) -> Path:
    """A copy of `three_tasks`, whose arrivals' files are still in the original."""
    return copy_to_home(three_tasks)
