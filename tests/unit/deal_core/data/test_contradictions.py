"""Contradictions are counted exactly while the rows stream by, and the warnings say what training does with them."""

from __future__ import annotations

import hashlib
import json
import tracemalloc
from collections import defaultdict
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deal_core.config import DataConfig
from deal_core.data.contradictions import MAX_EXAMPLES, ContradictionFinder
from deal_core.data.dataset import Landing, build_dataset, validate_file
from deal_core.data.digest_set import DigestSet
from deal_core.data.good_rows import good_rows
from deal_core.data.row_warnings import data_warnings, label_warnings
from deal_core.data.rows import Row, row_digests
from deal_core.data.schema import DatasetManifest, Split, TaskSchema
from deal_core.data.source_files import files_at

AUTO = TaskSchema(name="t", format="auto", metric="auto", assistant_turns="all")
WITH_TEXTS, WITHOUT_TEXTS = (DataConfig(max_bad_share=1.0, include_texts=each) for each in (True, False))


def landing(
    folder: Path, rows: list[dict[str, Any]], config: DataConfig = WITH_TEXTS, task: TaskSchema = AUTO
) -> Landing:
    source = folder / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return Landing(sources=files_at(source), task=task, config=config)


def manifest_of(landing: Landing) -> DatasetManifest:
    return validate_file(landing).manifest


def even(number: int = 60) -> list[dict[str, Any]]:
    """Rows without a contradiction, enough for both sides of the split."""
    return [{"text": f"text {place}", "label": "ab"[place % 2]} for place in range(number)]


def test_a_text_with_two_labels_is_counted_shown_and_kept(tmp_path: Path) -> None:
    contrary = [{"text": text, "label": label} for text in ("lost  card", "lost card") for label in ("a", "b", "A ")]
    where = landing(tmp_path, [*even(), *contrary])
    manifest = build_dataset(where, tmp_path / "dataset")
    found = manifest.contradictions
    assert found is not None and found.examples == (("lost  card", "a", "b"),)
    assert (found.num_texts, found.num_train + found.num_test) == (1, 2), "other forms of a row are its duplicates"
    stored = [
        row for split in ("train", "test") for row in pq.read_table(tmp_path / f"dataset/{split}.parquet").to_pylist()
    ]
    assert sorted(row["output"] for row in stored if row["input"] == "lost  card") == ["a", "b"], "both are learned"
    assert DatasetManifest.from_json(json.loads((tmp_path / "dataset" / "manifest.json").read_text())) == manifest
    (warning,) = data_warnings(manifest, include_texts=True)
    assert warning.startswith("Texts with several labels: 1 (") and "'lost  card': 'a' and 'b'" in warning
    assert "Each of these rows is learned, so the model learns to guess" in warning
    (numbers,) = data_warnings(manifest, include_texts=False)
    assert "lost" not in numbers and "labels: 1 (" in numbers


def test_without_texts_the_manifest_has_numbers_alone(tmp_path: Path) -> None:
    rows = [*even(), *({"text": f"text {place}", "label": "ba"[place % 2]} for place in range(10))]
    found = manifest_of(landing(tmp_path, rows, WITHOUT_TEXTS)).contradictions
    assert found is not None and (found.num_texts, found.num_train + found.num_test, found.examples) == (10, 20, ())
    shown = manifest_of(landing(tmp_path, rows)).contradictions
    assert shown is not None and len(shown.examples) == MAX_EXAMPLES


LABELS = ("a", "b", "c")
LABELLED = st.lists(st.tuples(st.integers(0, 12), st.sampled_from(LABELS)), max_size=60)


@given(LABELLED, st.integers(1, 9))
def test_labels_are_counted_as_a_dict_would_count_them(pairs: list[tuple[int, str]], batch: int) -> None:
    """Whatever the order of the rows and the bounds of the batches."""
    kept: dict[Split, DigestSet] = {"train": DigestSet(), "test": DigestSet()}
    finder = ContradictionFinder(TaskSchema(name="t", labels=LABELS), kept, include_texts=True)
    rows = [Row(f"t{text}", label, *row_digests([f"t{text}"], [label])) for text, label in dict.fromkeys(pairs)]
    for start in range(0, len(rows), batch):
        some = rows[start : start + batch]
        sides: dict[Split, list[Row]] = {"train": [], "test": []}
        for row in some:
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


def preference(prompt: str, better: str, worse: str, as_chat: bool) -> dict[str, Any]:
    if not as_chat:
        return {"prompt": prompt, "chosen": better, "rejected": worse}
    asked = {"role": "user", "content": prompt}
    return {
        name: [asked, {"role": "assistant", "content": each}]
        for name, each in (("chosen", better), ("rejected", worse))
    }


@pytest.mark.parametrize("as_chat", [False, True])
def test_preferences_in_both_directions_are_counted_shown_and_kept(tmp_path: Path, as_chat: bool) -> None:
    rows = [preference(f"question {number}", "good", "bad", as_chat) for number in range(60)]
    rows += [preference(f"question {number}", "bad ", "good", as_chat) for number in (5, 50)]  # another batch, the same
    rows += [
        preference("new", "x", "y", as_chat),
        preference("new", "y", "x", as_chat),
        preference("new", "x", "z", as_chat),
    ]
    manifest = manifest_of(landing(tmp_path, rows))
    found = manifest.contradictions
    assert manifest.task.learns_preferences and manifest.num_rejected == 0
    assert found is not None and (found.num_texts, found.num_train + found.num_test) == (3, 6)
    (warning,) = data_warnings(manifest, include_texts=True)
    assert warning.startswith("Pairs of answers that are preferred in both directions: 3 (")
    assert "question 5" in warning and "'good' over 'bad'" in warning and "cancel each other" in warning
    (numbers,) = data_warnings(manifest, include_texts=False)
    assert "question" not in numbers and "good" not in numbers


@pytest.mark.parametrize("as_chat", [False, True])
def test_several_answers_in_one_row_are_none_and_in_rows_of_their_own_are_named(tmp_path: Path, as_chat: bool) -> None:
    def row(prompt: str, answer: Any) -> dict[str, Any]:
        if not as_chat:
            return {"prompt": prompt, "completion": answer}
        return {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]}

    rows = [row(f"question {number}", f"answer {number}") for number in range(60)]
    assert manifest_of(landing(tmp_path, [*rows, row("capital?", ["Paris", "paris, France"])])).contradictions is None
    manifest = manifest_of(landing(tmp_path, [*rows, row("capital?", "Paris"), row("capital?", "Paris, France")]))
    found = manifest.contradictions
    assert found is not None and (found.num_texts, found.examples) == (1, (("capital?",),))
    (warning,) = data_warnings(manifest, include_texts=True)
    assert "Inputs with several answers in rows of their own: 1 (" in warning and "list them in one row" in warning
    assert "'capital?'" in warning


def test_chats_that_begin_alike_are_no_contradictions(tmp_path: Path) -> None:
    turns = [("Hello", "Hi!"), ("Who are you?", "A bot.")]
    rows = []
    for number in range(60):
        answered = [*turns[:1], (turns[1][0], f"Bot {number}."), (f"question {number}", f"answer {number}")]
        pairs = [
            ({"role": "user", "content": asked}, {"role": "assistant", "content": said}) for asked, said in answered
        ]
        rows.append({"messages": [message for pair in pairs for message in pair]})
    manifest = manifest_of(landing(tmp_path, rows))
    assert manifest.num_turns > 40 and manifest.contradictions is None


def test_a_task_with_one_label_is_warned_of(tmp_path: Path) -> None:
    manifest = manifest_of(landing(tmp_path, [{"text": f"text {number}", "label": "spam"} for number in range(60)]))
    (warning,) = data_warnings(manifest, include_texts=True)
    assert "The task has one label, 'spam'" in warning and "tell no good version from a bad one" in warning
    (numbers,) = data_warnings(manifest, include_texts=False)
    assert "spam" not in numbers and "The task has one label" in numbers


def test_labels_with_the_separator_of_the_options_are_warned_of() -> None:
    labels = ("yes, please", "no", "1,000")
    (warning,) = label_warnings(TaskSchema(name="t", labels=labels), include_texts=True)
    assert (
        "Labels that contain ', '" in warning
        and ": 1 of 3 (" in warning
        and "'yes, please'" in warning
        and "1,000" not in warning
    )
    (numbers,) = label_warnings(TaskSchema(name="t", labels=labels), include_texts=False)
    assert "please" not in numbers
    assert label_warnings(TaskSchema(name="t", labels=labels, template="{options}: {text}"), include_texts=True)
    assert not label_warnings(TaskSchema(name="t", labels=labels, template="{text} ->"), include_texts=True)


def test_memory_grows_by_a_digest_a_row() -> None:
    """At most 22 bytes a text, and as many a contradiction; texts and labels are not kept."""
    number = 50_000
    kept: dict[Split, DigestSet] = {"train": DigestSet(), "test": DigestSet()}
    finder = ContradictionFinder(TaskSchema(name="t", labels=LABELS), kept, include_texts=True)
    tracemalloc.start()
    try:
        for start in range(0, number, 5000):
            digests = [hashlib.sha256(b"%d" % (row // 2)).digest() for row in range(start, start + 5000)]
            rows = [Row("long " * 50 + digest.hex(), "a", digest, digest) for digest in digests]
            finder.add(good_rows(rows), "train")
        del digests
        used, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert used < number * 30
