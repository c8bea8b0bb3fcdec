"""Build a dataset from an arrival's files: check every row, quarantine bad rows, and split good rows permanently."""

from __future__ import annotations

import hashlib
import json
import math
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from deal_core.config import DataConfig
from deal_core.data.arrow_rows import chosen, digests_in, good_rows
from deal_core.data.chats import earlier_turns
from deal_core.data.columns import SPLITTING, Columns
from deal_core.data.contradictions import ContradictionFinder
from deal_core.data.dataset_files import DatasetFiles, NoFiles
from deal_core.data.digest_set import Digests, DigestSet, OrderedDigests, StoredDigests, merge_digests
from deal_core.data.doubts import DoubtFinder
from deal_core.data.near_tests import NearTests
from deal_core.data.reading.batches import RowBatch
from deal_core.data.reading.readers import read_batches
from deal_core.data.row_checks import (
    Checked,
    Problems,
    RowChecker,
    is_whole_number,
    numbers_for_labels,
    too_many_labels,
)
from deal_core.data.rows import NEAR, BadRow, Problem, Reason, RowTally
from deal_core.data.schema import SCHEMA_VERSION, DatasetManifest, Split, TaskSchema, label_key
from deal_core.data.shapes import completed_task, recognise
from deal_core.data.source_files import SourceFile, SourceFiles, digests_of, name_of, naming, require_one_kind
from deal_core.errors import DataValidationError
from deal_core.safe_text import listed, shorten

MAX_INFERRED_LABELS = 64
MIN_TESTS = 30
"""Test rows that a first arrival gives at least, or a third of its rows where a third is fewer."""
MANY_TEXTS = 1000
"""From this number of texts on, a threshold of the digests draws a share that is near enough."""
MIN_DRAWN = 0.5
"""Rows drawn at random become new test rows if they are at least this part of the usual share of test rows."""

Keep = Callable[[pa.RecordBatch, Split], None]
"""Takes good rows, see GOOD_ROWS, of a split."""


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


class ArrivalRefusedError(DataValidationError):
    """The arrival was read to its end and cannot be used."""

    code = "arrival-refused"

    def __init__(self, message: str, report: ValidationReport) -> None:
        super().__init__(message)
        self.report = report


@dataclass(frozen=True, kw_only=True)
class Landing:
    """The files of one arrival, and the settings of their checks."""

    sources: SourceFiles
    """The landed files in the order of their rows; all have one format, see `read_batches`."""
    task: TaskSchema
    """The task; its format may be "auto", and a labelled task without labels gets the labels of the file."""
    config: DataConfig
    test_sources: SourceFiles = ()
    """Files with the test rows; `sources` then hold only training rows."""
    frozen_test_inputs: Collection[bytes] = ()
    """Digests (`stored_input_digest`) of the texts of the task's permanent test rows. Training rows with such a text
    are bad rows. If the file names no split, only rows with these texts are test rows."""
    near_tests: NearTests = field(default_factory=NearTests)
    """The permanent test rows. Training rows that nearly equal one of them are bad rows too."""
    num_lacking: int = 0
    """Test rows that the task lacks. So many new rows at most, and `test_share` of them, are added to the permanent
    ones, unless the file names a split."""
    learned_inputs: Collection[bytes] = ()
    """If test rows are lacking: digests of the texts that the lineage has been trained on, which never test it."""
    renews_tests: bool = False
    """Whether the file brings new test rows in place of the permanent ones: they are decided as for a new task."""
    new_label_remedy: str = "A label that is new is added to the task's labels: task.labels."
    """What to do about a label that the task does not have, as a sentence."""
    on_progress: Callable[[int], None] | None = None
    """Called after each batch with the number of rows read. The files are read twice if they name their split, or if
    the labels are taken from them, or if test rows are lacking. Their first rows are read twice if digests choose the
    test rows of a new task."""

    @property
    def name(self) -> str:
        """How messages name the arrival."""
        return name_of(self.sources)


def build_dataset(landing: Landing, folder: Path) -> DatasetManifest:
    """Check a landed file and write the dataset: train.parquet, test.parquet, manifest.json and quarantine.jsonl.

    Test rows are decided by a test file, else by the column "split", else by the digests of the rows' texts: those with
    the smallest digests are test rows, whatever their answer is and whatever the order of the rows is. They are
    `test_share` of the rows, and at least MIN_TESTS or a third. New test rows of a known task are those drawn at
    random, if the file says it (`is_random`) and they are enough: the others were chosen as uncertain, so they say
    nothing about the usual text. A known task that lacks test rows gets them by the digests of new texts too. Training
    rows with the text of a test row are bad rows, and so are those that nearly equal one (see `NearTests`). Files of an
    earlier call are replaced. The manifest has the task's format and labels filled in.

    Raises:
        ArrivalRefusedError: There are too many bad rows, no training row or no test row; quarantine.jsonl is written.
        DataValidationError: The file cannot be read to its end.
    """
    reader = ArrivalReader(landing)
    with DatasetFiles(folder, reader.task) as files:
        report = reader.validate(files)
        if report.refusal is not None:
            where = f" The bad rows are listed in {files.quarantine_path}." if report.bad_rows else ""
            raise ArrivalRefusedError(report.refusal + where, report)
        return files.publish(report.manifest)


def validate_file(landing: Landing, on_rows: Callable[[pa.RecordBatch], None] = lambda rows: None) -> ValidationReport:
    """Only the checks of `build_dataset`: nothing is left on the disk, and a refusal is reported instead of raised.

    `on_rows` is called with the good training rows (see GOOD_ROWS), a part at a time, and with those among them that
    nearly equal a test row: which these are is known at the end.

    Raises:
        DataValidationError: The file cannot be read to its end.
    """
    with NoFiles() as files:
        return ArrivalReader(landing).validate(files, on_rows)


class _File(NamedTuple):
    """A file of the arrival, the split of its rows if the user gave it, and its columns."""

    source: SourceFile
    split: Split | None
    columns: Columns

    def without(self, *dropped: str) -> _File:
        return self._replace(columns=self.columns.without(*dropped))


class ArrivalReader:
    """The files of one arrival while they are checked."""

    def __init__(self, landing: Landing) -> None:
        self._landing, self._config = landing, landing.config
        # Test rows are read first, so that a training row with a test row's text is found.
        sources: dict[Split | None, SourceFiles] = {None: landing.sources}
        if landing.test_sources:
            sources = {"test": landing.test_sources, "train": landing.sources}
        for files in sources.values():
            require_one_kind(files)
        # Good test rows make up for no bad training rows.
        self._counts = {split: RowTally(name_of(files)) for split, files in sources.items()}
        self._files = _alike(
            [
                _File(file, split, _columns_of(file, split, landing))
                for split, files in sources.items()
                for file in files
            ]
        )
        self._names_split = any(file.columns.splitting is not None for file in self._files)
        self._is_split_given = self._names_split or bool(landing.test_sources)
        self.task = completed_task(landing.task, [(file.source.name, file.columns) for file in self._files])
        # The completion of a chat in two columns is its last turn: the others belong to the prompt.
        in_one_column = all("messages" in file.columns.names for file in self._files)
        self._learns_every_turn = self.task.assistant_turns == "all" and in_one_column
        self._frozen = frozenset(landing.frozen_test_inputs)
        self._frozen_set, self._test_inputs = DigestSet(self._frozen), DigestSet(self._frozen)
        self._turns, self._beginnings = DigestSet(), DigestSet()
        self._is_new = not self._frozen or landing.renews_tests  # the test rows are decided as for a new task
        self._grows = not self._is_new and not self._is_split_given and landing.num_lacking > 0
        self._learned_set = DigestSet(landing.learned_inputs)
        self._test_interval = 0.0 if self._grows else self._config.test_share
        """A text is a test row's if its `_unit_interval` is below."""
        self._num_added = 0
        self._near_tests = landing.near_tests.copy()
        # of the kept training rows, to name those that are left out in the end
        self._numbers = array("q")
        """As `RawRow.number`; 0: an earlier turn of a chat."""
        self._files_read: list[tuple[int, str]] = []
        """The place of each file's first row in `_numbers`, and the file's name."""
        self._num_near_turns = 0

    def validate(
        self, files: DatasetFiles | NoFiles, on_rows: Callable[[pa.RecordBatch], None] = lambda rows: None
    ) -> ValidationReport:
        """Check every row in order, and write it. For `on_rows` see `validate_file`."""

        def keep(rows: pa.RecordBatch, split: Split) -> None:
            files.add(rows, split)
            if split == "train":
                on_rows(rows)

        infers_labels = self.task.format == "labelled" and not self.task.labels
        if infers_labels or self._names_split:
            self._survey(infers_labels)
        elif self._chooses_tests:
            with suppress(DataValidationError):  # the second reading meets the same fault, and keeps the bad rows
                self._survey(infers_labels)
        with StoredDigests() as train, StoredDigests() as test, StoredDigests() as leaks:
            self._kept: dict[Split, StoredDigests] = {"train": train, "test": test}
            self._leaks = leaks
            self._contradictions = ContradictionFinder(self.task, self._kept, include_texts=self._config.include_texts)
            self._doubts = DoubtFinder(self.task)
            num_several = 0
            for file, batch, checked in self._checked_batches():
                counts = self._counts[file.split]
                if not self._files_read or self._files_read[-1][1] != file.source.name:
                    self._files_read.append((len(self._numbers), file.source.name))
                self._doubts.read(file.source.name, batch, checked.good)
                num_several += checked.good.num_rows - checked.good.column("references").null_count
                bad = dict(sorted({**checked.bad, **self._keep_new(checked.good, file, batch, keep)}.items()))
                for raw, problems in zip(batch.rows([*bad]), bad.values(), strict=True):
                    row = BadRow(file=file.source.name, row=raw.number, line=raw.line, problems=tuple(problems))
                    counts.add_bad(row)
                    files.reject(row, raw.raw())
            near = self._leave_out_near_tests(files) if self._near_tests else np.zeros(0, "S32")
            manifest, all_counts = self._manifest(near), self._counts.values()
        too_many_bad = (counts.refusal(self._config, self._landing.new_label_remedy) for counts in all_counts)
        return ValidationReport(
            manifest=manifest,
            bad_rows=tuple(row for counts in all_counts for row in counts.examples),
            refusal=next(filter(None, too_many_bad), None) or self._lacks_rows(manifest),
            shape=self._files[-1].columns.shape,
            num_several=num_several,
        )

    def _checked_batches(self) -> Generator[tuple[_File, RowBatch, Checked]]:
        """The batches of all files, and what was found in each."""
        for counts in self._counts.values():
            counts.num_read = 0
        for file in self._files:
            checker = RowChecker(self.task, file.columns, self._config.max_text_chars)
            rows = read_batches(file.source.path, {*file.columns.names.values()})
            with naming(file.source), closing(rows) as batches:
                for batch in batches:
                    _refuse_late_keys(batch, file)
                    yield file, batch, checker.check(batch)
                    self._counts[file.split].num_read += len(batch)
                    if self._landing.on_progress is not None:
                        self._landing.on_progress(sum(counts.num_read for counts in self._counts.values()))

    def _is_test(self, good: pa.RecordBatch, file: _File) -> npt.NDArray[np.bool_]:
        """Which rows are test rows: the file or its column decides, or else the digests of the rows' texts."""
        if file.split is not None:
            return np.full(good.num_rows, file.split == "test")
        if file.columns.splitting is not None:
            return np.asarray(good.column("is_test").to_numpy(zero_copy_only=False), np.bool_)
        return self._is_test_text(digests_in(good, "input_digest"))

    def _is_test_text(self, input_digests: Digests) -> npt.NDArray[np.bool_]:
        """Which texts are test rows' by their digests.

        If the task has frozen test rows and does not renew them, rows with their texts are test rows, and those that
        are added. All other rows can be learned.
        """
        if self._is_new:
            return _unit_interval(input_digests) < self._test_interval
        is_test = self._frozen_set.contains(input_digests)
        if self._grows:
            is_small = _unit_interval(input_digests) < self._test_interval
            is_test |= is_small & ~self._learned_set.contains(input_digests)
        return is_test

    @property
    def _chooses_tests(self) -> bool:
        """Whether digests choose new test rows."""
        return self._grows or (self._is_new and not self._is_split_given)

    def _survey(self, infers_labels: bool) -> None:
        """Read the files a first time to collect the texts of test rows and the labels."""
        spellings: dict[str, Counter[str]] = {}
        num_good = num_test = 0
        texts = np.zeros(0)  # their places in the unit interval, each once; only the smallest can become test rows
        share, lacking = self._config.test_share, self._landing.num_lacking
        most_texts = math.ceil(lacking / share) if self._grows else None
        is_drawn = self._files[0].columns.splitting == "is_random"
        with closing(self._checked_batches()) as batches:
            for file, _, (good, _) in batches:
                is_test = self._is_test(good, file)
                num_good, num_test = num_good + good.num_rows, num_test + int(is_test.sum())
                if self._is_split_given:
                    self._test_inputs.add(digests_in(good, "input_digest")[is_test])
                if self._grows or len(texts) <= MANY_TEXTS:
                    inputs = digests_in(good, "input_digest")
                    if self._grows:
                        inputs = inputs[~(self._frozen_set.contains(inputs) | self._learned_set.contains(inputs))]
                    texts = np.unique(np.concatenate([texts, _unit_interval(inputs)]))[:most_texts]
                elif not (infers_labels or self._names_split):
                    break
                if infers_labels:
                    for count in good.column("output").value_counts().to_pylist():
                        label = count["values"]
                        spellings.setdefault(label_key(label), Counter())[label] += count["counts"]
                    if len(spellings) > MAX_INFERRED_LABELS:
                        shown = spellings if self._config.include_texts else ()
                        raise DataValidationError(too_many_labels(self._landing.name, shown, MAX_INFERRED_LABELS))
        # Rows that were drawn at random judge only if they are enough, and leave rows to learn.
        if is_drawn and not MIN_DRAWN * share * num_good <= num_test < num_good:
            self._files = [file.without("is_random") for file in self._files]
            self._is_split_given = False
            self._test_inputs = DigestSet(self._frozen)
        if self._grows or (self._chooses_tests and len(texts) <= MANY_TEXTS):
            usual = round(share * len(texts))
            number = min(usual, lacking) if self._grows else max(usual, min(MIN_TESTS, len(texts) // 3))
            self._test_interval = float(texts[number - 1]) + 2**-32 if number else 0.0
        if infers_labels:
            # The commonest label comes first, in its commonest spelling.
            ranked = sorted(spellings.items(), key=lambda item: (-item[1].total(), item[0]))
            labels = tuple(min(counts, key=lambda name: (-counts[name], name)) for _, counts in ranked)
            if labels and all(map(is_whole_number, labels)):
                raise DataValidationError(numbers_for_labels(self._landing.name))
            self.task = replace(self.task, labels=labels)

    def _keep_new(self, good: pa.RecordBatch, file: _File, batch: RowBatch, keep: Keep) -> Problems:
        """Keep new rows; return duplicates and training rows with the text of a test row."""
        is_test = self._is_test(good, file)
        test, train = chosen(good, is_test), chosen(good, ~is_test)
        self._test_inputs.add(digests_in(test, "input_digest"))
        is_leak = self._test_inputs.contains(digests_in(train, "input_digest"))
        leaks, train = chosen(train, is_leak), chosen(train, ~is_leak)
        self._leaks.add(digests_in(leaks, "digest"))
        repeated = [self._keep_first("test", test, batch, keep)]
        repeated += self._without_beginnings(self._keep_first("train", train, batch, keep))
        return _as_bad([leaks], "text of a test row") | _as_bad(repeated, "duplicate row")

    def _keep_first(self, split: Split, rows: pa.RecordBatch, batch: RowBatch, keep: Keep) -> pa.RecordBatch:
        """Keep rows of a split, and the earlier turns of training chats; return the rows that were there before."""
        is_new = self._kept[split].add(digests_in(rows, "digest"))
        new = chosen(rows, is_new)
        keep(new, split)
        if self._grows and split == "test":
            self._num_added += int((~self._frozen_set.contains(digests_in(new, "input_digest"))).sum())
        self._contradictions.add(new, split)
        if split == "train":
            self._numbers.extend(batch.numbers(new.column("place").to_pylist()))
        elif self._is_new or self._grows:
            self._near_tests.add(new.column("input"), new.column("output"))
        if self._learns_every_turn and split == "train":
            self._keep_turns(new, keep)
        return chosen(rows, ~is_new)

    def _without_beginnings(self, repeated: pa.RecordBatch) -> list[pa.RecordBatch]:
        """Leave out rows that were kept as an earlier turn of a longer chat, each once: they are no duplicates."""
        is_turn = self._turns.contains(digests_in(repeated, "digest"))
        turns = chosen(repeated, is_turn)
        is_first = self._beginnings.add(digests_in(turns, "digest"))
        return [chosen(repeated, ~is_turn), chosen(turns, ~is_first)]

    def _keep_turns(self, chats: pa.RecordBatch, keep: Keep) -> None:
        """Keep the earlier turns of training chats as training rows.

        A turn is left out if its text is a test row's, or lies on the test side of the hash: a later chat may be that
        test row.
        """
        turns = good_rows([turn for chat in chats.column("input").to_pylist() for turn in earlier_turns(chat)])
        inputs = digests_in(turns, "input_digest")
        is_apart = self._test_inputs.contains(inputs)
        if not self._is_split_given:
            is_apart |= self._is_test_text(inputs)
        turns = chosen(turns, ~is_apart)
        turns = chosen(turns, self._kept["train"].add(digests_in(turns, "digest")))
        self._turns.add(digests_in(turns, "digest"))
        self._numbers.extend([0] * turns.num_rows)
        keep(turns, "train")

    def _leave_out_near_tests(self, files: DatasetFiles | NoFiles) -> OrderedDigests:
        """Leave out the training rows that nearly equal a test row; return their digests. All test rows are known."""
        counts = self._counts["train" if self._landing.test_sources else None]
        starts = [start for start, _ in self._files_read]
        parts, place = [np.zeros(0, np.bool_)], 0
        for rows in files.training_rows():
            parts.append(self._near_tests.find(rows.column("input"), rows.column("output")))
            for offset in np.flatnonzero(parts[-1]).tolist():
                number = self._numbers[place + offset]
                if number:  # a turn is no row of its own
                    input, output = rows.column("input")[offset].as_py(), rows.column("output")[offset].as_py()
                    file = self._files_read[bisect_right(starts, place + offset) - 1][1]
                    problems = (Problem(NEAR, shorten(input)),)
                    bad = BadRow(file=file, row=number, line=None, problems=problems)
                    counts.add_bad(bad)
                    files.reject(bad, {"input": input, "output": output})
                else:
                    self._num_near_turns += 1
            place += rows.num_rows
        is_near = np.concatenate(parts)
        if not is_near.any():
            return np.zeros(0, "S32")
        files.leave_out(is_near)
        return self._kept["train"].take_out(is_near)

    def _manifest(self, near: OrderedDigests) -> DatasetManifest:
        contradictions = self._contradictions.found()  # before the digests are put in order
        train, test, leaks = (rows.in_order() for rows in (self._kept["train"], self._kept["test"], self._leaks))
        counts = self._counts.values()
        problems = sum((side.problems for side in counts), Counter[str]())
        landing, landed = self._landing, {"landed": [train, near, test]}
        training_files = digests_of(landing.sources)
        if self._is_split_given:
            landed = {"landed train": [train, near, leaks], "landed test": [test]}
        return DatasetManifest(
            task=self.task,
            sha256=self._digest({"train": [train], "test": [test]}),
            source=landing.name,
            num_read=sum(side.num_read for side in counts),
            num_train=len(self._kept["train"]),
            num_test=len(self._kept["test"]),
            num_added=self._num_added,
            num_rejected=sum(side.num_bad for side in counts),
            num_turns=len(self._turns) - len(self._beginnings) - self._num_near_turns,
            problems=dict(problems.most_common()),
            split="given" if self._is_split_given else "hash",
            retain_training_rows=self._config.retain_training_rows,
            files=tuple(dict.fromkeys((*training_files, *digests_of(landing.test_sources)))),
            num_training_files=len(training_files),
            landed_sha256=self._digest(landed),
            contradictions=contradictions,
            doubts=self._doubts.found(),
        )

    def _digest(self, parts: Mapping[str, Sequence[OrderedDigests]]) -> str:
        """Digest of the task's name and of each part's sorted row digests."""
        content = hashlib.sha256(json.dumps([SCHEMA_VERSION, self.task.name]).encode())
        for name, digests in parts.items():
            content.update(f"/{name}/".encode())
            for piece in merge_digests(*digests):
                content.update(piece)
        return content.hexdigest()

    def _lacks_rows(self, manifest: DatasetManifest) -> str | None:
        name, num_good = manifest.source, manifest.num_train + manifest.num_test
        if not manifest.num_read:
            return f"{name} has no rows; land a file with rows."
        if not manifest.num_train:
            return f"{name} leaves no row to train on ({num_good} good rows, all of them test rows); add training rows."
        if not manifest.num_test and not self._frozen:
            return (
                f"{name} leaves no row to test with ({num_good} good rows); add rows, a test file (test_data) "
                "or a column split with train and test."
            )
        return None


def _columns_of(file: SourceFile, split: Split | None, landing: Landing) -> Columns:
    """The file's columns. Of several ways to name the split one is left: the file, "split", then "is_random"."""
    with naming(file):
        columns = recognise(file.path, landing.task, include_texts=landing.config.include_texts)
    if split is not None:
        return columns.without(*SPLITTING)
    is_drawn = landing.renews_tests and columns.splitting == "is_random"
    return columns if is_drawn else columns.without("is_random")


def _alike(files: list[_File]) -> list[_File]:
    """The files, which say the split of their rows in the same way. Rows drawn at random count if all files say it.

    Raises:
        DataValidationError: Some files have a column "split", and others have none.
    """
    ways = {file.columns.splitting for file in files if file.split is None}
    if len(ways) > 1 and "split" in ways:
        lacking = [file.source.name for file in files if file.columns.splitting != "split"]
        raise DataValidationError(
            f"{listed(lacking)} {'has' if len(lacking) == 1 else 'have'} no column split, and the other files of the "
            "arrival have one; give all of them this column, or none."
        )
    return [file.without("is_random") for file in files] if len(ways) > 1 else files


def _refuse_late_keys(batch: RowBatch, file: _File) -> None:
    """Refuse a file one of whose rows has a key that would have been read if the first rows had it."""
    unread = file.columns.unread
    for raw in batch.rows() if unread else ():
        if not unread.isdisjoint(raw.values):
            key = min(unread.intersection(raw.values))
            raise DataValidationError(
                f"{file.source.name}: row {raw.number} has the key {key}, which the first rows lack, so it would not "
                "be read. Put a row with this key first, or leave the key out."
            )


def _unit_interval(digests: Digests) -> npt.NDArray[np.float64]:
    """Return a number of [0, 1) for each digest: its first 32 bits, which are as good as random."""
    return np.ascontiguousarray(digests).view(">u4")[::8] / 2**32  # a digest has eight numbers of 32 bits


def _as_bad(batches: Sequence[pa.RecordBatch], reason: Reason) -> Problems:
    return {
        place: [Problem(reason, shorten(input))]
        for rows in batches
        for place, input in zip(rows.column("place").to_pylist(), rows.column("input").to_pylist(), strict=True)
    }
