"""The record of a lineage at one version: base model, settings, tasks and accuracies.

Each version has a `record.json` next to its adapter. With the record, a version can be continued, judged and served
from the object store alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from pydantic import ConfigDict

from deal_core.config import AdapterConfig
from deal_core.data.schema import TaskSchema
from deal_core.errors import ConfigError, StoreError
from deal_core.evaluation.accuracy_matrix import StoredMatrix
from deal_core.schema_version import VersionedJson
from infra.store.base import ObjectStore
from infra.versions import Version
from tasks.lineage.version_files import reading_beside, require_recorded
from tasks.references import BaseRef, DatasetRef

RECORD_FILE = "record.json"


@dataclass(frozen=True, kw_only=True)
class FrozenRows:
    """Test rows of a task that one arrival brought."""

    dataset_uri: str
    num_rows: int
    base_accuracy: float | None = None
    """The untouched base model's accuracy on them; None: the run that brings them has not registered its version."""


class _WithTests:
    """What has frozen test rows."""

    tests: tuple[FrozenRows, ...]

    @property
    def num_test(self) -> int:
        """The number of these rows."""
        return sum(part.num_rows for part in self.tests)

    @property
    def test_uris(self) -> tuple[str, ...]:
        """The datasets of these rows."""
        return tuple(part.dataset_uri for part in self.tests)


@dataclass(frozen=True, kw_only=True)
class KnownTask(_WithTests):
    """A task that the lineage has learned."""

    schema: TaskSchema
    tests: tuple[FrozenRows, ...]
    """The test rows that judge the version: those of the task's first arrival, then those that were added."""
    added: FrozenRows | None = None
    """Test rows that the version itself adds. They judge from the next version on."""
    max_prompt_tokens: int
    """Longest prompt in evaluation and serving. Later arrivals do not change it."""
    max_new_tokens: int
    """Longest answer in evaluation and serving."""

    @property
    def base_accuracy(self) -> float | None:
        """The untouched base model's accuracy on these rows; None: it is not known."""
        right = [None if part.base_accuracy is None else part.base_accuracy * part.num_rows for part in self.tests]
        known = [number for number in right if number is not None]
        return sum(known) / self.num_test if self.num_test and len(known) == len(right) else None

    def grown(self) -> KnownTask:
        """Return the task with the test rows that judge the next version."""
        return self if self.added is None else replace(self, tests=(*self.tests, self.added), added=None)

    def judged_by(self, dataset: DatasetRef) -> KnownTask:
        """Return the task with the test rows of another dataset."""
        return replace(self, tests=(FrozenRows(dataset_uri=dataset.uri, num_rows=dataset.num_test),), added=None)

    def with_base_accuracy(self, accuracy: float) -> KnownTask:
        """Return the task with the base model's accuracy on the newest of its test rows, if it was not known."""
        if self.added is not None:
            return replace(self, added=replace(self.added, base_accuracy=accuracy))
        *earlier, newest = self.tests
        if newest.base_accuracy is not None:
            return self
        return replace(self, tests=(*earlier, replace(newest, base_accuracy=accuracy)))


@dataclass(frozen=True, kw_only=True)
class KnownSlice(_WithTests):
    """Earlier test rows of a task whose test rows were renewed: measured and shown, but they do not judge the task."""

    name: str
    of: str
    """Name of the task."""
    tests: tuple[FrozenRows, ...]


@dataclass(frozen=True, kw_only=True)
class LineageRecord(VersionedJson, what=f"The lineage's {RECORD_FILE}", error=StoreError, version=1):
    """The record of a lineage at one version."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="ignore")

    lineage: str
    base: BaseRef
    strategy: str
    adapter: AdapterConfig
    tasks: tuple[KnownTask, ...]
    matrix: StoredMatrix
    slices: tuple[KnownSlice, ...] = ()

    def task(self, name: str) -> KnownTask | None:
        """Return the task of that name, or None."""
        return next((task for task in self.tasks if task.schema.name == name), None)

    def accuracies(self, back: int = 0) -> dict[str, float]:
        """Return the accuracies of this version by task, or those of the version `back` versions before it.

        For a task that an earlier version had not learned, this is its accuracy before learning. If there is no such
        version, the result is empty.
        """
        rows = self.matrix.rows
        return self._by_task(rows[-1 - back]) if back < len(rows) else {}

    def base_accuracies(self) -> dict[str, float]:
        """Return the accuracies of the untouched base model by task."""
        return self._by_task(self.matrix.base)

    def _by_task(self, values: Sequence[float | None]) -> dict[str, float]:
        return {name: value for name, value in zip(self.matrix.tasks, values, strict=True) if value is not None}


def read_record(store: ObjectStore, version: Version) -> LineageRecord:
    """Read the record of a version, and compare it with its digest.

    Raises:
        IntegrityError: The digest of the record is not the recorded digest.
        ObjectNotFoundError: The record is missing.
        StoreError: The record is damaged or has another schema version.
    """
    with reading_beside(store, version.adapter_uri, RECORD_FILE):
        content = store.get_bytes(f"{version.adapter_uri}/{RECORD_FILE}")
        record = LineageRecord.from_json(json.loads(content))
    require_recorded(store, version, {RECORD_FILE: hashlib.sha256(content).hexdigest()}, [RECORD_FILE])
    return record


def write_record(store: ObjectStore, adapter_uri: str, record: LineageRecord) -> str:
    """Write the record of an adapter; return its SHA-256, which the version keeps."""
    content = json.dumps(record.to_json(), ensure_ascii=False, indent=2, allow_nan=False).encode()
    store.put_bytes(f"{adapter_uri}/{RECORD_FILE}", content)
    return hashlib.sha256(content).hexdigest()


def require_same_base(record: LineageRecord, base: BaseRef) -> None:
    """Raise ConfigError if `base` is not the lineage's base model."""
    if record.base.sha256 != base.sha256:
        raise ConfigError(
            f"Lineage '{record.lineage}' adapts the base model {record.base.name} ({record.base.sha256[:12]}), you "
            f"gave {base.name} ({base.sha256[:12]}). Change it with deal lineage rebase {record.lineage} --base NEW; "
            "or a new base model starts a new lineage: give another --lineage. "
            "If the Hub's model has changed, give the old one: OWNER/NAME@COMMIT, or the folder of the old snapshot."
        )


def choose_task(record: LineageRecord, name: str | None) -> KnownTask:
    """Return the task of that name; None: the task learned last.

    Raises:
        ConfigError: The lineage does not know the task.
    """
    name = record.matrix.trained[-1] if name is None else name
    task = record.task(name)
    if task is None:
        names = ", ".join(task.schema.name for task in record.tasks)
        raise ConfigError(f"Lineage '{record.lineage}' knows no task '{name}'; it knows {names}.")
    return task
