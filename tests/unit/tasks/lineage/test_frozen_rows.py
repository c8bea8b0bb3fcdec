"""The test rows that a new version answers, and the rows that it gains or loses, with answers written by hand."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from deal_core.data.schema import REFERENCES, ROW_SCHEMA, DatasetManifest, TaskSchema
from deal_core.errors import StoreError
from deal_core.evaluation.metrics import right_answers
from infra.store.base import ObjectStore
from infra.store.opening import store_at
from infra.versions import Version
from tasks.lineage.frozen_rows import (
    ANSWERS_FILE,
    MAX_CHARS,
    MAX_EXAMPLES,
    KeptAnswers,
    TestSet,
    compare_answers,
    forget_answers_to_tests,
    has_others,
    keep_answers,
    load_added,
    load_test_set,
    parts_left,
    read_answers,
    read_test_rows,
    require_unaltered,
    share_rows,
    within_budget,
)
from tasks.lineage.record import RECORD_FILE, FrozenRows, write_record
from tasks.lineage.tombstones import Tombstone, put_tombstone
from tests.stored_versions import known_task, lineage_record, version

NUM_ROWS = 30
SIZES = st.dictionaries(st.text(max_size=3), st.integers(1, 600), min_size=1, max_size=60)


def digest(number: int) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()


def answers(right: range) -> dict[str, str]:
    """Right for the rows in the range, but for case and blanks; wrong for all others."""
    return {digest(number): " YES " if number in right else "no" for number in range(NUM_ROWS)}


def land(store: ObjectStore, rows: Path, task: str, sha256: str = "77") -> None:
    """Store a dataset of these test rows."""
    manifest = DatasetManifest(
        task=TaskSchema(name=task),
        sha256=sha256,
        source="rows.jsonl",
        num_read=NUM_ROWS,
        num_train=0,
        num_test=NUM_ROWS,
        num_rejected=0,
        problems={},
        split="given",
        landed_sha256="88",
        test_sha256=hashlib.sha256(rows.read_bytes()).hexdigest(),
    )
    store.upload_file(rows, f"datasets/{task}/{sha256}/test.parquet")
    store.put_bytes(f"datasets/{task}/{sha256}/manifest.json", json.dumps(manifest.to_json()).encode())


@pytest.fixture
def store(tmp_path: Path) -> ObjectStore:
    """Test rows of two tasks, and the record of a version that knows both."""
    found = store_at(tmp_path.as_uri())
    rows = [
        {"input": f"text {number} " + "x" * MAX_CHARS, "output": "yes", "sha256": digest(number)}
        for number in range(NUM_ROWS)
    ]
    pq.write_table(pa.Table.from_pylist(rows, schema=ROW_SCHEMA), tmp_path / "rows.parquet")
    for task in ("old", "new"):
        land(found, tmp_path / "rows.parquet", task)
    tasks = (known_task(TaskSchema(name=task), f"datasets/{task}/77", NUM_ROWS) for task in ("old", "new"))
    write_record(found, "adapters/child", lineage_record(*tasks))
    return found


def child(store: ObjectStore) -> Version:
    """The version with the record."""
    digest = hashlib.sha256(store.get_bytes(f"adapters/child/{RECORD_FILE}")).hexdigest()
    return version(2, 1, adapter_uri="adapters/child", files_sha256={RECORD_FILE: (digest,)})


def keep(store: ObjectStore, uri: str, now: Mapping[str, range], before: Mapping[str, range]) -> None:
    kept = ({task: answers(right) for task, right in each.items()} for each in (now, before))
    keep_answers(store, uri, KeptAnswers(*kept))


def test_rows_that_changed_sides_are_counted_and_the_first_are_shown(store: ObjectStore) -> None:
    keep(store, "adapters/parent", {"old": range(10, 30)}, {"old": range(0)})
    keep(store, "adapters/child", {"old": range(15), "new": range(5)}, {"new": range(4, 6)})
    old, new = compare_answers(store, child(store), read_answers(store, "adapters/parent").now, include_texts=True)
    assert (old.task, old.num_rows, old.num_gained, old.num_lost) == ("old", NUM_ROWS, 10, 15)
    assert (new.task, new.num_gained, new.num_lost) == ("new", 4, 1), "against the parent before training"
    assert [row.row for row in new.gained] == [digest(number) for number in range(4)]
    assert len(old.gained) == len(old.lost) == MAX_EXAMPLES
    (lost,) = new.lost
    assert (lost.row, lost.expected, lost.before, lost.now) == (digest(5), "yes", " YES ", "no")
    assert lost.text is not None and lost.text.startswith("text 5 xxx") and len(lost.text) == MAX_CHARS


def test_a_row_with_several_right_answers_is_compared_by_the_best(store: ObjectStore, tmp_path: Path) -> None:
    """The rows of a task may have one answer or several; files without several have no such column."""
    both = ["yes", "no"]
    rows = [
        {"input": "text", "output": "yes", "sha256": digest(number), "references": both if number else None}
        for number in range(NUM_ROWS)
    ]
    pq.write_table(pa.Table.from_pylist(rows, schema=ROW_SCHEMA.append(REFERENCES)), tmp_path / "several.parquet")
    land(store, tmp_path / "several.parquet", "new")
    keep(store, "adapters/child", {"old": range(0), "new": range(0)}, {"new": range(NUM_ROWS)})
    (new,) = compare_answers(store, child(store), {}, include_texts=True)
    assert (new.num_lost, new.lost[0].row, new.lost[0].expected) == (1, digest(0), "yes")
    known = known_task(TaskSchema(name="new"), "datasets/new/77")
    test_set = load_test_set(store, known)
    assert right_answers(test_set.rows) == ["yes", *([both] * (NUM_ROWS - 1))]


def test_rows_that_were_added_follow_without_the_texts_of_before_and_go_when_they_are_forgotten(
    store: ObjectStore, tmp_path: Path
) -> None:
    rows = [{"input": f"more {number}", "output": "yes", "sha256": digest(100 + number)} for number in range(5)]
    repeated = {"input": "text 3  " + "x" * MAX_CHARS, "output": "no", "sha256": digest(99)}  # blanks do not count
    pq.write_table(pa.Table.from_pylist([repeated, *rows], schema=ROW_SCHEMA), tmp_path / "more.parquet")
    land(store, tmp_path / "more.parquet", "new", "78")
    first, added = (
        FrozenRows(dataset_uri=f"datasets/new/{sha256}", num_rows=number, base_accuracy=base)
        for sha256, number, base in (("77", NUM_ROWS, 0.2), ("78", 5, 0.9))
    )
    known = replace(known_task(TaskSchema(name="new")), tests=(first,), added=added)
    assert (known.num_test, known.grown().num_test, known.base_accuracy) == (NUM_ROWS, NUM_ROWS + 5, 0.2)
    assert known.grown().base_accuracy == pytest.approx(10.5 / 35), "of 30 rows six, of five rows 4.5"
    assert len(load_test_set(store, known).rows) == NUM_ROWS
    assert load_added(store, known).rows["sha256"][:] == [row["sha256"] for row in rows]
    assert len(load_test_set(store, known.grown()).rows) == NUM_ROWS + 5

    now = {**answers(range(3)), **{row["sha256"]: "yes" for row in rows}}
    keep_answers(store, "adapters/child", KeptAnswers({"old": answers(range(2)), "new": now}, {"new": now}))
    tombstone = Tombstone(task="new", sha256="78", reason="", at=datetime.now(UTC))
    put_tombstone(store, tombstone)
    store.delete("datasets/new/78")
    assert parts_left(store, known.grown()) == (first,)
    assert len(load_test_set(store, known.grown()).rows) == NUM_ROWS
    left = {"new": {digest(number) for number in range(NUM_ROWS)}}
    assert has_others(store, "adapters/child", left)
    forget_answers_to_tests(store, "adapters/child", left)
    assert not has_others(store, "adapters/child", left)
    kept = read_answers(store, "adapters/child")
    assert kept.now == {"old": answers(range(2)), "new": answers(range(3))} and kept.before["new"] == answers(range(3))
    store.put_bytes(f"adapters/child/{ANSWERS_FILE}", b"{}")
    assert has_others(store, "adapters/child", left), "nobody knows what is in it"
    forget_answers_to_tests(store, "adapters/child", left)
    assert not store.exists(f"adapters/child/{ANSWERS_FILE}")


ALTERED: dict[str, Callable[[pa.Table], pa.Table]] = {
    "a right answer": lambda rows: rows.set_column(1, "output", pa.array(["no", *["yes"] * (NUM_ROWS - 1)])),
    "all digests too": lambda rows: rows.set_column(2, "sha256", pa.array(["0"] * NUM_ROWS)),
    "an input": lambda rows: rows.set_column(0, "input", pa.array(["x", *rows["input"].to_pylist()[1:]])),
    "a row less": lambda rows: rows.slice(1),
    "the order": lambda rows: rows.take(list(range(NUM_ROWS))[::-1]),
}


@pytest.mark.parametrize("name", ALTERED)
def test_test_rows_that_were_altered_are_refused_by_every_reader(store: ObjectStore, tmp_path: Path, name: str) -> None:
    known = known_task(TaskSchema(name="new"), "datasets/new/77")
    assert len(load_test_set(store, known).rows) == NUM_ROWS
    require_unaltered(store, known.test_uris[0])
    keep(store, "adapters/child", {"old": range(0), "new": range(5)}, {"new": range(0)})
    altered = ALTERED[name](pq.read_table(tmp_path / "rows.parquet"))
    pq.write_table(altered, tmp_path / "altered.parquet")
    store.upload_file(tmp_path / "altered.parquet", "datasets/new/77/test.parquet")
    for read in (
        lambda: load_test_set(store, known),
        lambda: read_test_rows(store, known.test_uris[0], ["input"]),
        lambda: require_unaltered(store, known.test_uris[0]),
        lambda: compare_answers(store, child(store), {}, include_texts=True),
    ):
        with pytest.raises(
            StoreError, match=r"test\.parquet, the test rows of task 'new', is damaged .*altered"
        ) as caught:
            read()
        assert "Restore it from a backup of the store" in str(caught.value) and "\n" not in str(caught.value)


def test_without_texts_only_digests_are_left(store: ObjectStore) -> None:
    keep(store, "adapters/child", {"old": range(0), "new": range(5)}, {"new": range(0)})
    (new,) = compare_answers(store, child(store), {}, include_texts=False)
    assert new.num_gained == 5
    assert [row.model_dump(exclude_none=True) for row in new.gained] == [
        {"row": digest(number), "scores": (0.0, 1.0)} for number in range(5)
    ]


def test_what_was_not_kept_is_not_compared(store: ObjectStore) -> None:
    assert compare_answers(store, child(store), {}, include_texts=True) == ()
    keep(store, "adapters/child", {"old": range(0), "new": range(5)}, {"new": range(0)})
    of_parent = read_answers(store, "adapters/of-an-earlier-release").now
    compared = compare_answers(store, child(store), of_parent, include_texts=True)
    assert [each.task for each in compared] == ["new"]
    store.put_bytes(f"adapters/child/{ANSWERS_FILE}", b'{"schema_version": 2}')
    with pytest.raises(StoreError, match="schema version 2, this release reads 1"):
        read_answers(store, "adapters/child")


def make_set(name: str, num_rows: int) -> TestSet:
    digests = [hashlib.sha256(f"{name} {number}".encode()).hexdigest() for number in range(num_rows)]
    rows = Dataset.from_dict({"input": [f"row {number}" for number in range(num_rows)], "sha256": digests})
    return TestSet(schema=TaskSchema(name=name), rows=rows, max_prompt_tokens=9, max_new_tokens=9)


@given(SIZES, st.integers(1, 3000))
def test_a_budget_is_spent_evenly_and_never_exceeded_while_every_task_can_have_a_row(
    sizes: dict[str, int], budget: int
) -> None:
    shares = share_rows(sizes, budget)
    assert set(shares) == set(sizes)
    assert all(1 <= shares[name] <= size for name, size in sizes.items())
    assert sum(shares.values()) <= max(budget, len(sizes))
    cut = [shares[name] for name, size in sizes.items() if shares[name] < size]
    if cut:
        assert max(cut) - min(cut) <= 1 and max(shares.values()) <= max(cut) + 1
        assert sum(shares.values()) >= min(budget, sum(sizes.values())) or min(cut) == 1
    else:
        assert shares == sizes


@pytest.mark.parametrize("budget", [5, 17, 40])
def test_a_smaller_share_lies_within_a_larger_one_and_the_task_just_learned_is_whole(budget: int) -> None:
    sets = [make_set(name, 20) for name in ("a", "b", "new")]
    within, more = within_budget(sets, "new", budget), within_budget(sets, "new", budget + 6)
    assert sum(len(each.rows) for each in within[:2]) <= budget and len(within[2].rows) == 20
    for few, many in zip(within, more, strict=True):
        assert set(few.rows["sha256"]) <= set(many.rows["sha256"])
