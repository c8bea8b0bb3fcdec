"""The example data keeps the promises of examples/README.md.

The rows are read with the standard library, through what each spec says, so that a wrong spec fails here too.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
import unicodedata
from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from rapidfuzz import fuzz, process

from deal_core.method_config import RehearsalConfig

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
DOMAINS = ("bank", "clinic", "parcels")
WORK_ORDER = re.compile(r"Flat \w+, [a-z ]+: [^;]+; [^;]+\.")
NUM_PER_LABEL = {"train": 17, "test": 17}
MAX_SHARED_WORDS = 0.4
MAX_LIKENESS = 70.0
"""In per cent, of two texts whose words are sorted. Rewritten rows have 80 and more."""
ROWS_OF_TESTS = ROOT / "tests" / "data" / "examples"
DIGEST_OF_ROWS_OF_TESTS = "b5a4f9e12e2f9e39ca865aefb5d8f4a70649bf0326805587a6cbae2dfdafe208"


class Row(NamedTuple):
    domain: str
    split: str
    text: str
    label: str


def load_spec(domain: str) -> dict[str, Any]:
    spec = yaml.safe_load((EXAMPLES / domain / "spec.yaml").read_text(encoding="utf-8"))
    assert isinstance(spec, dict)
    return spec


def read_records(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        if path.suffix == ".csv":
            return list(csv.DictReader(file, strict=True))
        return [json.loads(line) for line in file]


def load_rows(domain: str) -> list[Row]:
    task = load_spec(domain)["task"]
    columns = {"text": "text", "label": "label", **task.get("columns", {})}
    files = [("train", task["data"])]
    if "test_data" in task:
        files.append(("test", task["test_data"]))
    rows = []
    for split, name in files:
        for record in read_records(EXAMPLES / domain / name):
            own_split = split if "test_data" in task else record["split"]
            rows.append(Row(domain, own_split, record[columns["text"]], record[columns["label"]]))
    return rows


def month_of_bank(file: str) -> list[Row]:
    return [Row("bank", file, row["text"], row["label"]) for row in read_records(EXAMPLES / "bank" / file)]


def all_rows() -> list[Row]:
    return [*(row for domain in DOMAINS for row in load_rows(domain)), *month_of_bank("july.jsonl")]


def words(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"[^\W_]+", unicodedata.normalize("NFKC", text).casefold()))


def similarity(a: frozenset[str], b: frozenset[str]) -> float:
    return len(a & b) / len(a | b)


def test_each_example_shows_another_way_to_hand_data_over() -> None:
    tasks = {domain: load_spec(domain)["task"] for domain in DOMAINS}
    assert Path(tasks["bank"]["data"]).suffix == ".jsonl" and "columns" not in tasks["bank"]
    assert Path(tasks["clinic"]["data"]).suffix == ".csv" and tasks["clinic"]["columns"]
    assert "test_data" not in tasks["parcels"]
    messages = read_records(EXAMPLES / "parcels" / tasks["parcels"]["data"])
    assert {record["split"] for record in messages} == {"train", "test"}
    assert sum("," in row.text for row in load_rows("clinic")) >= 20, "the CSV should exercise quoted commas"


@pytest.mark.parametrize("domain", DOMAINS)
def test_labels_are_balanced_in_both_splits(domain: str) -> None:
    labels = load_spec(domain)["task"]["labels"]
    assert len(labels) == 6
    expected = {(split, label): num for split, num in NUM_PER_LABEL.items() for label in labels}
    assert Counter((row.split, row.label) for row in load_rows(domain)) == expected


def test_a_month_of_bank_comes_with_its_labels_and_with_labels_that_slipped_by_one_row() -> None:
    month, slipped = month_of_bank("july.jsonl"), month_of_bank("july_slipped.jsonl")
    assert Counter(row.label for row in month) == dict.fromkeys(load_spec("bank")["task"]["labels"], 6)
    assert [row.text for row in slipped] == [row.text for row in month]
    assert [row.label for row in slipped] == [row.label for row in [month[-1], *month[:-1]]]
    assert sum(a.label == b.label for a, b in zip(month, slipped, strict=True)) == 4


@pytest.mark.parametrize("domain", DOMAINS)
def test_the_defaults_keep_as_many_rows_as_the_readme_says(domain: str) -> None:
    num_train = sum(row.split == "train" for row in load_rows(domain))
    assert (num_train, RehearsalConfig().num_kept(num_train)) == (102, 26)


def test_domains_share_no_label_and_no_word_of_one() -> None:
    labels = {domain: load_spec(domain)["task"]["labels"] for domain in DOMAINS}
    vocabularies = {domain: set(" ".join(labels[domain]).split()) for domain in DOMAINS}
    for a, b in combinations(DOMAINS, 2):
        assert not vocabularies[a] & vocabularies[b], (a, b)


def test_no_two_rows_are_alike() -> None:
    bags = [(row, words(row.text)) for row in all_rows()]
    assert len(bags) == 3 * 6 * sum(NUM_PER_LABEL.values()) + 6 * 6
    alike = [
        (round(similarity(a_words, b_words), 2), a.text, b.text)
        for (a, a_words), (b, b_words) in combinations(bags, 2)
        if similarity(a_words, b_words) >= MAX_SHARED_WORDS
    ]
    assert alike == []


def test_no_two_rows_are_alike_once_their_words_are_sorted() -> None:
    """Words are compared by letters, so that a typo or another ending does not hide a copy."""
    texts = [row.text for row in all_rows()]
    found = process.cdist(texts, texts, scorer=fuzz.token_sort_ratio, processor=str.casefold, workers=1)
    alike = [(texts[a], texts[b]) for a, b in combinations(range(len(texts)), 2) if found[a, b] >= MAX_LIKENESS]
    assert alike == []


def test_repairs_are_sentences_in_one_house_style_about_different_flats() -> None:
    spec = load_spec("repairs")
    assert spec["task"]["metric"] == "rouge_l" and "labels" not in spec["task"]
    records = read_records(EXAMPLES / "repairs" / spec["task"]["data"])
    assert Counter(record["split"] for record in records) == {"train": 84, "test": 42}
    for record in records:
        assert 25 <= len(record["message"].split()) <= 60, record
        assert len(record["work_order"].split()) <= 18 and WORK_ORDER.fullmatch(record["work_order"]), record
    assert len({record["work_order"].split(",")[0] for record in records}) == len(records), "a flat for every message"


def test_the_rows_that_the_tests_read_stay_as_they_are() -> None:
    """The tests' tiny base model has its tokenizer from them: other rows would change every model of the tests."""
    digest = hashlib.sha256()
    for path in sorted(path for path in ROWS_OF_TESTS.rglob("*") if path.is_file()):
        digest.update(path.relative_to(ROWS_OF_TESTS).as_posix().encode() + b"\0" + path.read_bytes())
    assert digest.hexdigest() == DIGEST_OF_ROWS_OF_TESTS
