"""A consolidation: which rows are left of a lineage's arrivals, and the files that they are learned from together.

The rows of an arrival are those that its dataset retains, or are read again from the landed files, if their digests
are the same. Of a task with an arrival without rows, the rows that the method has kept are learned too. Test rows are
left out, those from before a renewal as well.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq
from prefect import task

from deal_core.data.dataset import build_dataset
from deal_core.data.rows import stored_input_digest
from deal_core.data.schema import ROW_SCHEMA
from deal_core.errors import ConfigError, DealError, StoreError, in_one_line
from deal_core.safe_text import listed
from infra.store.base import ObjectStore, temporary_folder
from infra.store.keys import TRAIN_FILE
from infra.store.opening import open_store
from infra.versions import Version, Versions, descent
from tasks.adaptation.resume import read_findings, require_same_files
from tasks.adaptation.run import STAGE
from tasks.lineage.consolidation import ConsolidationPlan, LearnedRows, Source, Start
from tasks.lineage.datasets import retains_training_rows
from tasks.lineage.frozen_rows import read_test_rows, require_tests
from tasks.lineage.record import KnownTask, LineageRecord
from tasks.lineage.tombstones import find_tombstone, refuse_forgotten
from tasks.lineage.version_files import borrowed_adapter
from tasks.progress import advance, staged
from tasks.spec import AdaptSpec, parse
from tasks.task_schema import choose_schema, frozen_tests, landing_of

if TYPE_CHECKING:
    from deal_core.training.jobs import JoinedFile

ROWS_FOLDER = "rows"


def plan_consolidation(
    store: ObjectStore, champion: Version, record: LineageRecord, start: Start, spec: AdaptSpec
) -> ConsolidationPlan:
    """Find what is left of the rows of every arrival that a champion, which has the record, has learned.

    Raises:
        ConfigError: Nothing is to be consolidated, or it cannot be.
        TestRowsForgottenError: The test rows of a task were forgotten.
    """
    lineage = champion.lineage
    if champion.is_consolidation:
        raise ConfigError(
            f"Version {champion.version}, the champion of '{lineage}', is a consolidation itself; adapt to an arrival "
            "first."
        )
    if preferences := [task.schema.name for task in record.tasks if task.schema.learns_preferences]:
        raise ConfigError(
            f"'{lineage}' learns preferences ({listed(preferences)}), and these are learned alone, not with other "
            "tasks; it cannot be consolidated."
        )
    for known in record.tasks:  # fail before the training, not after it
        require_tests(store, known.grown())
    kept = _kept_rows(store, champion, record)
    line = reversed(descent(Versions(store).all(lineage), champion))
    parts = [_part(store, version, kept) for version in line if not version.is_consolidation]
    learned_kept = {part.task: kept[part.task] for part in parts if part.source == "kept"}
    with_rows = {part.task for part in parts if part.source != "none"}
    gone = tuple(task.schema.name for task in record.tasks if task.schema.name not in with_rows)
    if gone and start == "base":
        raise ConfigError(
            f"No row of {listed(gone)} is left, so a version that starts from the base model would not know "
            f"{'it' if len(gone) == 1 else 'them'}: start from the champion (--from champion), or land the rows again."
        )
    if not with_rows:
        raise ConfigError(f"No row of any arrival of '{lineage}' is left; there is nothing to consolidate.")
    num_rows = sum(part.num_rows for part in parts) + sum(learned_kept.values())
    return ConsolidationPlan(
        lineage=lineage,
        champion=champion.version,
        start=start,
        parts=tuple(parts),
        kept=learned_kept,
        gone=gone,
        num_rows=num_rows,
        seconds=_seconds(store, champion, spec, num_rows),
    )


@task(name="rows", **STAGE)
@staged("rows", lambda plan: f"{plan.num_rows} rows of {len(plan.arrivals)} arrivals")
def plan_rows(champion: Version, record: LineageRecord, start: Start, spec: AdaptSpec) -> ConsolidationPlan:
    """Find the rows of a consolidation; see `plan_consolidation`."""
    return plan_consolidation(open_store(), champion, record, start, spec)


def _kept_rows(store: ObjectStore, champion: Version, record: LineageRecord) -> dict[str, int]:
    """The number of rows that the champion's method has kept, by task; tasks without any are left out."""
    from deal_core.adapter.state import load_method_state
    from deal_core.strategies.kept_rows import sizes_of

    with borrowed_adapter(store, champion, with_method=True) as folder:
        kept = load_method_state(folder).kept_rows
    return {name: size.num_rows for name, size in sizes_of(kept, [task.schema.name for task in record.tasks]).items()}


def _part(store: ObjectStore, version: Version, kept: Collection[str]) -> LearnedRows:
    """What is left of the rows of a version's arrival."""
    source: Source = "none"
    tombstone = find_tombstone(store, version.task, [version.dataset_sha256])
    num_rows, why = 0, ""
    if tombstone is not None:
        why = f"They were {tombstone.said}."
    else:
        findings = read_findings(store, version.adapter_uri)
        num_rows = findings.dataset.num_train
        uri = findings.dataset.uri
        if retains_training_rows(store, uri) and store.exists(f"{uri}/{TRAIN_FILE}"):
            source = "retained"
        else:
            try:
                spec = parse(AdaptSpec, findings.spec, f"version {version.version}")
                refuse_forgotten(store, version.task, require_same_files(store, spec.task, version))
                source = "files"
            except DealError as error:
                why = in_one_line(error)
                source, num_rows = ("kept" if version.task in kept else "none"), 0
    return LearnedRows(
        version=version.version,
        task=version.task,
        dataset_sha256=version.dataset_sha256,
        source=source,
        num_rows=num_rows,
        why=why,
    )


def _seconds(store: ObjectStore, champion: Version, spec: AdaptSpec, num_rows: int) -> float | None:
    """About how long a training on this number of rows takes, at the speed of the champion's own training."""
    try:
        trained = read_findings(store, champion.adapter_uri).training
    except StoreError:
        return None
    steps = spec.train.num_steps(num_rows)
    return steps * trained.seconds / trained.num_steps if trained.num_steps else None


def gather_rows(store: ObjectStore, plan: ConsolidationPlan, record: LineageRecord, folder: Path) -> list[JoinedFile]:
    """Write the rows of every task with rows into a file of its own in `folder`; return these files.

    The same plan gives the same files.

    Raises:
        DataValidationError: A file has changed or is gone since the plan was made.
    """
    from deal_core.training.jobs import JoinedFile

    report = advance("train")
    versions = {version.version: version for version in Versions(store).all(plan.lineage)}
    files = []
    for number, known in enumerate(record.tasks):
        name = known.schema.name
        parts = [part for part in plan.parts if part.task == name and part.source in ("retained", "files")]
        report(number, len(record.tasks), f"reading {name}")
        if parts:
            test_inputs = frozen_tests(store, record, known).inputs
            tables = [
                table for part in parts for table in _rows_of(store, versions[part.version], part, record, test_inputs)
            ]
            file = folder / ROWS_FOLDER / f"{number}.parquet"
            file.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(_once(pa.concat_tables(tables)), file)
            files.append(JoinedFile(task=known.schema, rows_file=file))
    if not files:  # kept rows are all that is left
        file = folder / ROWS_FOLDER / "none.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(ROW_SCHEMA.empty_table(), file)
        files.append(JoinedFile(task=record.tasks[0].schema, rows_file=file))
    return files


def _rows_of(
    store: ObjectStore, version: Version, part: LearnedRows, record: LineageRecord, test_inputs: Collection[bytes]
) -> Iterator[pa.Table]:
    """The training rows of an arrival, without those whose texts are test rows."""
    findings = read_findings(store, version.adapter_uri)
    if part.source == "retained":
        table = read_test_rows(store, findings.dataset.uri, ROW_SCHEMA.names, file=TRAIN_FILE)
        kind = _known(record, part.task).schema.format
        assert kind != "auto", "a task that was learned has a format"
        texts = table.column("input").to_pylist()
        yield table.filter(pa.array([stored_input_digest(kind, text) not in test_inputs for text in texts], pa.bool_()))
        return
    spec = parse(AdaptSpec, findings.spec, f"version {version.version}")
    require_same_files(store, spec.task, version)
    schema = choose_schema(store, spec.task, record)
    with (  # a request for test rows is for the next arrival, not for one of long ago
        landing_of(store, spec.task, schema, record, spec.data, renews_tests=False) as landing,
        temporary_folder() as temporary,
    ):
        build_dataset(landing, temporary / "dataset")
        yield pq.read_table(temporary / "dataset" / TRAIN_FILE, columns=ROW_SCHEMA.names, memory_map=False)


def _known(record: LineageRecord, name: str) -> KnownTask:
    known = record.task(name)
    assert known is not None, "the champion has learned it"
    return known


def _once(table: pa.Table) -> pa.Table:
    """The rows of a table, each once: one that landed twice is learned once."""
    first = {digest: place for place, digest in reversed([*enumerate(table.column("sha256").to_pylist())])}
    return table.take(sorted(first.values()))
