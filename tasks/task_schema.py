"""What an arrival is checked by: the schema of its task, the lineage's test rows and what was forgotten."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

from deal_core.config import DataConfig
from deal_core.data.dataset import Landing
from deal_core.data.near_tests import NearTests
from deal_core.data.rows import stored_input_digest
from deal_core.data.schema import TaskSchema, label_key
from deal_core.errors import ConfigError
from deal_core.evaluation.metrics import require_metric
from deal_core.safe_text import brief
from infra.store.base import ObjectStore
from infra.versions import Version, Versions, descent
from tasks.data_files import local_files
from tasks.lineage.datasets import learned_inputs, read_manifest
from tasks.lineage.frozen_rows import parts_left, read_test_rows
from tasks.lineage.record import KnownTask, LineageRecord
from tasks.lineage.requests import added_labels, is_renewal_asked
from tasks.lineage.tombstones import forgotten_tests
from tasks.spec import TaskSpec

OF_NEW_TASKS = {"format": "auto", "metric": "auto", "assistant_turns": "all"}
"""Fields of a task that the lineage does not know; the settings of its first arrival come before them."""


@contextmanager
def landing_of(
    store: ObjectStore,
    task: TaskSpec,
    schema: TaskSchema,
    record: LineageRecord | None,
    config: DataConfig,
    on_progress: Callable[[int], None] | None = None,
    *,
    parent: Version | None = None,
    renews_tests: bool | None = None,
) -> Iterator[Landing]:
    """Yield the arrival's files on this machine, with all that its rows are checked by.

    `parent` is the version with the record; None: the arrival adds no test rows to those of a known task.
    `renews_tests` says whether the arrival is asked for new test rows; None: whether it is today.

    Raises:
        DataValidationError: There is no such file.
        StoreError: The lineage's test rows are damaged.
    """
    known = record.task(task.name) if record else None
    frozen = frozen_tests(store, record, known) if record and known else FrozenTests()
    if record and known and renews_tests is None:
        renews_tests = is_renewal_asked(store, record.lineage, known)
    num_lacking, learned = 0, frozenset[bytes]()
    if known and parent and (num_lacking := _num_lacking(store, known, config)):
        learned = learned_inputs(store, descent(Versions(store).all(parent.lineage), parent), task.name)
    with local_files(store, task.data) as sources, local_files(store, task.test_data or ()) as test_sources:
        yield Landing(
            sources=sources,
            task=schema,
            config=config,
            test_sources=test_sources,
            frozen_test_inputs=frozen.inputs,
            near_tests=frozen.near,
            num_lacking=num_lacking,
            learned_inputs=learned,
            renews_tests=bool(record and known and renews_tests),
            on_progress=on_progress,
            new_label_remedy=_new_label_remedy(task.name, record),
        )


def _num_lacking(store: ObjectStore, known: KnownTask, config: DataConfig) -> int:
    """The number of test rows that a task lacks. Test rows that the user chose never lack any."""
    parts = parts_left(store, known.grown())
    if not parts or read_manifest(store, parts[0].dataset_uri).split == "given":
        return 0
    return max(0, config.test_rows - sum(part.num_rows for part in parts))


def _new_label_remedy(task: str, record: LineageRecord | None) -> str:
    if record is None or record.task(task) is None:
        return "A label that is new is added to the task's labels: task.labels in the spec or the task file."
    return f"A label that is new is added with: deal task add-label {task} LABEL --lineage {record.lineage}."


def choose_schema(
    store: ObjectStore, task: TaskSpec, record: LineageRecord | None, *, labels: Sequence[str] | None = None
) -> TaskSchema:
    """Return the schema of the user's settings, or else the lineage's schema, or else one that the file completes.

    A known task also has the labels that were added by command. The user may still give the labels without them.
    `labels` are those of another time, oldest first; None: those of today.

    Raises:
        ConfigError: The settings contradict the lineage.
    """
    given = task.given()
    metrics = [known.schema.metric for known in record.tasks] if record else []
    for metric in [*metrics, given["metric"]] if "metric" in given else metrics:
        require_metric(metric)  # rather now than after the training
    known = record.task(task.name) if record else None
    if record is not None and any(earlier.name == task.name for earlier in record.slices):
        raise ConfigError(
            f"'{task.name}' names earlier test rows in lineage '{record.lineage}'; give the task another name."
        )
    if record is None or known is None:
        return TaskSchema(name=task.name, **{**OF_NEW_TASKS, **_schema_fields(given, ())})
    if labels is None:
        labels = added_labels(store, record.lineage, task.name)
    added = labels if known.schema.labels else ()
    learned = known.schema.with_labels(added)
    wanted = replace(known.schema, **_schema_fields(given, learned.labels)).with_labels(added)
    for name in ("format", "labels", "instruction", "template", "prompt", "metric"):
        value, before = getattr(wanted, name), getattr(learned, name)
        if value != before:
            adding = f"deal task add-label {task.name} LABEL --lineage {record.lineage}"
            remedy = f"add labels with: {adding}, or start" if name == "labels" else "or start"
            raise ConfigError(
                f"task.{name} of '{task.name}' is {brief(value)}, but the lineage learned it as {brief(before)}; "
                f"leave it out, {remedy} a new lineage."
            )
    return wanted


def _schema_fields(given: Mapping[str, Any], known: Sequence[str]) -> dict[str, Any]:
    """Fields of a TaskSchema of the user's settings. A mapping of labels keeps the order of the known labels."""
    names = given.get("labels")
    if not isinstance(names, Mapping):
        return dict(given)
    keys = {label_key(label) for label in known}
    are_known = keys.issuperset(label_key(name) for name in names.values())
    labels = tuple(known) if are_known else tuple(dict.fromkeys(names.values()))
    return {**given, "labels": labels, "label_names": dict(names)}


class FrozenTests(NamedTuple):
    """What an arrival's rows are compared with, of the test texts that its lineage has of the task."""

    inputs: frozenset[bytes] = frozenset()
    """Their digests (`stored_input_digest`)."""
    near: NearTests = NearTests()
    """The test rows, for what nearly equals them."""


def frozen_tests(store: ObjectStore, record: LineageRecord, known: KnownTask) -> FrozenTests:
    """Return the task's frozen test texts, and its test texts from before a renewal.

    The result is empty for a task whose test rows were forgotten: the arrival brings the test rows.
    """
    name, kind = known.schema.name, known.schema.format
    present = known.grown().test_uris
    if forgotten_tests(store, name, present):
        return FrozenTests()
    assert kind != "auto", "a task that was learned has a format"
    earlier = [uri for part in record.slices if part.of == name for uri in part.test_uris]
    inputs, near = set[bytes](), NearTests()
    for uri in (*present, *earlier):
        if not forgotten_tests(store, name, [uri]):
            rows = read_test_rows(store, uri, ["input", "output"]).combine_chunks()
            inputs.update(stored_input_digest(kind, text) for text in rows.column("input").to_pylist())
            near.add(*(rows.column(column).combine_chunks() for column in ("input", "output")))
    return FrozenTests(frozenset(inputs), near)
