"""The demo: three example domains arrive one after another, and one adapter learns each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict

from deal_core.errors import ConfigError
from flows.results import AdaptResult, Scores
from flows.spec import AdaptSpec, LineageSpec, TaskFields, read_spec
from flows.watch import WatchResult, watch
from infra.object_store import ObjectStore
from infra.registry import open_registry
from tasks.inbox import INBOX, TASK_FILE
from tasks.progress import reporter
from tasks.record import read_record
from tasks.services import current_store

ORDER = ("bank", "clinic", "parcels")
POLL_SECONDS = 0.2


class LineageOutcome(BaseModel):
    """What one lineage of the demo came to."""

    model_config = ConfigDict(frozen=True)

    lineage: str
    strategy: str
    champion: str | None
    """Its version that serves; None: nothing passed the gate."""
    matrix: dict[str, Any] | None
    """The champion's accuracy matrix."""
    scores: Scores | None
    runs: tuple[AdaptResult, ...]
    refused: tuple[str, ...]
    """What was said of files that could not be used."""


class DemoResult(BaseModel):
    """The end of the demo."""

    model_config = ConfigDict(frozen=True)

    outcomes: tuple[LineageOutcome, ...]

    @property
    def rejected(self) -> bool:
        """Whether the gate rejected a version of the lineage that the demo is about."""
        return any(run.rejected for run in self.outcomes[0].runs)

    @property
    def failed(self) -> bool:
        """Whether a file was refused or its run failed."""
        return any(outcome.refused for outcome in self.outcomes)


async def run_demo(*, compare: bool, base_model: str | None = None, examples: Path | None = None) -> DemoResult:
    """Let the example domains land in the inbox one by one, and watch it.

    Args:
        compare: the same arrivals also through plain continued LoRA, in a lineage of its own.
        base_model: instead of the examples' own.
        examples: folder of the example domains, instead of the project's own.

    Raises:
        ConfigError: the examples are not there.
    """
    folder = examples or _examples_folder()
    specs = [_read_example(folder / name) for name in ORDER]
    lineages = [_lineage_of(specs[0], "demo", "deal", base_model)]
    if compare:
        lineages.append(_lineage_of(specs[0], "demo-seq-lora", "seq_lora", base_model))
    store = current_store()
    watched: dict[str, list[WatchResult]] = {lineage.lineage: [] for lineage in lineages}
    _clear(store, specs)  # of what a demo that was stopped has left
    for number, spec in enumerate(specs, start=1):
        reporter().said(f"\nArrival {number} of {len(specs)}: {spec.task.name}")
        _land(store, spec)
        for lineage in lineages:
            if compare:
                reporter().said(f"Lineage {lineage.lineage} ({lineage.strategy})")
            watched[lineage.lineage].append(
                await watch(lineage, tasks=(spec.task.name,), once=True, poll_seconds=POLL_SECONDS)
            )
    _clear(store, specs)  # other lineages that watch this inbox shall not learn the demo
    return DemoResult(outcomes=tuple(_outcome(store, lineage, watched[lineage.lineage]) for lineage in lineages))


def _examples_folder() -> Path:
    """Installed, the examples lie beside the flows; in a checkout, beside the packages."""
    installed = Path(__file__).parent / "examples"
    return installed if installed.is_dir() else Path(__file__).parents[1] / "examples"


def _read_example(folder: Path) -> AdaptSpec:
    if not folder.is_dir():
        raise ConfigError(f"The demo's example data is not in {folder}; install the project again, or use a checkout.")
    return read_spec(folder / "spec.yaml")


def _lineage_of(spec: AdaptSpec, lineage: str, strategy: str, base_model: str | None) -> LineageSpec:
    values = {name: getattr(spec, name) for name in LineageSpec.model_fields}
    changed = {"lineage": lineage, "strategy": strategy, "base_model": base_model or spec.base_model}
    return LineageSpec(**{**values, **changed})


def _outcome(store: ObjectStore, lineage: LineageSpec, watched: list[WatchResult]) -> LineageOutcome:
    champion = open_registry().champion(lineage.lineage)
    matrix = read_record(store, champion.adapter_uri).matrix if champion else None
    return LineageOutcome(
        lineage=lineage.lineage,
        strategy=lineage.strategy,
        champion=champion.version if champion else None,
        matrix=matrix.to_json() if matrix else None,
        scores=Scores.of(matrix) if matrix else None,
        runs=tuple(run for result in watched for run in result.runs),
        refused=tuple(
            seen.message for result in watched for seen in result.files if seen.outcome in ("refused", "failed")
        ),
    )


def _land(store: ObjectStore, spec: AdaptSpec) -> None:
    """Put an example's files into the inbox as a user would: what is known of the task first, its rows last."""
    folder = f"{INBOX}/{spec.task.name}"
    data, test_data = Path(spec.task.data), spec.task.test_data and Path(spec.task.test_data)
    fields = TaskFields(**spec.task.given()).model_dump(mode="json", exclude_unset=True)
    if test_data:
        fields["test_data"] = test_data.name
    store.put_bytes(f"{folder}/{TASK_FILE}", yaml.safe_dump(fields, allow_unicode=True, sort_keys=False).encode())
    if test_data:
        store.upload_file(test_data, f"{folder}/{test_data.name}")
    store.upload_file(data, f"{folder}/{data.name}")


def _clear(store: ObjectStore, specs: list[AdaptSpec]) -> None:
    """Take the demo's own files out of the inbox."""
    for spec in specs:
        files = [TASK_FILE, *(Path(path).name for path in (spec.task.data, spec.task.test_data) if path)]
        for name in files:
            store.delete(f"{INBOX}/{spec.task.name}/{name}")
