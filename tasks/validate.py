"""Check a file by the rules of ingest before the file lands (`deal check`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import pyarrow as pa
from pydantic import BaseModel

from deal_core.config import TrainConfig
from deal_core.data.arrow_rows import rows_in
from deal_core.data.dataset import validate_file
from deal_core.data.row_warnings import balance_warning, data_warnings
from deal_core.data.rows import Row
from deal_core.data.schema import DatasetManifest, TaskSchema
from deal_core.errors import ConfigError
from deal_core.evaluation.significance import rows_to_see
from deal_core.judging_config import GateConfig
from deal_core.safe_text import shorten
from deal_core.shown import Shown
from infra.settings import HomeSettings
from infra.store.base import ObjectStore
from infra.store.keys import TASK_FILE
from infra.versions import Versions
from tasks.base import local_tokenizer
from tasks.inbox import task_from_file
from tasks.lineage.choices import choose_base, choose_strategy
from tasks.lineage.record import read_record
from tasks.lineage.settings import spec_from_options
from tasks.lineage.tombstones import ForgottenRowsError, refuse_forgotten
from tasks.spec import AdaptSpec
from tasks.task_schema import choose_schema, landing_of

if TYPE_CHECKING:
    from deal_core.selection.label_noise import LabelCheck

_MAX_KEPT_ROWS = 20_000
"""Training rows whose labels a model may check; of more, the first ones."""


class RefusedRow(BaseModel, frozen=True):
    """A row that would go to quarantine."""

    file: Annotated[str, Shown()]
    row: Annotated[int, Shown()]
    """Number of the row, from 1, without a CSV's header; in JSON lines the number of the line."""
    line: Annotated[int | None, Shown()]
    """The line on which the row begins; None: the file has no lines."""
    reasons: Annotated[tuple[str, ...], Shown("reason", format="\n".join)]


class ShownRow(BaseModel, frozen=True):
    """A training row as the model sees it."""

    prompt: str
    answer: str
    rejected: str | None = None
    """The worse answer, if the row is a preference."""
    note: str | None = None
    """What is missing in the prompt."""


class LikelyWrongLabel(BaseModel, frozen=True):
    """A training row whose label is probably wrong."""

    text: Annotated[str, Shown(format=shorten)]
    label: Annotated[str, Shown(format=shorten)]
    likelier: Annotated[str, Shown(format=shorten)]
    """The label that fits better."""
    share: float
    """p(label) / (p(label) + p(likelier)), by a classifier that did not see the row's label."""


class ValidateResult(BaseModel, frozen=True):
    """The result of the checks of a file."""

    file: str
    task_file: str | None = None
    """The task file next to the file, whose settings apply."""
    accepted: bool
    """Whether a run would take the rows."""
    refusal: str | None
    """Why it would not."""
    format: str
    shape: str
    """What the file was recognised as."""
    labels: tuple[str, ...]
    """The task's labels; empty: it has none."""
    num_read: int
    num_train: int
    num_test: int
    num_rejected: int
    """Bad rows."""
    num_turns: int
    """Training rows that are earlier turns of chats."""
    problems: dict[str, int]
    """Reason → number of the bad rows that have it."""
    bad_rows: tuple[RefusedRow, ...]
    """The first bad rows."""
    num_several: int
    """Good rows with several right answers."""
    example: ShownRow | None
    """The first good training row."""
    sha256: str
    """Digest of the dataset that a run would store."""
    warnings: tuple[str, ...] = ()
    """What is odd about the rows together: contradictions, and labels that cannot work."""
    label_check: str | None = None
    """What a model found about the labels, in one sentence; None: none was asked."""
    likely_wrong: tuple[LikelyWrongLabel, ...] = ()
    """Rows whose label is probably wrong, the worst first."""


def spec_to_check(
    store: ObjectStore,
    file: str | Path | None,
    *,
    spec: Path | None = None,
    task: str | None = None,
    lineage: str | None = None,
    test_data: str | None = None,
    settings: Sequence[str] = (),
) -> tuple[AdaptSpec, Path | None]:
    """Return the spec by which rows are checked, and the task file beside them if its settings apply.

    Args:
        store: The store, which has the lineage's file.
        file: Path or address of the rows; None: the spec's.
        spec: A spec with the task, the test file and the data settings.
        task: Name of the task, without a spec. None: the task file in the file's folder decides, if there is one.
        lineage: Replaces the spec's lineage.
        test_data: Replaces the spec's file of test rows.
        settings: Texts KEY=VALUE that win over the spec.

    Raises:
        ConfigError: A setting is not valid, or both `spec` and `task` are given.
    """
    if spec is not None and task is not None:
        raise ConfigError("The spec names the task; give either --spec or --task.")
    data = None if file is None else str(file)
    options = {"task": None, "data": None} if spec else {"task": "unnamed" if task is None else task, "data": data}
    asked = spec_from_options(store, spec, **options, test_data=None, lineage=lineage, settings=settings)
    arrival, task_file = asked.task, None
    if data is not None and spec is None and task is None and "://" not in data:
        beside = Path(data).absolute().parent / TASK_FILE
        if beside.is_file():
            arrival, task_file = task_from_file(beside, data), beside
    files = {"data": data or arrival.data, "test_data": test_data or arrival.test_data}
    return asked.model_copy(update={"task": arrival.model_copy(update=files)}), task_file


def validate(
    store: ObjectStore,
    spec: AdaptSpec,
    task_file: Path | None = None,
    *,
    with_model: bool = False,
    on_progress: Callable[[int], None] | None = None,
    on_model: Callable[[int, int], None] = lambda done, total: None,
    on_rows: Callable[[pa.RecordBatch], None] = lambda rows: None,
) -> ValidateResult:
    """Check rows as ingest would, with the labels and test rows that the lineage has for the task.

    The result shows texts even if the spec forbids texts in reports: only the caller sees it.

    Args:
        store: The store, which has the lineage.
        spec: See `spec_to_check`, also for `task_file`.
        task_file: For the result.
        with_model: Check the labels with the base model, which is fetched if it is not on this machine.
        on_progress: Called now and then with the number of rows read.
        on_model: Called with the number of rows that the model has read, and that of all that it reads.
        on_rows: Called with the good training rows (see GOOD_ROWS), a part at a time.

    Raises:
        DataValidationError: The file cannot be read to its end.
        ConfigError: The task's name is not valid, or the spec contradicts the lineage.
    """
    arrival = spec.task
    champion = Versions(store).champion(spec.lineage)
    record = read_record(store, champion) if champion else None
    base = choose_base(spec, record)
    schema, config = choose_schema(store, arrival, record), replace(spec.data, include_texts=True)
    with landing_of(store, arrival, schema, record, config, on_progress, parent=champion) as landing:
        kept = _TrainingRows()

        def keep(rows: pa.RecordBatch) -> None:
            kept.add(rows)
            on_rows(rows)

        report = validate_file(landing, keep)
    manifest, refusal = report.manifest, report.refusal
    schema = manifest.task  # the file has completed it
    if refusal is None:
        try:
            refuse_forgotten(store, arrival.name, manifest.training_files)
            refuse_forgotten(store, arrival.name, manifest.files[manifest.num_training_files :], "test rows")
            refuse_forgotten(store, arrival.name, [manifest.sha256, manifest.landed_sha256])
        except ForgottenRowsError as error:
            refusal = str(error)
    checked = None
    if with_model and schema.labels and kept.inputs:
        checked = _check_labels(schema, kept, base, spec.train, on_model)
    warnings = (*data_warnings(manifest, include_texts=True), *kept.warnings(schema))
    choose_strategy(spec, record)  # refuses options that it does not take
    if landing.renews_tests or not landing.frozen_test_inputs:  # the file brings the test rows
        warnings += _few_tests_warning(manifest, spec.gate)
    return ValidateResult(
        file=arrival.data if isinstance(arrival.data, str) else ", ".join(arrival.data),
        task_file=task_file and str(task_file),
        accepted=refusal is None,
        refusal=refusal,
        format=schema.format,
        shape=report.shape,
        labels=schema.labels,
        num_read=manifest.num_read,
        num_train=manifest.num_train,
        num_test=manifest.num_test,
        num_rejected=manifest.num_rejected,
        num_turns=manifest.num_turns,
        problems=dict(manifest.problems),
        bad_rows=tuple(
            RefusedRow(
                file=bad.file,
                row=bad.row,
                line=bad.line,
                reasons=tuple(f"{reason}: {value}" for reason, value, _ in bad.problems),
            )
            for bad in report.bad_rows
        ),
        num_several=report.num_several,
        example=kept.first and _shown(schema, kept.first, base),
        sha256=manifest.sha256,
        warnings=warnings,
        label_check=checked and checked.describe(),
        likely_wrong=tuple(
            LikelyWrongLabel(
                text=kept.inputs[suspect.row],
                label=suspect.label,
                likelier=suspect.likelier,
                share=round(suspect.share, 4),
            )
            for suspect in (checked.suspects if checked else ())
        ),
    )


def _few_tests_warning(manifest: DatasetManifest, gate: GateConfig) -> tuple[str, ...]:
    """Warn of test rows that cannot show a drop of twice the gate's limit; for tasks with labels."""
    num_test, limit = manifest.num_test, gate.max_drop_points
    if not manifest.task.labels or not num_test or not limit or num_test >= rows_to_see(2 * limit, gate.confidence):
        return ()
    enough = float(f"{rows_to_see(limit, gate.confidence):.1g}")  # 200 rather than 207
    return (
        f"With {num_test} test rows a drop of {2 * limit:g} points cannot be seen reliably; give {enough:g} with "
        "--test-data.",
    )


class _TrainingRows:
    """The first training rows of a file, and its labels' counts."""

    def __init__(self) -> None:
        self.first: Row | None = None
        self.inputs: list[str] = []
        self.outputs: list[str] = []
        self._counts: Counter[str] = Counter()
        self._is_counted = True

    def add(self, rows: pa.RecordBatch) -> None:
        self.first = self.first or next(iter(rows_in(rows.slice(0, 1))), None)
        first = rows.slice(0, _MAX_KEPT_ROWS - len(self.inputs))
        self.inputs += first.column("input").to_pylist()
        self.outputs += first.column("output").to_pylist()
        if self._is_counted:
            self._counts.update(rows.column("output").to_pylist())
            self._is_counted = len(self._counts) <= _MAX_KEPT_ROWS  # free answers, of which there may be millions

    def warnings(self, task: TaskSchema) -> tuple[str, ...]:
        balance = balance_warning({label: self._counts[label] for label in task.labels})
        return () if balance is None else (balance,)


def _check_labels(
    task: TaskSchema, rows: _TrainingRows, source: str, train: TrainConfig, on_model: Callable[[int, int], None]
) -> LabelCheck:
    from datasets import Dataset

    from deal_core.base_model.load import load_base
    from deal_core.selection.label_noise import check_labels

    texts = Dataset.from_dict({"input": rows.inputs, "output": rows.outputs})
    return check_labels(load_base(source, HomeSettings().cache_dir), task, texts, train, on_model)


def _shown(task: TaskSchema, row: Row, base: str) -> ShownRow:
    """A row as the model sees it. A chat template is the base model's, which the call never fetches."""
    from deal_core.data.prompts import answer_text, readable_prompt, render_prompt

    answer = answer_text(task, row.output)
    rejected = None if row.rejected is None else answer_text(task, row.rejected)
    prompt, note = readable_prompt(task, row.input), None
    if task.uses_chat_template:
        try:
            prompt = render_prompt(task, row.input, local_tokenizer(base))
        except ConfigError as error:
            note = f"without the base model's chat template: {error}"
    return ShownRow(prompt=prompt, answer=answer, rejected=rejected, note=note)
