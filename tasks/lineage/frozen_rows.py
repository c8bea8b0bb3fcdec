"""The frozen test rows of a lineage's tasks, the rows that a new version answers, and the stored answers.

Answers stay in the object store next to the adapter. MLflow gets no answer.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from deal_core.data.rows import stored_input_digest
from deal_core.data.schema import REFERENCES, REJECTED, ROW_SCHEMA, DatasetManifest, TaskSchema
from deal_core.errors import StoreError
from deal_core.evaluation.answering import ServedTask
from deal_core.evaluation.metrics import score_answers
from deal_core.regular_file import sha256_of_file
from deal_core.schema_version import require_schema_version
from infra.report.run_report import Changed, Example
from infra.store.base import ObjectStore, temporary_folder
from infra.store.keys import TEST_FILE, task_and_digest
from infra.store.stored import reading_stored
from infra.versions import Version
from tasks.lineage.datasets import read_manifest
from tasks.lineage.record import FrozenRows, KnownTask, read_record
from tasks.lineage.tombstones import forgotten_tests, require_test_rows

if TYPE_CHECKING:
    from datasets import Dataset

SCHEMA_VERSION = 1
ANSWERS_FILE = "answers.json"

Answers = dict[str, dict[str, str]]
"""Answers by task and by digest (sha256) of the test row."""
MAX_EXAMPLES = 10
"""Examples of each kind and task."""
CLEAR_CHANGE = 0.1
"""Smallest change of a row's score that counts as gained or lost; for right and wrong answers the change is 1."""
MAX_CHARS = 400
"""Characters of each text in an example."""


@dataclass(frozen=True, kw_only=True)
class TestSet(ServedTask):
    """The frozen test rows of one task, and how the version whose record names the task serves it."""

    rows: Dataset


def load_test_set(store: ObjectStore, known: KnownTask) -> TestSet:
    """Load the test rows that judge a task, without those that were forgotten.

    Raises:
        TestRowsForgottenError: All of them were forgotten.
        ObjectNotFoundError: A file of the rows is missing.
        StoreError: A file of the rows is damaged, or was altered after its dataset was made.
    """
    from datasets import Dataset

    require_test_rows(store, known.schema.name, known.test_uris)
    columns = (*ROW_SCHEMA.names, REFERENCES.name, REJECTED.name)
    return TestSet(
        schema=known.schema,
        rows=Dataset(read_tests(store, known, columns)),
        max_prompt_tokens=known.max_prompt_tokens,
        max_new_tokens=known.max_new_tokens,
    )


def load_added(store: ObjectStore, known: KnownTask) -> TestSet:
    """Load the test rows that a version adds to a task; the errors are those of `load_test_set`."""
    judging, grown = load_test_set(store, known), load_test_set(store, known.grown())
    return replace(grown, rows=grown.rows.select(range(len(judging.rows), len(grown.rows))))


def parts_left(store: ObjectStore, known: KnownTask) -> tuple[FrozenRows, ...]:
    """Return those of a task's test rows that were not forgotten."""
    return tuple(part for part in known.tests if forgotten_tests(store, known.schema.name, [part.dataset_uri]) is None)


def read_tests(store: ObjectStore, known: KnownTask, columns: Sequence[str]) -> pa.Table:
    """Read columns, "input" among them, of the test rows that judge a task and were not forgotten.

    Rows with a text of an earlier arrival are left out: a later arrival may have repeated it.

    Raises:
        ObjectNotFoundError: A file of the rows is missing.
        StoreError: A file of the rows is damaged, or was altered after its dataset was made.
    """
    kind, tables, texts = known.schema.format, list[pa.Table](), set[bytes]()
    assert kind != "auto", "a task that was learned has a format"
    for part in parts_left(store, known):
        table = read_test_rows(store, part.dataset_uri, columns)
        if len(known.tests) > 1:
            digests = [stored_input_digest(kind, text) for text in table.column("input").to_pylist()]
            table = table.filter(pa.array([digest not in texts for digest in digests], pa.bool_()))
            texts.update(digests)
        tables.append(table)
    return pa.concat_tables(tables, promote_options="default")


def require_tests(store: ObjectStore, known: KnownTask) -> None:
    """Require that a task has test rows, and that they are those that its datasets were made with.

    Raises:
        TestRowsForgottenError: All of them were forgotten.
        ObjectNotFoundError: A file of the rows is missing.
        StoreError: A file of the rows was altered.
    """
    require_test_rows(store, known.schema.name, known.test_uris)
    for part in parts_left(store, known):
        require_unaltered(store, part.dataset_uri)


def read_test_rows(store: ObjectStore, dataset_uri: str, columns: Sequence[str], *, file: str = TEST_FILE) -> pa.Table:
    """Read columns of a dataset's test rows. REFERENCES and REJECTED are left out where the file does not have them.

    `file` is TRAIN_FILE for the training rows, which have the same columns.

    Raises:
        ObjectNotFoundError: The file is missing.
        StoreError: The file is damaged, or was altered after its dataset was made.
    """
    with _unaltered_file(store, dataset_uri, file) as path:
        try:
            absent = {REFERENCES.name, REJECTED.name} - set(pq.read_schema(path, memory_map=False).names)
            return pq.read_table(path, memory_map=False, columns=[name for name in columns if name not in absent])
        except (pa.ArrowException, OSError) as error:
            raise ValueError(str(error)) from None


def require_unaltered(store: ObjectStore, dataset_uri: str) -> None:
    """Require that the test rows of a dataset are those that it was made with.

    Raises:
        ObjectNotFoundError: The file is missing.
        StoreError: The file was altered.
    """
    manifest = read_manifest(store, dataset_uri)
    with _reading_rows(store, dataset_uri, TEST_FILE):
        _require_digest(manifest, store.sha256_of(f"{dataset_uri}/{TEST_FILE}"))


@contextmanager
def _unaltered_file(store: ObjectStore, dataset_uri: str, file: str = TEST_FILE) -> Iterator[Path]:
    """Give a local copy of a dataset's rows. Test rows are compared with the digest in their manifest.

    Test rows judge every later version, so no score may come from rows or right answers that somebody has altered.
    """
    manifest = read_manifest(store, dataset_uri)
    with temporary_folder() as temporary, _reading_rows(store, dataset_uri, file):
        path = temporary / file
        store.download_file(f"{dataset_uri}/{file}", path)
        if file == TEST_FILE:
            _require_digest(manifest, sha256_of_file(path))
        yield path


def _reading_rows(store: ObjectStore, dataset_uri: str, file: str) -> AbstractContextManager[None]:
    """`reading_stored` for a dataset's rows."""
    task, _ = task_and_digest(dataset_uri)
    remedy = (
        f"Restore it from a backup of the store: without it no version can be judged on '{task}'. Versions that know "
        "the task still predict and serve."
    )
    return reading_stored(store, f"{dataset_uri}/{file}", f"the {file.partition('.')[0]} rows of task '{task}'", remedy)


def _require_digest(manifest: DatasetManifest, sha256: str) -> None:
    if sha256 != manifest.test_sha256:
        raise ValueError(f"it was altered: its sha256 is {sha256}, recorded is {manifest.test_sha256}")


def within_budget(sets: Sequence[TestSet], learned: str, max_rows: int) -> list[TestSet]:
    """Cut the test sets of old tasks to `max_rows` rows together. The set of the task `learned` stays whole."""
    old = {test_set.schema.name: len(test_set.rows) for test_set in sets if test_set.schema.name != learned}
    shares = share_rows(old, max_rows)
    return [
        replace(test_set, rows=first_rows(test_set.rows, shares[test_set.schema.name]))
        if test_set.schema.name in shares
        else test_set
        for test_set in sets
    ]


def answered_rows(test_set: TestSet, answers: Collection[str]) -> TestSet:
    """Keep the rows with these digests. If no row has one of them, the set stays whole."""
    places = [place for place, digest in enumerate(test_set.rows["sha256"]) if digest in answers]
    return replace(test_set, rows=test_set.rows.select(places)) if places else test_set


def share_rows(num_rows: Mapping[str, int], max_rows: int) -> dict[str, int]:
    """Share a budget of rows evenly among tasks. Rows that a small task does not need go to the other tasks.

    Every task gets at least one row. So the sum exceeds the budget if there are more tasks than rows.

    Example:
        >>> share_rows({"a": 10, "b": 500, "c": 400}, 300)
        {'a': 10, 'c': 145, 'b': 145}
    """
    left, shares = max_rows, {}
    for number, name in enumerate(sorted(num_rows, key=num_rows.__getitem__)):
        shares[name] = min(num_rows[name], max(1, left // (len(num_rows) - number)))
        left -= shares[name]
    return shares


def first_rows(rows: Dataset, num_rows: int) -> Dataset:
    """Return the rows with the smallest digests (column sha256). So a larger share contains every smaller share."""
    digests = list(rows["sha256"])
    return rows.select(sorted(range(len(rows)), key=digests.__getitem__)[:num_rows])


@dataclass(frozen=True)
class KeptAnswers:
    """The answers of an evaluation."""

    now: Answers
    """The version's answers to every task of its lineage."""
    before: Answers
    """Answers to compare with. For a new task: the parent's, or the base model's for a first version. For other tasks:
    the parent's, if the parent's own evaluation did not ask all of the rows."""
    answerer: str = ""
    """What computed them, see `infra.general_scores.answerer_of`; empty: there are none."""


def keep_answers(store: ObjectStore, adapter_uri: str, answers: KeptAnswers) -> None:
    """Store the answers next to the adapter."""
    values = {"schema_version": SCHEMA_VERSION, **asdict(answers)}
    store.put_bytes(f"{adapter_uri}/{ANSWERS_FILE}", json.dumps(values, ensure_ascii=False).encode("utf-8", "replace"))


def read_answers(store: ObjectStore, adapter_uri: str) -> KeptAnswers:
    """Read the answers next to an adapter. There may be none, for example after `deal data delete`."""
    key = f"{adapter_uri}/{ANSWERS_FILE}"
    if not store.exists(key):
        return KeptAnswers({}, {})
    remedy = "Restore it from a backup of the store, or delete it: the next evaluation then asks the rows again."
    with reading_stored(store, key, "the kept answers of a version", remedy):
        values = json.loads(store.get_bytes(key))
        require_schema_version(values, SCHEMA_VERSION, "the file", StoreError)
        return KeptAnswers(now=dict(values["now"]), before=dict(values["before"]), answerer=values["answerer"])


def has_others(store: ObjectStore, adapter_uri: str, left: Mapping[str, Collection[str]]) -> bool:
    """Return whether there are answers to test rows with other digests than `left` has for their task or slice."""
    try:
        answers = read_answers(store, adapter_uri)
    except StoreError:
        return True
    return _only(answers, left) != answers


def forget_answers_to_tests(store: ObjectStore, adapter_uri: str, left: Mapping[str, Collection[str]]) -> None:
    """Delete the answers to test rows with other digests than `left` has. Answers that are damaged go as a whole."""
    try:
        answers = _only(read_answers(store, adapter_uri), left)
    except StoreError:
        answers = KeptAnswers({}, {})
    if any(answers.now.values()):
        keep_answers(store, adapter_uri, answers)
    else:
        store.delete(f"{adapter_uri}/{ANSWERS_FILE}")


def _only(answers: KeptAnswers, left: Mapping[str, Collection[str]]) -> KeptAnswers:
    """The answers to rows with the digests `left`, and those of tasks that it does not name."""

    def stay(of_tasks: Answers) -> Answers:
        return {
            name: {digest: answer for digest, answer in of_rows.items() if name not in left or digest in left[name]}
            for name, of_rows in of_tasks.items()
        }

    return replace(answers, now=stay(answers.now), before=stay(answers.before))


def compare_answers(
    store: ObjectStore, version: Version, of_parent: Answers, *, include_texts: bool
) -> tuple[Changed, ...]:
    """Compare a version's answers to each task's frozen test rows with its parent's, or else with the base model's.

    `of_parent` are the parent's answers; empty without a parent. A task without stored answers to compare with is left
    out. The examples have texts and answers only with `include_texts`; otherwise only the digests of the rows.
    """
    kept = read_answers(store, version.adapter_uri)
    compared = []
    for known in read_record(store, version).tasks:
        name = known.schema.name
        before, now = kept.before.get(name) or of_parent.get(name), kept.now.get(name)
        if before and now:
            rows = read_tests(store, known, ("input", "output", "sha256", REFERENCES.name)).to_pylist()
            compared.append(_compare(known.schema, rows, before, now, include_texts))
    return tuple(compared)


def _compare(
    schema: TaskSchema,
    rows: Iterable[Mapping[str, Any]],
    before: Mapping[str, str],
    now: Mapping[str, str],
    include_texts: bool,
) -> Changed:
    """Compare the answers to the rows that both versions answered. The largest changes come first."""
    rows = [row for row in rows if row["sha256"] in before and row["sha256"] in now]
    references = [row.get(REFERENCES.name) or (row["output"],) for row in rows]
    old, new = (
        score_answers(schema.metric, [answers[row["sha256"]] for row in rows], references) for answers in (before, now)
    )
    gains = [after - earlier for earlier, after in zip(old, new, strict=True)]
    lost = sorted((place for place, gain in enumerate(gains) if gain <= -CLEAR_CHANGE), key=lambda place: gains[place])
    gained = sorted(
        (place for place, gain in enumerate(gains) if gain >= CLEAR_CHANGE), key=lambda place: -gains[place]
    )

    def example(place: int) -> Example:
        digest, scores = rows[place]["sha256"], (old[place], new[place])
        if not include_texts:
            return Example(row=digest, scores=scores)
        return Example(
            row=digest,
            scores=scores,
            text=cut(rows[place]["input"]),
            expected=cut("\n".join(references[place])),
            before=cut(before[digest]),
            now=cut(now[digest]),
        )

    return Changed(
        task=schema.name,
        metric=schema.metric,
        num_rows=len(rows),
        num_gained=len(gained),
        num_lost=len(lost),
        gained=tuple(map(example, gained[:MAX_EXAMPLES])),
        lost=tuple(map(example, lost[:MAX_EXAMPLES])),
    )


def cut(text: str) -> str:
    """Cut a text that is too long for an example."""
    return text if len(text) <= MAX_CHARS else text[: MAX_CHARS - 1] + "…"
