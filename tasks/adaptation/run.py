"""A run: its identity, its entry in the journal, its start, and what its stages share."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from pydantic import BaseModel

from deal_core.config import AdapterConfig, Quantize
from deal_core.errors import DataValidationError, DealError
from infra.branches import Head
from infra.run_journal import Run, RunJournal
from infra.store import keys
from infra.store.base import ObjectStore
from infra.store.format import write_format
from infra.store.opening import open_store
from infra.versions import Version, Versions
from tasks.base import cached_base, load, refuse_what_cannot_fit
from tasks.context import work_folder
from tasks.lineage.choices import choose_base, settings_of
from tasks.lineage.consolidation import ConsolidationPlan
from tasks.lineage.datasets import read_manifest
from tasks.lineage.frozen_rows import parts_left
from tasks.lineage.record import FrozenRows, KnownTask, LineageRecord, choose_task, require_same_base
from tasks.lineage.requests import Renewal, find_renewal
from tasks.lineage.version_files import fetch_adapter
from tasks.mlflow_mirror import end_failed
from tasks.progress import Interrupted, staged
from tasks.references import BaseRef, DatasetRef, ScoredArrival
from tasks.spec import AdaptSpec

RETRY_SECONDS = [5, 30, 120]
"""Pauses before a stage is tried again."""
TRANSIENT = {
    "builtins": {"ConnectionError", "ConnectionResetError", "ConnectionRefusedError", "ConnectionAbortedError"}
    | {"BrokenPipeError", "TimeoutError"},
    "httpx": {"ConnectError", "ReadError", "WriteError", "RemoteProtocolError", "PoolTimeout"}
    | {"ConnectTimeout", "ReadTimeout", "WriteTimeout"},
    "requests": {"ConnectionError", "ConnectTimeout", "ReadTimeout", "Timeout", "ChunkedEncodingError"},
    "botocore": {"EndpointConnectionError", "ConnectionClosedError", "ConnectTimeoutError", "ReadTimeoutError"}
    | {"ConnectionError", "HTTPClientError"},
}
"""Errors of a connection by the package that raises them: Prefect, MLflow, the store and the Hub use these clients."""


def is_transient(error: BaseException | None) -> bool:
    """Return whether an error, or what caused it, is one of a connection. A mistake in the data never is one."""
    while error is not None:
        if isinstance(error, DataValidationError | Interrupted):
            return False
        kind = type(error)
        if kind.__name__ in TRANSIENT.get(kind.__module__.partition(".")[0], ()):
            return True
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return False


STAGE: dict[str, Any] = {
    "tags": ["deal"],
    "cache_policy": NO_CACHE,
    "retries": len(RETRY_SECONDS),
    "retry_delay_seconds": RETRY_SECONDS,
    # Prefect asks after a failure; the state has the error
    "retry_condition_fn": lambda task, run, state: isinstance(state.data, BaseException) and is_transient(state.data),
}
"""Options of every stage. Prefect's cache is not used: a run finds its own results by its key and goes on from them."""


class AdaptationRun(BaseModel, frozen=True, extra="forbid"):
    """What a run learns, what it continues, and how. It is plain data, so every stage can be started with it."""

    head: Head
    spec: AdaptSpec
    dataset: DatasetRef
    base: BaseRef
    adapter: AdapterConfig
    """Shape of the lineage's adapter."""
    strategy: str
    parent: Version | None
    """The version that the new one continues; None: it starts from the base model, and has no record."""
    record: LineageRecord | None
    """The parent's."""
    tasks: tuple[KnownTask, ...]
    """All tasks of the new version, each with the test rows that judge it."""
    renewal: Renewal
    """What the arrival does to the test rows of its task."""
    attempt: int = 0
    """Number of versions that were trained on the dataset before, if it is to be trained again."""
    relearns: Version | None = None
    """The version whose arrival is learned again; None: the arrival is new, or a consolidation is made."""
    consolidation: ConsolidationPlan | None = None
    """What is learned together; None: one arrival is learned. Then `dataset` stands for all of its rows."""
    tested: ScoredArrival | None = None
    """What the parent scored on the arrival's rows; None: it was not asked."""
    row_scores: tuple[float, ...] = ()
    """The score of each row that the parent was asked."""

    @property
    def lineage(self) -> str:
        """The lineage that learns."""
        return self.head.lineage

    @property
    def config_sha256(self) -> str:
        """Digest of all settings that can change the result."""
        return self.spec.config_sha256(self.adapter, self.strategy)

    @property
    def run_key(self) -> str:
        """The run's identity. The same arrival, parent and settings give the same key."""
        dataset, origin = self.dataset, self.parent.version if self.parent else "base"
        parts = [self.lineage, self.base.sha256, dataset.task, dataset.sha256, origin, self.config_sha256, self.attempt]
        branch = [] if self.head.branch is None else [{"branch": self.head.branch}]
        return hashlib.sha256(json.dumps([*parts, *dataset.new_labels, *branch]).encode()).hexdigest()

    @property
    def run(self) -> Run:
        """The run as its entry in the journal begins."""
        dataset, together = self.dataset, self.consolidation
        params = {
            "base": self.base.name,
            **settings_of(self.spec, self.adapter, self.strategy),
            "attempt": self.attempt,
        }
        if together is not None:
            params["consolidation"] = {"start": together.start, "arrivals": len(together.arrivals)}
        return Run(
            lineage=self.lineage,
            task=dataset.task,
            run_key=self.run_key,
            dataset_uri=dataset.uri,
            dataset_sha256=dataset.sha256,
            num_rows={"train": dataset.num_train, "test": dataset.num_test, "rejected": dataset.num_rejected},
            base_sha256=self.base.sha256,
            parent_version=self.parent.version if self.parent else None,
            params=params,
            started=datetime.now(UTC),
        )

    @property
    def adapter_uri(self) -> str:
        """The folder of the new adapter in the store."""
        return keys.adapter_uri(self.lineage, keys.short_run(self.run_key))

    @property
    def jobs_folder(self) -> str:
        """The folder in the store for jobs on other machines. It goes when the run is registered."""
        return keys.jobs_folder(self.adapter_uri)

    @property
    def folder(self) -> Path:
        """The folder of the run's checkpoints and results on this machine."""
        return work_folder(self.lineage, keys.short_run(self.run_key))

    @property
    def parent_folder(self) -> Path | None:
        """The copy of the parent's adapter on this machine that `start_run` makes; None without a parent."""
        return self.folder / "parent" if self.parent else None


def identify_base(source: str, quantize: Quantize = "none") -> BaseRef:
    """Load a base model and return its name and digest."""
    base = load(source, quantize)
    return BaseRef(source=source, name=base.name, sha256=base.sha256, quantize=quantize)


@task(name="base", **STAGE)
@staged("base", attrgetter("name"))
def load_base(spec: AdaptSpec, record: LineageRecord | None, adapter: AdapterConfig, strategy: str) -> BaseRef:
    """Load the base model, which stays in memory for the stages that follow.

    Raises:
        ConfigError: The run cannot fit on this device, or the lineage has another base model.
    """
    source, num_versions = choose_base(spec, record), len(record.matrix.trained) if record else 0
    refuse_what_cannot_fit(source, adapter, strategy, spec.method, spec.train, num_versions=num_versions)
    base = identify_base(source, spec.train.quantize)
    if record:
        require_same_base(record, base)
    return base


def plan_run(store: ObjectStore, *, again: bool, **fields: Any) -> AdaptationRun:
    """Return the run with these fields, after finding which test rows judge its version.

    If it is trained `again`, the versions count that were trained on its dataset before.
    """
    spec, dataset = fields["spec"], fields["dataset"]
    record: LineageRecord | None = fields["record"]
    if record is not None and fields["consolidation"] is not None:  # test rows stay as they are
        schema, renewal = choose_task(record, dataset.task).schema, Renewal(None, record.slices, None)
    else:
        schema, renewal = read_manifest(store, dataset.uri).task, find_renewal(store, record, dataset)
    # The parent's tasks, of which the arrival may replace the test rows, and a task that is new.
    tasks = [
        known.judged_by(dataset) if known == renewal.known else _as_judged_next(store, known)
        for known in (record.tasks if record else ())
    ]
    if renewal.known is None and dataset.num_added:
        added = FrozenRows(dataset_uri=dataset.uri, num_rows=dataset.num_added)
        tasks = [replace(known, added=added) if known.schema.name == dataset.task else known for known in tasks]
    if all(known.schema.name != dataset.task for known in tasks):
        new = KnownTask(
            schema=schema,
            tests=(FrozenRows(dataset_uri=dataset.uri, num_rows=dataset.num_test),),
            max_prompt_tokens=spec.train.max_prompt_tokens,
            max_new_tokens=spec.train.answer_tokens(schema.labels),
        )
        tasks.append(new)
    widened = tuple(replace(known, schema=dataset.widen(known.schema)) for known in tasks)
    before = Versions(store).all(spec.lineage) if again else ()
    attempt = sum(version.dataset_sha256 == dataset.sha256 for version in before)
    return AdaptationRun(**fields, tasks=widened, renewal=renewal, attempt=attempt)


@task(name="start", **STAGE)
@staged("start")
def start_run(adaptation: AdaptationRun) -> None:
    """Write a run into the journal, or continue the one that a crash left, and copy the parent's adapter here.

    Raises:
        IntegrityError: The parent's adapter is damaged.
        ObjectNotFoundError: The parent's adapter is missing.
    """
    from infra.fingerprints import keep_fingerprint

    store, base = open_store(), adaptation.base
    write_format(store)  # before anything of a version, so that the store is known as one of this release
    with failing(store, RunJournal(store).start(adaptation.run)):
        keep_fingerprint(store, base.sha256, base.quantize, partial(cached_base, base))  # for deal serve --engine
        if adaptation.parent is not None and adaptation.parent_folder is not None:
            shutil.rmtree(adaptation.parent_folder, ignore_errors=True)  # an earlier try may have left it incomplete
            fetch_adapter(store, adaptation.parent, adaptation.parent_folder)


@contextmanager
def failing(store: ObjectStore, run: Run) -> Iterator[None]:
    """Write into the journal that the run failed, if the block does."""
    try:
        yield
    except BaseException:
        with suppress(DealError):  # it must not hide the run's own error
            end_failed(RunJournal(store).end(run, "failed"))
        raise


def _as_judged_next(store: ObjectStore, known: KnownTask) -> KnownTask:
    """The task with all of its test rows that were not forgotten; if all of them were, as it is."""
    grown = known.grown()
    return replace(grown, tests=parts_left(store, grown) or grown.tests)


def remove_work(run: Run) -> None:
    """Delete the run's checkpoints and local results, after everything is in the store."""
    folder = work_folder(run.lineage, run.short_key)
    if folder.exists():
        shutil.rmtree(folder)
