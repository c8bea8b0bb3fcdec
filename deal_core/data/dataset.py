"""Build a dataset from a landed file: check every row, quarantine bad rows, and split good rows permanently."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self, TextIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from deal_core.config import DataConfig
from deal_core.data.check import BadInBatch, BatchChecker, GoodRows
from deal_core.data.columns import Columns, resolve_columns
from deal_core.data.reading.lines import sha256_of_input
from deal_core.data.reading.readers import file_kind, read_batches, read_columns
from deal_core.data.rows import (
    BadRow,
    DigestSet,
    Problem,
    Reason,
    RowBatch,
    as_digests,
    first_words,
    hex_array,
    merge_digests,
)
from deal_core.data.schema import (
    COLUMNS_OF_FORMAT,
    ROW_SCHEMA,
    SCHEMA_VERSION,
    DatasetManifest,
    Split,
    TaskSchema,
    label_key,
)
from deal_core.errors import DataValidationError
from deal_core.safe_text import shorten

MAX_INFERRED_LABELS = 64
MAX_EXAMPLES = 20
_PROGRESS_ROWS = 1000
_SHOWN_EXAMPLES = 3
_GROUP_ROWS = 8192
_GROUP_BYTES = 2**24
_SPLITS: tuple[Split, Split] = ("test", "train")


@dataclass(frozen=True, kw_only=True)
class ValidationReport:
    """Result of the checks of one arrival."""

    manifest: DatasetManifest
    bad_rows: tuple[BadRow, ...]
    """The first MAX_EXAMPLES bad rows; quarantine has all of them."""
    refusal: str | None
    """Why the arrival cannot be used, in one line; None if it can be used."""


class ArrivalRefusedError(DataValidationError):
    """The arrival was read to its end and cannot be used."""

    def __init__(self, message: str, report: ValidationReport) -> None:
        super().__init__(message)
        self.report = report


@dataclass(frozen=True, kw_only=True)
class Landing:
    """The files of one arrival, and the settings of their checks."""

    source: Path
    """The landed file, see `read_rows`."""
    task: TaskSchema
    """The task; its format may be "auto", and a labelled task without labels gets the labels of the file."""
    config: DataConfig
    test_source: Path | None = None
    """A file with the test rows; `source` then holds only training rows."""
    frozen_test_inputs: Collection[bytes] = ()
    """Digests (`stored_input_digest`) of the texts of the task's permanent test rows. Training rows with such a text
    are bad rows. If the file names no split, only rows with these texts are test rows."""
    on_progress: Callable[[int], None] | None = None
    """Called from time to time with the number of rows read. The file is read twice if it names its split, or if the
    labels are taken from it."""


def build_dataset(landing: Landing, folder: Path) -> DatasetManifest:
    """Check a landed file and write the dataset: train.parquet, test.parquet, manifest.json and quarantine.jsonl.

    Test rows are decided by a test file, else by the column "split", else by the digests of the rows' texts. A text's
    digest puts it on the same side in every file, with any answer. Files of an earlier call are replaced. The manifest
    has the task's format and labels filled in.

    Raises:
        ArrivalRefusedError: There are too many bad rows, no training row or no test row; quarantine.jsonl is written.
        DataValidationError: The file cannot be read to its end.

    Example:
        >>> landing = Landing(source=Path("tickets.csv"), task=TaskSchema(name="tickets"), config=DataConfig())
        >>> build_dataset(landing, Path("out")).num_train
    """
    with DatasetFiles(folder) as files:
        report = ArrivalReader(landing).validate(files.add, files.reject)
        if report.refusal is not None:
            listed = f" Every bad row is listed in {files.quarantine_path}." if report.bad_rows else ""
            raise ArrivalRefusedError(report.refusal + listed, report)
        files.publish(report.manifest)
    return report.manifest


def validate_file(landing: Landing) -> ValidationReport:
    """Only the checks of `build_dataset`: nothing is written, and a refusal is reported instead of raised.

    Raises:
        DataValidationError: The file cannot be read to its end.
    """
    return ArrivalReader(landing).validate(lambda rows, split: None, lambda bad, raw: None)


class ArrivalReader:
    """The files of one arrival while they are checked."""

    def __init__(self, landing: Landing) -> None:
        source, test_source, task, config = landing.source, landing.test_source, landing.task, landing.config
        self._source = source
        self._landed = (source,) if test_source is None else (source, test_source)
        self._config = config
        self._on_progress = landing.on_progress
        # Test rows are read first, so that a training row with a test row's text is found.
        files: list[tuple[Path, Split | None]] = [(source, None)]
        if test_source is not None:
            files = [(test_source, "test"), (source, "train")]
        self._files = [(path, split, _columns_of(path, task, split, config)) for path, split in files]
        formats = {columns.format for _, _, columns in self._files}
        if len(formats) > 1:
            raise DataValidationError(
                f"{source.name} and its test file have rows of different formats ({', '.join(sorted(formats))}); "
                "set task.format and name the columns alike."
            )
        self._names_split = any("split" in columns.names for _, _, columns in self._files)
        self._is_split_given = self._names_split or test_source is not None
        self._task = replace(task, format=formats.pop())
        if task.metric == "auto":
            self._task = replace(self._task, metric="exact" if self._task.format == "labelled" else "rouge_l")
        self._test_inputs = DigestSet()
        self._test_inputs.add(as_digests(b"".join(landing.frozen_test_inputs)))
        self._has_frozen_rows = bool(landing.frozen_test_inputs)
        self._kept: dict[Split, DigestSet] = {"train": DigestSet(), "test": DigestSet()}
        self._leaks = DigestSet()

    def validate(
        self, keep: Callable[[pa.Table, Split], None], reject: Callable[[BadRow, object], None]
    ) -> ValidationReport:
        """Check every row in order; pass it to `keep` or to `reject`."""
        infers_labels = self._task.format == "labelled" and not self._task.labels
        if infers_labels or self._names_split:
            self._survey(infers_labels)
        counts: Counter[str] = Counter()
        examples: list[BadRow] = []
        num_rejected = 0
        for path, batch, good, bad in self._checked_batches():
            repeated = self._keep_new(batch, good, keep)
            for _, raw, problems in sorted([*bad, *repeated], key=lambda each: each.place):
                num_rejected += 1
                for problem in problems:
                    counts[problem.reason] += 1
                row = BadRow(file=path.name, row=raw.number, line=raw.line, problems=tuple(problems))
                reject(row, raw.raw())
                if len(examples) < MAX_EXAMPLES:
                    examples.append(row)
        manifest = self._manifest(counts, num_rejected)
        return ValidationReport(manifest=manifest, bad_rows=tuple(examples), refusal=self._refusal(manifest, examples))

    def _checked_batches(self) -> Iterator[tuple[Path, RowBatch, GoodRows, list[BadInBatch]]]:
        self._num_read = 0
        for path, file_split, columns in self._files:
            checker = BatchChecker(self._task, columns, self._config.max_text_chars)
            for batch in read_batches(path, set(columns.names.values())):
                good, bad = checker.check(batch)
                yield path, batch, good._replace(is_test=self._is_test(good, file_split, columns)), bad
                self._advance(batch.num_rows)
        if self._on_progress is not None:
            self._on_progress(self._num_read)

    def _advance(self, num_rows: int) -> None:
        before, self._num_read = self._num_read, self._num_read + num_rows
        if self._on_progress is not None:
            for step in range(before // _PROGRESS_ROWS + 1, self._num_read // _PROGRESS_ROWS + 1):
                self._on_progress(step * _PROGRESS_ROWS)

    def _is_test(self, good: GoodRows, file_split: Split | None, columns: Columns) -> npt.NDArray[np.bool_]:
        """Which rows are test rows: decided by the file, else by the column "split", else by the rows' digests.

        If the task has frozen test rows, only rows with their texts are test rows; all other rows can be learned.
        """
        if file_split is not None:
            return np.full(len(good.places), file_split == "test")
        if "split" in columns.names:
            return good.is_test
        if self._has_frozen_rows:
            return self._test_inputs.contains(good.input_digests)
        return first_words(good.input_digests) / 2**32 < self._config.test_share

    def _survey(self, infers_labels: bool) -> None:
        """Read the files a first time to collect the texts of test rows and the labels."""
        spellings: dict[str, Counter[str]] = {}
        for _, _, good, _ in self._checked_batches():
            if self._is_split_given:
                self._test_inputs.add(good.input_digests[good.is_test])
            if infers_labels:
                for found in good.outputs.value_counts().to_pylist():
                    label = found["values"]
                    spellings.setdefault(label_key(label), Counter())[label] += found["counts"]
                    if len(spellings) > MAX_INFERRED_LABELS:
                        shown = spellings if self._config.include_texts else ()
                        raise DataValidationError(_too_many_labels(self._source, shown))
        if infers_labels:
            ranked = sorted(spellings.items(), key=lambda item: (-item[1].total(), item[0]))
            labels = tuple(min(found, key=lambda name: (-found[name], name)) for _, found in ranked)
            self._task = replace(self._task, labels=labels)

    def _keep_new(self, batch: RowBatch, good: GoodRows, keep: Callable[[pa.Table, Split], None]) -> list[BadInBatch]:
        """Keep new rows; return duplicates and training rows with the text of a test row."""
        columns = [good.inputs, good.outputs, hex_array(good.digests)]
        reasons: dict[int, Reason] = {}
        for split in _SPLITS:
            rows = np.flatnonzero(good.is_test == (split == "test"))
            if split == "test":
                self._test_inputs.add(good.input_digests[rows])
            else:
                is_leak = self._test_inputs.contains(good.input_digests[rows])
                reasons |= dict.fromkeys(rows[is_leak].tolist(), "text of a test row")
                self._leaks.add(good.digests[rows[is_leak]])
                rows = rows[~is_leak]
            is_new = self._kept[split].add(good.digests[rows])
            reasons |= dict.fromkeys(rows[~is_new].tolist(), "duplicate row")
            kept = pa.array(rows[is_new])
            keep(pa.Table.from_arrays([column.take(kept) for column in columns], schema=ROW_SCHEMA), split)
        places = good.places[list(reasons)].tolist()
        return [
            BadInBatch(place, raw, [Problem(reason, shorten(good.inputs[row].as_py()))])
            for place, raw, (row, reason) in zip(places, batch.rows(places), reasons.items(), strict=True)
        ]

    def _manifest(self, counts: Counter[str], num_rejected: int) -> DatasetManifest:
        train, test, leaks = (each.in_order() for each in (self._kept["train"], self._kept["test"], self._leaks))
        landed = {"landed": [train, test]}
        if self._is_split_given:
            landed = {"landed train": [train, leaks], "landed test": [test]}
        return DatasetManifest(
            task=self._task,
            sha256=self._digest({"train": [train], "test": [test]}),
            source=self._source.name,
            num_read=self._num_read,
            num_train=len(self._kept["train"]),
            num_test=len(self._kept["test"]),
            num_rejected=num_rejected,
            problems=dict(counts.most_common()),
            split="given" if self._is_split_given else "hash",
            retain_training_rows=self._config.retain_training_rows,
            files=tuple(sha256_of_input(path) for path in self._landed),
            landed_sha256=self._digest(landed),
        )

    def _digest(self, parts: Mapping[str, Sequence[memoryview]]) -> str:
        """Digest of the task's name and of each part's sorted row digests."""
        content = hashlib.sha256(json.dumps([SCHEMA_VERSION, self._task.name]).encode())
        for name, digests in parts.items():
            content.update(f"/{name}/".encode())
            for piece in merge_digests(*digests):
                content.update(piece)
        return content.hexdigest()

    def _refusal(self, manifest: DatasetManifest, examples: Sequence[BadRow]) -> str | None:
        name, num_good = manifest.source, manifest.num_train + manifest.num_test
        limit = self._config.max_bad_share
        if not manifest.num_read:
            return f"{name} has no rows; land a file with rows."
        if manifest.num_rejected > limit * manifest.num_read:
            share = manifest.num_rejected / manifest.num_read
            counts = ", ".join(f"{count} × {reason}" for reason, count in manifest.problems.items())
            first = "; ".join(bad.describe(self._config.include_texts) for bad in examples[:_SHOWN_EXAMPLES])
            return (
                f"{name}: {manifest.num_rejected} of {manifest.num_read} rows cannot be used ({share:.1%}, allowed are "
                f"{limit:.1%}): {counts}. The first: {first}. Correct these rows and land the file again, or raise "
                "data.max_bad_share."
            )
        if not manifest.num_train:
            return f"{name} leaves no row to train on ({num_good} good rows, all of them test rows); add training rows."
        if not manifest.num_test and not self._has_frozen_rows:
            return (
                f"{name} leaves no row to test with ({num_good} good rows); add rows, a test file (test_data) "
                "or a column split with train and test."
            )
        return None


def _columns_of(path: Path, task: TaskSchema, split: Split | None, config: DataConfig) -> Columns:
    names = read_columns(path)
    if not names and file_kind(path) == "jsonl":
        # No line is readable: with the format's own names, every line is reported.
        names = COLUMNS_OF_FORMAT["labelled" if task.format == "auto" else task.format]
        task = replace(task, columns={})
    columns = resolve_columns(names, task, path.name, include_texts=config.include_texts)
    if split is not None:  # the file belongs to one split; a column "split" in it is ignored
        columns = replace(columns, names={ours: name for ours, name in columns.names.items() if ours != "split"})
    return columns


def _too_many_labels(source: Path, labels: Collection[str]) -> str:
    some = ", ".join(repr(shorten(label, 30)) for label in sorted(labels)[:5])
    return (
        f"{source.name} has more than {MAX_INFERRED_LABELS} different labels{f', such as {some}' if some else ''}; "
        "list the right ones in task.labels, "
        "or set task.format to completion and task.columns to {prompt: …, completion: …} if the answers are free text."
    )


class DatasetFiles:
    """Writes train.parquet and test.parquet in row groups, quarantine.jsonl, and at the end manifest.json.

    A line of quarantine.jsonl has file, row, line, reason, value, more problems if any, and the raw row. If the
    context ends without `publish`, only quarantine.jsonl remains: an unfinished dataset never looks finished.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        for name in ("manifest.json", "train.parquet", "test.parquet"):
            (folder / name).unlink(missing_ok=True)
        self._tables = {split: _RowWriter(folder / f"{split}.parquet.part") for split in ("train", "test")}
        self.quarantine_path = folder / "quarantine.jsonl"
        # A lone surrogate (a byte that was not UTF-8) becomes its JSON escape.
        self._quarantine: TextIO = self.quarantine_path.open(
            "w", encoding="utf-8", errors="backslashreplace", newline="\n"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._quarantine.close()
        for table in self._tables.values():
            table.close()
            table.path.unlink(missing_ok=True)

    def add(self, rows: pa.Table, split: Split) -> None:
        """Write good rows with the columns of ROW_SCHEMA."""
        self._tables[split].add(rows)

    def reject(self, bad: BadRow, raw: object) -> None:
        """Write one bad row to quarantine.jsonl."""
        first, *more = bad.problems
        entry = {"file": bad.file, "row": bad.row, "line": bad.line, "reason": first.reason, "value": first.value}
        if more:
            entry["more"] = [problem._asdict() for problem in more]
        self._quarantine.write(json.dumps({**entry, "raw": raw}, ensure_ascii=False, default=_as_json) + "\n")

    def publish(self, manifest: DatasetManifest) -> None:
        """Move the finished files to their final names."""
        for split, table in self._tables.items():
            table.close()
            os.replace(table.path, self._folder / f"{split}.parquet")
        part = self._folder / "manifest.json.part"
        part.write_text(json.dumps(manifest.to_json(), ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
        os.replace(part, self._folder / "manifest.json")


class _RowWriter:
    """Writes rows to one Parquet file by row groups."""

    def __init__(self, path: Path) -> None:
        self.path = path
        # Texts and digests rarely repeat, so a dictionary would be built and discarded.
        self._writer = pq.ParquetWriter(path, ROW_SCHEMA, compression="zstd", use_dictionary=["output"])
        self._waiting = ROW_SCHEMA.empty_table()

    def add(self, rows: pa.Table) -> None:
        self._waiting = pa.concat_tables([self._waiting, rows])
        if self._waiting.num_rows >= _GROUP_ROWS or self._waiting.nbytes >= _GROUP_BYTES:
            self._flush()

    def close(self) -> None:
        if self._writer.is_open:
            self._flush()
            self._writer.close()

    def _flush(self) -> None:
        if self._waiting.num_rows:
            self._writer.write_table(self._waiting, row_group_size=_GROUP_ROWS)
        self._waiting = ROW_SCHEMA.empty_table()


def _as_json(value: object) -> str:
    return value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else str(value)
