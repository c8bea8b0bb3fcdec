"""Training rows that nearly equal a test row are left out, whatever the order of the rows is; others are learned."""

from __future__ import annotations

import random
import string
import tracemalloc
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deal_core.config import DataConfig
from deal_core.data import near_tests
from deal_core.data.near_tests import COMMON, RUN, NearTests
from deal_core.data.rows import stored_input_digest
from deal_core.data.schema import TaskSchema
from deal_core.data.source_files import files_at
from tests.built import Built, build, chat, check, write_rows

WORDS = [f"{first}{second}a" for first in "bdfgklmn" for second in "aeiou"]
TASK = TaskSchema(name="mails", labels=("late", "lost"))
NEAR = "nearly a test row"
MAIL = "I have waited for my parcel since Monday and nobody in your shop has answered one of my calls"
SIGNATURE = "Kind regards from Ms Doe, this mail is meant for its reader alone, delete it if it is not for you"


def texts(number: int, seed: int = 0) -> list[str]:
    """Mails without a common run of words, at a seed."""
    chance = random.Random(seed)
    return [" ".join(chance.choices(WORDS, k=18)) for _ in range(number)]


def labelled(found: Iterable[str]) -> list[dict[str, str]]:
    """Rows whose label is that of the text's first letter, so that nearly equal texts have one label."""
    return [{"text": text, "label": TASK.labels[ord(text[0]) % 2]} for text in found]


def changed(text: str, place: int = 9) -> str:
    words = text.split()
    return " ".join([*words[:place], "changed", *words[place + 1 :]])


def are_near(tests: Sequence[str], asked: Sequence[str], answers: tuple[str, str] = ("a", "a")) -> list[bool]:
    found = NearTests()
    found.add(pa.array(tests, pa.string()), pa.array([answers[0]] * len(tests)))
    return [bool(each) for each in found.find(pa.array(asked, pa.string()), pa.array([answers[1]] * len(asked)))]


def test_a_row_of_nearly_the_same_words_is_found_and_one_of_other_words_is_not() -> None:
    same = [MAIL.upper() + ".", f"  {MAIL.replace(' ', '   ')}!", f'"{MAIL}"']
    near = [changed(MAIL), changed(MAIL, 0), f"Hello, {MAIL}", f"{MAIL} please", MAIL.replace("my parcel", "a letter")]
    others = ["", "?!", *texts(9), MAIL[:40], f"{MAIL} {' '.join(texts(1))}", " ".join(reversed(MAIL.split()))]
    assert are_near([MAIL], [*same, *near, *others]) == [True] * len(same + near) + [False] * len(others)
    assert are_near([MAIL], [*same, *near], ("late", "lost")) == [False] * len(same + near), "another answer"
    assert are_near([MAIL], [MAIL], ("Card lost", "card  LOST.")) == [True]


def test_short_texts_are_near_only_with_the_same_words() -> None:
    assert are_near(["Öl 7", "card lost", "+1"], ["öl 7.", "Card lost!", "card  list", "card", "-1", "1"]) == [
        *(True, True),
        *(False, False, False, False),
    ]


def test_what_many_test_rows_share_does_not_count() -> None:
    signed = [f"{text} {SIGNATURE}" for text in texts(40)]
    tests, others = signed[: COMMON + 1], signed[COMMON + 1 :]
    assert not any(are_near(tests, others))
    assert all(are_near(tests, [f"{changed(text)} {SIGNATURE}" for text in texts(COMMON + 1)]))
    assert all(are_near(tests, tests))
    few = [MAIL, changed(MAIL, 1), changed(MAIL, 16)]
    assert are_near(few, [changed(MAIL, 8)]) == [True], "test rows may be near each other"


@given(
    st.lists(st.text(st.sampled_from("aBc .é\nÉ,x"), max_size=40), min_size=1, max_size=9),
    st.integers(0, 3),
    st.integers(1, 60),
)
def test_columns_give_what_single_rows_give(found: list[str], start: int, chunk: int) -> None:
    """The rule, word by word; texts are read in chunks, and may be a part of a larger column."""

    def words_of(text: str) -> tuple[str, ...]:
        return tuple(text.lower().translate(str.maketrans(dict.fromkeys(".,", " "))).split())

    def runs_of(words: Sequence[str]) -> list[tuple[str, ...]]:
        return [tuple(words[place : place + RUN]) for place in range(max(1, len(words) - RUN + 1))] if words else []

    column = pa.array([*["x"] * start, *found], pa.string()).slice(start)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(near_tests, "_CHUNK_BYTES", chunk)
        read = near_tests._read(column)
    words = [words_of(text) for text in found]
    expected = [run for each in words for run in runs_of(each)]
    assert read.num_runs_N.tolist() == [len(runs_of(each)) for each in words]
    for hashes, meant in ((read.runs_R.tolist(), expected), (read.whole_N.tolist(), words)):
        assert len(hashes) == len(meant) and len(set(hashes)) == len(set(meant))
        assert len(set(zip(hashes, meant, strict=True))) == len(set(meant))


def test_of_many_test_rows_a_part_is_compared_by_runs_whatever_their_order_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near_tests, "MAX_RUNS", 2_000)
    tests, found = texts(1_000), []
    asked = pa.array([*map(changed, tests), *tests])
    for order in (tests, tests[::-1]):
        rows = NearTests()
        for start in range(0, len(order), 100):
            rows.add(pa.array(order[start : start + 100]), pa.array(["a"] * 100))
        found.append(rows.find(asked, pa.array(["a"] * len(asked))).tolist())
    assert found[0] == found[1]
    assert 40 < sum(found[0][:1_000]) < 143 and all(found[0][1_000:]), "equal words are always found"


def test_memory_has_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near_tests, "MAX_RUNS", 10_000)
    rows, parts = NearTests(), [pa.array(texts(1_000, seed)) for seed in range(60)]
    answers = pa.array(["a"] * 1_000)
    for part in parts[:10]:
        rows.add(part, answers)
    tracemalloc.start()
    try:
        for part in parts[10:]:
            rows.add(part, answers)
        used, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert used < 50_000 * 12, "8 bytes for each row, of 14 runs"


def built(folder: Path, rows: Sequence[dict[str, Any]], task: TaskSchema = TASK, **options: Any) -> Built:
    """The dataset; the checks alone give the same."""
    source = write_rows(folder / "rows.jsonl", rows)
    found, checked = build(source, task, **options), check(source, task, **options).manifest
    assert (checked.sha256, checked.problems) == (found.manifest.sha256, found.manifest.problems)
    return found


def left_out(found: Built) -> list[tuple[str, int, str]]:
    return [(row["file"], row["row"], row["raw"]["input"]) for row in found.bad if row["reason"] == NEAR]


@pytest.mark.parametrize("number", [300, 1_500])
def test_the_order_of_rows_does_not_matter(tmp_path: Path, number: int) -> None:
    """From 1,000 texts on, the test rows of a new task are known only at the end of the file."""
    given = texts(number)
    rows, near = labelled(given), labelled(map(changed, given[:60]))
    orders = ([*rows, *near], [*rows[::-1], *near], [*near, *rows])
    found = [built(tmp_path, order) for order in orders]
    assert len({(each.manifest.sha256, each.manifest.landed_sha256) for each in found}) == 1
    last, tests = found[-1], found[-1].inputs("test")
    pairs = [(text, changed(text)) for text in given[:60]]
    expected = {pair[pair[0] in tests] for pair in pairs if (pair[0] in tests) != (pair[1] in tests)}
    assert last.manifest.problems == {NEAR: len(expected)} and len(expected) > 5
    names = left_out(last)
    assert {text for _, _, text in names} == expected
    assert all(orders[-1][row - 1]["text"] == text and file == "rows.jsonl" for file, row, text in names)


def test_rows_that_nearly_equal_given_test_rows_are_left_out_of_every_file(tmp_path: Path) -> None:
    """A third of the rows: they are right, so the file is not refused."""
    tests = texts(5)
    given = files_at(write_rows(tmp_path / "test.jsonl", labelled(tests)))
    rows = [*labelled(texts(10, seed=1)), *labelled(map(changed, tests))]
    found = built(tmp_path, rows, config=DataConfig(), test_sources=given)
    assert found.manifest.problems == {NEAR: 5} and (found.manifest.num_train, found.manifest.num_test) == (10, 5)
    assert [row for _, row, _ in left_out(found)] == [11, 12, 13, 14, 15]
    same = built(tmp_path, rows[:10], test_sources=given).manifest
    assert same.sha256 == found.manifest.sha256 and same.landed_sha256 != found.manifest.landed_sha256


def test_rows_that_nearly_equal_the_lineages_test_rows_are_left_out(tmp_path: Path) -> None:
    tests, known = labelled(texts(5)), NearTests()
    known.add(*(pa.array([row[name] for row in tests]) for name in ("text", "label")))
    frozen = [stored_input_digest("labelled", row["text"]) for row in tests]
    rows = [*labelled(texts(30, seed=1)), *labelled(changed(row["text"]) for row in tests)]
    found = built(tmp_path, rows, frozen_test_inputs=frozen, near_tests=known).manifest
    assert (found.problems, found.num_train) == ({NEAR: 5}, 30)
    landed = built(tmp_path, rows).manifest.landed_sha256
    assert found.landed_sha256 == landed, "what landed does not depend on the lineage"


def test_turns_of_chats_are_left_out_too(tmp_path: Path) -> None:
    first, second = texts(2)
    rows = [
        {"messages": chat(first, "yes"), "split": "test"},
        {"messages": chat(changed(first), "yes", second, "no"), "split": "train"},
        {"messages": chat(second, "yes"), "split": "train"},
    ]
    task = TaskSchema(name="t", format="chat", assistant_turns="all", metric="rouge_l")
    found = built(tmp_path, rows, task).manifest
    assert (found.num_train, found.num_turns, found.num_rejected) == (2, 0, 0)
    rows[1]["messages"] = chat(changed(first), "yes")
    found = built(tmp_path, rows, task).manifest
    assert (found.num_train, found.problems) == (1, {NEAR: 1})


def test_the_letters_of_words_are_told_from_what_is_between_them() -> None:
    between = [char for char in map(chr, range(128)) if are_near([f"a{char}b"], ["a b"]) == [True]]
    assert set(between) == {"\0", *string.whitespace, *".,;:!?\"'()[]{}"}
