"""Build a dataset from a landed file: check every row, quarantine bad rows, and split good rows permanently."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from deal_core.config import DataConfig
from deal_core.data.batch_check import BadInBatch, BatchChecker, GoodRows, side_by_side
from deal_core.data.chats import earlier_turns
from deal_core.data.check import is_whole_number, numbers_for_labels, too_many_labels
from deal_core.data.columns import SPLITTING, Columns
from deal_core.data.dataset_files import DatasetFiles
from deal_core.data.reading.lines import sha256_of_input
from deal_core.data.reading.readers import read_batches
from deal_core.data.rows import (
    BadRow,
    DigestSet,
    Problem,
    Reason,
    RowBatch,
    as_digests,
    first_words,
    merge_digests,
)
from deal_core.data.schema import (
    REJECTED,
    SCHEMA_VERSION,
    DatasetManifest,
    Split,
    TaskSchema,
    label_key,
)
from deal_core.data.shapes import completed_task, recognise
from deal_core.errors import DataValidationError
from deal_core.safe_text import shorten

MAX_INFERRED_LABELS = 64
MAX_EXAMPLES = 20
MIN_DRAWN = 0.5
"""Rows drawn at random become new test rows if they are at least this part of the usual share of test rows."""
_PROGRESS_ROWS = 1000
_SHOWN_EXAMPLES = 3
_SPLITS: tuple[Split, Split] = ("test", "train")


@dataclass(frozen=True, kw_only=True)
class ValidationReport:
    """Result of the checks of one arrival."""

    manifest: DatasetManifest
    bad_rows: tuple[BadRow, ...]
    """The first MAX_EXAMPLES bad rows; quarantine has all of them."""
    refusal: str | None
    """Why the arrival cannot be used, in one line; None if it can be used."""
    shape: str
    """What the file was recognised as, see `Columns.shape`."""
    num_several: int = 0
    """Good rows with several right answers."""
    example: tuple[str, str, str | None] | None = None
    """Stored input, output and worse answer (None: it has none) of the first good training row. Only `validate_file`
    gives it."""


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
    renews_tests: bool = False
    """Whether the file brings new test rows in place of the permanent ones: they are decided as for a new task."""
    on_progress: Callable[[int], None] | None = None
    """Called from time to time with the number of rows read. The file is read twice if it names its split, or if the
    labels are taken from it."""


def build_dataset(landing: Landing, folder: Path) -> DatasetManifest:
    """Check a landed file and write the dataset: train.parquet, test.parquet, manifest.json and quarantine.jsonl.

    Test rows are decided by a test file, else by the column "split", else by the digests of the rows' texts. A text's
    digest puts it on the same side in every file, with any answer. New test rows of a known task are those drawn at
    random, if the file says it (`is_random`) and they are enough: the others were chosen as uncertain, so they say
    nothing about the usual text. Files of an earlier call are replaced. The manifest has the task's format and labels
    filled in.

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


def validate_file(landing: Landing, on_rows: Callable[[pa.Table], None] | None = None) -> ValidationReport:
    """Only the checks of `build_dataset`: nothing is written, and a refusal is reported instead of raised.

    Args:
        landing: The files and their checks.
        on_rows: Called with the good training rows, a part at a time, in the form of ROW_SCHEMA.

    Raises:
        DataValidationError: The file cannot be read to its end.
    """
    examples: list[tuple[str, str, str | None]] = []

    def keep(rows: pa.Table, split: Split) -> None:
        if split == "train" and rows.num_rows:
            if not examples:
                first = rows.slice(0, 1).to_pylist()[0]
                examples.append((first["input"], first["output"], first.get(REJECTED.name)))
            if on_rows is not None:
                on_rows(rows)

    report = ArrivalReader(landing).validate(keep, lambda bad, raw: None)
    return replace(report, example=examples[0] if examples else None)


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
        self._files = [(path, split, _columns_of(path, split, landing)) for path, split in files]
        self._names_split = any(columns.splitting is not None for _, _, columns in self._files)
        self._is_split_given = self._names_split or test_source is not None
        self._task = completed_task(task, [columns for _, _, columns in self._files], source.name)
        # The completion of a chat in two columns is its last turn: the others belong to the prompt.
        in_one_column = all("messages" in columns.names for _, _, columns in self._files)
        self._learns_every_turn = self._task.assistant_turns == "all" and in_one_column
        self._frozen = as_digests(b"".join(landing.frozen_test_inputs))
        self._test_inputs = self._frozen_inputs()
        self._has_frozen_rows, self._renews_tests = bool(landing.frozen_test_inputs), landing.renews_tests
        self._kept: dict[Split, DigestSet] = {"train": DigestSet(), "test": DigestSet()}
        self._leaks = DigestSet()
        self._turns, self._beginnings = DigestSet(), DigestSet()

    def validate(
        self, keep: Callable[[pa.Table, Split], None], reject: Callable[[BadRow, object], None]
    ) -> ValidationReport:
        """Check every row in order; pass it to `keep` or to `reject`."""
        infers_labels = self._task.format == "labelled" and not self._task.labels
        if infers_labels or self._names_split:
            self._survey(infers_labels)
        counts: Counter[str] = Counter()
        examples: list[BadRow] = []
        num_rejected = num_several = 0
        for path, batch, good, bad in self._checked_batches():
            num_several += len(good.references) - good.references.null_count
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
        refusal, shape = self._refusal(manifest, examples), self._files[-1][-1].shape
        return ValidationReport(
            manifest=manifest, bad_rows=tuple(examples), refusal=refusal, shape=shape, num_several=num_several
        )

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
        """Which rows are test rows: decided by the file, else by its column, else by the rows' digests.

        If the task has frozen test rows and does not renew them, only rows with their texts are test rows; all other
        rows can be learned.
        """
        if file_split is not None:
            return np.full(len(good.places), file_split == "test")
        if columns.splitting is not None:
            return good.is_test
        if self._has_frozen_rows and not self._renews_tests:
            return self._test_inputs.contains(good.input_digests)
        return first_words(good.input_digests) / 2**32 < self._config.test_share

    def _frozen_inputs(self) -> DigestSet:
        inputs = DigestSet()
        inputs.add(self._frozen)
        return inputs

    def _judges_by_draw(self, num_random: int, num_rows: int) -> bool:
        """Whether the rows that were drawn at random are enough for test rows, and leave rows to learn."""
        return MIN_DRAWN * self._config.test_share * num_rows <= num_random < num_rows

    def _survey(self, infers_labels: bool) -> None:
        """Read the files a first time to collect the texts of test rows and the labels."""
        spellings: dict[str, Counter[str]] = {}
        num_good = num_test = 0
        for _, _, good, _ in self._checked_batches():
            num_good, num_test = num_good + len(good.places), num_test + int(good.is_test.sum())
            if self._is_split_given:
                self._test_inputs.add(good.input_digests[good.is_test])
            if infers_labels:
                for found in good.outputs.value_counts().to_pylist():
                    label = found["values"]
                    spellings.setdefault(label_key(label), Counter())[label] += found["counts"]
                    if len(spellings) > MAX_INFERRED_LABELS:
                        shown = spellings if self._config.include_texts else ()
                        raise DataValidationError(too_many_labels(self._source.name, shown, MAX_INFERRED_LABELS))
        if self._files[0][-1].splitting == "is_random" and not self._judges_by_draw(num_test, num_good):
            self._files = [(path, split, columns.without("is_random")) for path, split, columns in self._files]
            self._names_split = self._is_split_given = False
            self._test_inputs = self._frozen_inputs()
        if infers_labels:
            ranked = sorted(spellings.items(), key=lambda item: (-item[1].total(), item[0]))
            labels = tuple(min(found, key=lambda name: (-found[name], name)) for _, found in ranked)
            if labels and all(map(is_whole_number, labels)):
                raise DataValidationError(numbers_for_labels(self._source.name))
            self._task = replace(self._task, labels=labels)

    def _keep_new(self, batch: RowBatch, good: GoodRows, keep: Callable[[pa.Table, Split], None]) -> list[BadInBatch]:
        """Keep new rows; return duplicates and training rows with the text of a test row."""
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
            again = rows[~is_new]
            if split == "train":
                again = self._without_beginnings(good, again)
            reasons |= dict.fromkeys(again.tolist(), "duplicate row")
            keep(good.table(rows[is_new], split), split)
            if self._learns_every_turn and split == "train":
                self._keep_turns(good.inputs.take(pa.array(rows[is_new])), keep)
        places = good.places[list(reasons)].tolist()
        return [
            BadInBatch(place, raw, [Problem(reason, shorten(good.inputs[row].as_py()))])
            for place, raw, (row, reason) in zip(places, batch.rows(places), reasons.items(), strict=True)
        ]

    def _without_beginnings(self, good: GoodRows, again: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Leave out rows that were kept as an earlier turn of a longer chat, each once: they are no duplicates."""
        is_turn = self._turns.contains(good.digests[again])
        is_first = self._beginnings.add(good.digests[again[is_turn]])
        return np.concatenate([again[~is_turn], again[is_turn][~is_first]])

    def _keep_turns(self, inputs: pa.Array, keep: Callable[[pa.Table, Split], None]) -> None:
        """Keep the earlier turns of training chats as training rows.

        A turn is left out if its text is a test row's, or lies on the test side of the hash: a later chat may be that
        test row.
        """
        found = [turn for input in inputs.to_pylist() for turn in earlier_turns(input)]
        if not found:
            return
        turns = side_by_side(found)
        is_apart = self._test_inputs.contains(turns.input_digests)
        if not self._is_split_given:
            is_apart |= self._is_test(turns, None, self._files[0][-1])
        rows = np.flatnonzero(~is_apart)
        rows = rows[self._kept["train"].add(turns.digests[rows])]
        self._turns.add(turns.digests[rows])
        keep(turns.table(rows, "train"), "train")

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
            num_turns=len(self._turns) - len(self._beginnings),
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


def _columns_of(path: Path, split: Split | None, landing: Landing) -> Columns:
    """The file's columns. Of several ways to name the split one is left: the file, "split", then "is_random"."""
    columns = recognise(path, landing.task, include_texts=landing.config.include_texts)
    if split is not None:
        return columns.without(*SPLITTING)
    is_drawn = landing.renews_tests and columns.splitting == "is_random"
    return columns if is_drawn else columns.without("is_random")
