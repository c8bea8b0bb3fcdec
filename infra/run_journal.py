"""The journal of a lineage's runs in the store: what each adaptation learns from, its state, and its curves.

`runs/LINEAGE/RUN.json` is written when a run starts, after its training, and when it ends. A run that was killed stays
`running`; the lineage's next run completes it, or `deal data gc` removes what it left.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Literal

from pydantic import ConfigDict, Field

from infra.store import keys
from infra.store.base import ObjectStore
from infra.store.stored import Stored, parse_stored, read_folder, read_stored, reading_stored, write_stored

RunState = Literal["running", "finished", "failed"]
Curve = Mapping[str, tuple[tuple[int, float], ...]]
"""Points (step, value) of each metric of a training, by its name."""
_REMEDY = "Restore it from a backup, or delete it: what the run has registered stays."


class Run(Stored):
    """An adaptation run."""

    model_config = ConfigDict(ser_json_inf_nan="strings")  # the loss of a training that diverges is no number

    lineage: str
    task: str
    run_key: str
    """Its identity: the same arrival, parent and settings give the same key."""
    dataset_uri: str
    dataset_sha256: str
    num_rows: Mapping[str, int]
    """Rows of the dataset: train, test, rejected."""
    base_sha256: str
    parent_version: str | None
    """None: it starts from the base model."""
    params: Mapping[str, Any]
    """Its settings, by section."""
    state: RunState = "running"
    started: datetime
    ended: datetime | None = None
    curve: Curve = Field(default_factory=dict)

    @property
    def short_key(self) -> str:
        """The part of the key that folder names use."""
        return keys.short_run(self.run_key)

    @property
    def touched(self) -> datetime:
        """When it ended; when it started if it has not ended."""
        return self.ended or self.started


class RunJournal:
    """The journals of a store's lineages."""

    def __init__(self, store: ObjectStore) -> None:
        self.store = store

    def all(self, lineage: str) -> tuple[Run, ...]:
        """Return the runs of a lineage, in the order of their end; runs that have not ended by their start.

        Raises:
            StoreError: A journal is damaged, or another release wrote it.
        """
        runs = (self.parse(*journal) for journal in read_folder(self.store, keys.run_folder(lineage)).items())
        return tuple(sorted(runs, key=lambda run: run.touched))

    def parse(self, key: str, content: bytes) -> Run:
        """Return the run whose journal has a key; raise StoreError if it is damaged, or another release wrote it."""
        with reading_stored(self.store, key, "the journal of a run", _REMEDY):
            return parse_stored(content, Run)

    def find(self, lineage: str, run_key: str) -> Run | None:
        """Return the run with a key, if there is one."""
        key = keys.run_journal_key(lineage, run_key)
        return read_stored(self.store, key, Run, what="the journal of a run", remedy=_REMEDY)

    def start(self, run: Run) -> Run:
        """Write a run that starts; a run that is continued keeps its start and its curves."""
        before = self.find(run.lineage, run.run_key) or run
        return self._write(run, started=before.started, curve=before.curve)

    def add_curve(self, run: Run, curve: Curve) -> Run:
        """Add points to the curves of a run. Of two points of one step the later one counts."""
        merged = {
            name: tuple(sorted((dict(run.curve.get(name, ())) | dict(curve.get(name, ()))).items()))
            for name in {*run.curve, *curve}
        }
        return self._write(run, curve=merged)

    def end(self, run: Run, state: Literal["finished", "failed"]) -> Run:
        """Write the end of a run."""
        before = self.find(run.lineage, run.run_key) or run  # the caller may have the run as it was before its training
        return self._write(before, state=state, ended=datetime.now(UTC))

    def _write(self, run: Run, **changes: Any) -> Run:
        """Write a run with changes, and return it."""
        run = run.model_copy(update=changes)
        write_stored(self.store, keys.run_journal_key(run.lineage, run.run_key), run)
        return run
