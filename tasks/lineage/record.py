"""The record of a lineage: what the next arrival must know of everything before it.

It lies as `record.json` beside the adapter of each version, so that a version can be continued, judged and served
from the object store alone.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import ClassVar

from pydantic import ConfigDict

from deal_core.config import AdapterConfig, EvaluateConfig
from deal_core.data.schema import TaskSchema
from deal_core.errors import ConfigError, StoreError
from deal_core.evaluation.metrics import KeptMatrix
from deal_core.schema_version import Kept, VersionedJson
from infra.store.base import ObjectStore
from tasks.lineage.version_files import reading_beside
from tasks.references import BaseRef, DatasetRef

RECORD_FILE = "record.json"


@dataclass(frozen=True, kw_only=True)
class KnownTask:
    """A task the lineage has learned, with the dataset whose test rows judge it for good: that of its first arrival."""

    schema: TaskSchema
    dataset_uri: str
    num_test: int
    max_prompt_tokens: int
    """Length of prompt that the task is judged and asked with, whatever later arrivals are trained with."""
    max_new_tokens: int = EvaluateConfig().max_new_tokens
    """Longest answer that it is judged and asked with, likewise. Older records lack it: theirs was the default."""

    def judged_by(self, dataset: DatasetRef) -> KnownTask:
        """The same task, judged by the test rows of another dataset."""
        return replace(self, dataset_uri=dataset.uri, num_test=dataset.num_test)


@dataclass(frozen=True, kw_only=True)
class LineageRecord(VersionedJson):
    """State of a lineage at one version."""

    kept: ClassVar[Kept] = Kept(f"The lineage's {RECORD_FILE}", StoreError, version=1)
    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="ignore")

    lineage: str
    base: BaseRef
    strategy: str
    adapter: AdapterConfig
    tasks: tuple[KnownTask, ...]
    matrix: KeptMatrix

    def task(self, name: str) -> KnownTask | None:
        """The known task of that name."""
        return next((known for known in self.tasks if known.schema.name == name), None)

    def accuracies(self) -> dict[str, float]:
        """Accuracy of this version on every task it knows: the last row of the matrix."""
        if not self.matrix.rows:
            return {}
        return {name: value for name, value in zip(self.matrix.tasks, self.matrix.rows[-1], strict=True)
                if value is not None}  # fmt: skip


def read_record(store: ObjectStore, adapter_uri: str) -> LineageRecord:
    """The record beside an adapter.

    Raises:
        ObjectNotFoundError: it is missing.
        StoreError: it is damaged, or of another schema version.
    """
    with reading_beside(store, adapter_uri, RECORD_FILE):
        return LineageRecord.from_json(json.loads(store.get_bytes(f"{adapter_uri}/{RECORD_FILE}")))


def write_record(store: ObjectStore, adapter_uri: str, record: LineageRecord) -> None:
    """Put the record beside an adapter."""
    text = json.dumps(record.to_json(), ensure_ascii=False, indent=2, allow_nan=False)
    store.put_bytes(f"{adapter_uri}/{RECORD_FILE}", text.encode())


def require_same_base(record: LineageRecord, base: BaseRef) -> None:
    """A lineage has one base model.

    Raises:
        ConfigError: the base model is another than the lineage's.
    """
    if record.base.sha256 != base.sha256:
        raise ConfigError(
            f"Lineage '{record.lineage}' adapts the base model {record.base.name} ({record.base.sha256[:12]}), you "
            f"gave {base.name} ({base.sha256[:12]}); a new base model starts a new lineage: give another --lineage."
        )


def choose_task(record: LineageRecord, name: str | None) -> KnownTask:
    """The task of that name; None: the one learned last.

    Raises:
        ConfigError: the lineage does not know it.
    """
    name = record.matrix.trained[-1] if name is None else name
    known = record.task(name)
    if known is None:
        names = ", ".join(task.schema.name for task in record.tasks)
        raise ConfigError(f"Lineage '{record.lineage}' knows no task '{name}'; it knows {names}.")
    return known
