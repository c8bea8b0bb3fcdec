"""Rows that are odd together are counted and named by their numbers, and the warnings say what training does with them.

A warning shows a text or a label only where texts may be shown.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deal_core.config import DataConfig
from deal_core.data.arrow_rows import good_rows
from deal_core.data.contradictions import MAX_EXAMPLES, ContradictionFinder
from deal_core.data.digest_set import DigestSet
from deal_core.data.doubts import MAX_NAMED, labels_alike
from deal_core.data.row_warnings import balance_warning, data_warnings, label_warnings
from deal_core.data.rows import Row, row_digests
from deal_core.data.schema import Contradictions, DatasetManifest, Split, TaskSchema
from deal_core.data.source_files import files_at
from tests.built import AUTO, build, chat, check, write_rows

WITH_TEXTS = DataConfig(max_bad_share=1.0, include_texts=True)
EVERY_TURN = TaskSchema(name="t", format="auto", metric="auto", assistant_turns="all")
EVEN = [{"text": f"text {place}", "label": "ab"[place % 2]} for place in range(60)]
"""Rows without a contradiction, enough for both sides of the split."""


def contradictions(folder: Path, rows: list[dict[str, Any]]) -> tuple[DatasetManifest, Contradictions | None]:
    found = check(write_rows(folder / "rows.jsonl", rows), EVERY_TURN, WITH_TEXTS).manifest
    return found, found.contradictions


def warning_of(manifest: DatasetManifest, *secret: str) -> str:
    """The only warning, with texts; without them it says the same and has none of these words."""
    (shown,), (hidden,) = (data_warnings(manifest, include_texts=each) for each in (True, False))
    assert hidden[:20] == shown[:20] and not any(word in hidden for word in secret)
    assert all(word in shown for word in secret)
    return shown


def test_a_text_with_two_labels_is_counted_shown_and_kept(tmp_path: Path) -> None:
    contrary = [{"text": text, "label": label} for text in ("lost  card", "lost card") for label in ("a", "b", "A ")]
    built = build(write_rows(tmp_path / "rows.jsonl", [*EVEN, *contrary]), AUTO, WITH_TEXTS)
    found = built.manifest.contradictions
    assert found is not None and found.examples == (("lost  card", "a", "b"),)
    assert (found.num_texts, found.num_train + found.num_test) == (1, 2), "other forms of a row are its duplicates"
    assert sorted(row["output"] for row in built.rows() if row["input"] == "lost  card") == ["a", "b"]
    assert "several labels: 1 (" in warning_of(built.manifest, "'lost  card': 'a' and 'b'")


def test_without_texts_the_manifest_has_numbers_alone(tmp_path: Path) -> None:
    rows = [*EVEN, *({"text": f"text {place}", "label": "ba"[place % 2]} for place in range(10))]
    found = check(write_rows(tmp_path / "rows.jsonl", rows), AUTO, DataConfig(include_texts=False)).manifest
    numbers, (_, shown) = found.contradictions, contradictions(tmp_path, rows)
    assert numbers is not None and (numbers.num_texts, numbers.num_train + numbers.num_test) == (10, 20)
    assert numbers.examples == () and shown is not None and len(shown.examples) == MAX_EXAMPLES


LABELS = ("a", "b", "c")


@given(st.lists(st.tuples(st.integers(0, 12), st.sampled_from(LABELS)), max_size=60), st.integers(1, 9))
def test_labels_are_counted_as_a_dict_would_count_them(pairs: list[tuple[int, str]], batch: int) -> None:
    """Whatever the order of the rows and the bounds of the batches."""
    kept: dict[Split, DigestSet] = {"train": DigestSet(), "test": DigestSet()}
    finder = ContradictionFinder(TaskSchema(name="t", labels=LABELS), kept, include_texts=True)
    rows = [Row(f"t{text}", label, *row_digests([f"t{text}"], [label])) for text, label in dict.fromkeys(pairs)]
    for start in range(0, len(rows), batch):
        sides: dict[Split, list[Row]] = {"train": [], "test": []}
        for row in rows[start : start + batch]:
            sides["test" if int(row.input[1:]) % 3 == 0 else "train"].append(row)
        for split, side in sides.items():
            kept[split].add([row.digest for row in side])
            finder.add(good_rows(side), split)
    of_text: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        of_text[row.input].add(row.output)
    contrary = {text: labels for text, labels in of_text.items() if len(labels) > 1}
    found = finder.found()
    if not contrary:
        assert found is None
        return
    assert found is not None and found.num_texts == len(contrary)
    on_test = {text for text in contrary if int(text[1:]) % 3 == 0}
    assert found.num_test == sum(len(contrary[text]) for text in on_test)
    assert found.num_train == sum(len(labels) for text, labels in contrary.items() if text not in on_test)
    assert len(found.examples) == min(MAX_EXAMPLES, len(contrary))
    assert all({*labels} == contrary[text] for text, *labels in found.examples)


@pytest.mark.parametrize("as_chat", [False, True])
def test_preferences_in_both_directions_are_counted_shown_and_kept(tmp_path: Path, as_chat: bool) -> None:
    def row(prompt: str, better: str, worse: str) -> dict[str, Any]:
        if as_chat:
            return {"chosen": chat(prompt, better), "rejected": chat(prompt, worse)}
        return {"prompt": prompt, "chosen": better, "rejected": worse}

    rows = [row(f"question {number}", "good", "bad") for number in range(60)]
    rows += [row(f"question {number}", "bad ", "good") for number in (5, 50)]
    rows += [row("new", "x", "y"), row("new", "y", "x"), row("new", "x", "z")]
    manifest, found = contradictions(tmp_path, rows)
    assert manifest.task.learns_preferences and manifest.num_rejected == 0
    assert found is not None and (found.num_texts, found.num_train + found.num_test) == (3, 6)
    assert "in both directions: 3 (" in warning_of(manifest, "question 5", "'good' over 'bad'")


@pytest.mark.parametrize("as_chat", [False, True])
def test_several_answers_in_one_row_are_none_and_in_rows_of_their_own_are_named(tmp_path: Path, as_chat: bool) -> None:
    def row(prompt: str, answer: Any) -> dict[str, Any]:
        return {"messages": chat(prompt, answer)} if as_chat else {"prompt": prompt, "completion": answer}

    rows = [row(f"question {number}", f"answer {number}") for number in range(60)]
    assert contradictions(tmp_path, [*rows, row("capital?", ["Paris", "paris, France"])])[1] is None
    manifest, found = contradictions(tmp_path, [*rows, row("capital?", "Paris"), row("capital?", "Paris, France")])
    assert found is not None and (found.num_texts, found.examples) == (1, (("capital?",),))
    assert "several answers in rows of their own: 1 (" in warning_of(manifest, "'capital?'")


def test_chats_that_begin_alike_are_no_contradictions(tmp_path: Path) -> None:
    rows = [
        {"messages": chat("Hello", "Hi!", "Who are you?", f"Bot {number}.", f"question {number}", f"answer {number}")}
        for number in range(60)
    ]
    manifest, found = contradictions(tmp_path, rows)
    assert manifest.num_turns > 40 and found is None


# --- labels


def test_labels_that_cannot_work_are_warned_of(tmp_path: Path) -> None:
    manifest, _ = contradictions(tmp_path, [{"text": f"text {number}", "label": "spam"} for number in range(60)])
    assert "The task has one label" in warning_of(manifest, "'spam'")
    labels = ("yes, please", "no", "1,000")
    (warning,), (numbers,) = (
        label_warnings(TaskSchema(name="t", labels=labels), include_texts=each) for each in (True, False)
    )
    assert ": 1 of 3 (" in warning and "'yes, please'" in warning and "1,000" not in warning and "please" not in numbers
    assert label_warnings(TaskSchema(name="t", labels=labels, template="{options}: {text}"), include_texts=True)
    assert not label_warnings(TaskSchema(name="t", labels=labels, template="{text} ->"), include_texts=True)


def test_rare_labels_are_named_and_even_ones_are_not() -> None:
    assert balance_warning({"a": 0, "b": 0}) is None, "no row is good"
    assert balance_warning({"a": 100, "b": 11, "c": 40}) is None and balance_warning({}) is None
    warning = balance_warning({"a": 100, "b": 10, "c": 0})
    assert warning is not None and "2 of 3 labels have few rows (c 0, b 10) against 100" in warning


def test_only_labels_that_look_the_same_are_alike() -> None:
    assert labels_alike(["a b", "a\u200b b", "ab", "ä", "a", "a \u2060b"]) == [("a b", "a\u200b b", "a \u2060b")]
    assert labels_alike(["heart \u2764", "heart \u2764\ufe0f"]) != []


# --- rows in doubt

LINES = [f"The parcel number {number} is late,{('late', 'lost')[number % 2]}" for number in range(60)]
GOOD = [dict(zip(("text", "label"), line.split(","), strict=True)) for line in LINES]


def csv(folder: Path, lines: list[str], name: str = "rows.csv") -> Path:
    (folder / name).write_text("".join(f"{line}\n" for line in ["text,label", *lines]), encoding="utf-8")
    return folder / name


def named(manifest: DatasetManifest) -> dict[str, list[int]]:
    return {doubt.kind: [row for _, row in doubt.rows] for doubt in manifest.doubts}


def test_a_stray_quote_that_swallows_rows_is_named(tmp_path: Path) -> None:
    lines = [*LINES]
    lines[20], lines[35] = f'"{lines[20]}', 'A screen of 15",late'
    manifest = build(csv(tmp_path, lines)).manifest
    assert manifest.num_read == 45 and named(manifest) == {"swallowed rows": [21]}
    warning = warning_of(manifest)
    assert "1 (row 21)" in warning and "parcel" not in warning


@pytest.mark.parametrize(
    "cell",
    [
        "Dear Sir,\nmy card is lost.\nPlease help, thanks, and soon.",
        "one line\nand another\nand a third",
        "a list:\n\n- milk, bread\n- eggs, flour",
    ],
)
def test_a_text_of_several_lines_is_not_in_doubt(tmp_path: Path, cell: str) -> None:
    assert build(csv(tmp_path, [*LINES, f'"{cell}",late'])).manifest.doubts == ()


@pytest.mark.parametrize("header", ["text,label", "\ufefftext,label"])
def test_a_header_inside_a_file_is_a_bad_row_and_named(tmp_path: Path, header: str) -> None:
    manifest = build(csv(tmp_path, [*LINES[:30], header, *LINES[30:]])).manifest
    assert named(manifest) == {"repeated header": [31]} and manifest.num_rejected == 1
    assert sorted(manifest.task.labels) == ["late", "lost"], "no label is called label"


def test_labels_that_differ_by_invisible_characters_are_named(tmp_path: Path) -> None:
    odd = [{"text": "more of it", "label": "lo\u200bst"}, {"text": "and more", "label": "late\u00ad"}]
    manifest = build(write_rows(tmp_path / "rows.jsonl", [*GOOD, *odd])).manifest
    assert named(manifest) == {"labels alike": [61, 62]}
    (warning,) = [each for each in data_warnings(manifest, include_texts=True) if each.startswith("Labels that differ")]
    assert "2 (rows 61, 62)" in warning and r"'lost' and 'lo\u200bst'" in warning
    assert not any("lost" in each for each in data_warnings(manifest, include_texts=False))
    task = TaskSchema(name="t", labels=("late", "lost"))
    (bad, _) = build(tmp_path / "rows.jsonl", task).bad
    assert r"lo\u200bst: it differs from a label" in bad["value"] and "lost" not in bad["why"]


def test_rows_of_several_files_are_named_with_their_files(tmp_path: Path) -> None:
    first = csv(tmp_path, [*LINES[:30], "text,label"], "a.csv")
    second = csv(tmp_path, ["text,label", *LINES[30:], *["text,label"] * MAX_NAMED], "b.csv")
    warning = warning_of(build(files_at(first, second)).manifest)
    assert "12 (a.csv row 31; b.csv rows 1, 32," in warning and "and 2 more)" in warning
    assert all(len(sentence.split()) <= 35 for sentence in warning.split(". "))
