"""An arrival of several files: one dataset, one limit for bad rows, and each row with the name of its file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from deal_core.config import DataConfig
from deal_core.data.dataset import ArrivalRefusedError
from deal_core.data.source_files import SourceFile, SourceFiles, name_of
from deal_core.errors import DataValidationError
from tests.built import AUTO, LENIENT, Built, build, write_rows

ROWS = [{"text": f"Text number {number}", "label": ("cat", "dog")[number % 2]} for number in range(60)]
BAD = {"text": "", "label": "cat"}


def shards(folder: Path, *parts: list[dict[str, Any]], ending: str = "jsonl") -> SourceFiles:
    """Parts of an arrival in the folder `may`."""
    (folder / "may").mkdir(exist_ok=True)
    paths = [write_rows(folder / "may" / f"part-{number}.{ending}", part) for number, part in enumerate(parts)]
    return tuple(SourceFile(path, f"may/{path.name}") for path in paths)


def bad_rows(built: Built) -> list[tuple[str, int, str]]:
    return [(entry["file"], entry["row"], entry["reason"]) for entry in built.bad]


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "csv", "parquet"])
def test_the_same_rows_in_one_file_or_in_several_are_the_same_dataset(tmp_path: Path, ending: str) -> None:
    whole = build(shards(tmp_path, ROWS)).manifest
    parts = build(shards(tmp_path, ROWS[:10], ROWS[10:11], ROWS[11:], ending=ending)).manifest
    assert (parts.sha256, parts.landed_sha256, parts.task) == (whole.sha256, whole.landed_sha256, whole.task)
    assert (parts.num_read, parts.num_train, parts.num_test) == (60, whole.num_train, whole.num_test)
    assert (parts.source, len(parts.files), parts.training_files) == ("may", 3, parts.files)
    same = build(shards(tmp_path, ROWS, ROWS)).manifest
    assert (len(same.files), same.num_training_files, same.num_rejected) == (1, 1, 60), "one file for forgetting"


def test_a_bad_row_is_named_with_its_file_and_its_number_in_that_file(tmp_path: Path) -> None:
    built = build(shards(tmp_path, ROWS[:30], [*ROWS[30:], BAD], [{"label": "dog"}, ROWS[5]]))
    assert bad_rows(built) == [
        ("may/part-1.jsonl", 31, "empty text"),
        ("may/part-2.jsonl", 1, "missing column"),
        ("may/part-2.jsonl", 2, "duplicate row"),
    ]


def test_the_limit_for_bad_rows_is_that_of_the_whole_arrival(tmp_path: Path) -> None:
    """As if all rows were in one file: a small file may be bad."""
    config = DataConfig(max_bad_share=0.05)
    assert build(shards(tmp_path, ROWS, [BAD, BAD]), AUTO, config).manifest.num_rejected == 2
    with pytest.raises(ArrivalRefusedError, match=r"^may: 4 of 64 rows .*The first: may/part-1.jsonl row 1 empty text"):
        build(shards(tmp_path, ROWS, [BAD] * 4), AUTO, config)


def test_test_files_may_be_several_and_of_another_format(tmp_path: Path) -> None:
    train = shards(tmp_path, ROWS[:25], [*ROWS[25:40], ROWS[55]])
    tests = shards(tmp_path, ROWS[40:50], ROWS[50:], ending="csv")
    built = build(train, test_sources=tests)
    found = built.manifest
    assert (found.num_train, found.num_test, found.num_training_files, len(found.files)) == (40, 20, 2, 4)
    assert found.training_files == found.files[:2]
    assert bad_rows(built) == [("may/part-1.jsonl", 16, "text of a test row")]


def test_a_text_that_a_later_file_tests_is_not_learned_from_an_earlier_one(tmp_path: Path) -> None:
    train, test = ([{**row, "split": split} for row in ROWS] for split in ("train", "test"))
    built = build(shards(tmp_path, train[:40], [*test[40:], test[7]]))
    assert (built.manifest.num_train, built.manifest.num_test) == (39, 21)
    assert bad_rows(built) == [("may/part-0.jsonl", 8, "text of a test row")]


def test_rows_drawn_at_random_count_if_all_files_say_it(tmp_path: Path) -> None:
    drawn = [{**row, "is_random": number % 4 == 0} for number, row in enumerate(ROWS)]
    several = build(shards(tmp_path, drawn[:30], drawn[30:]), renews_tests=True).manifest
    assert (several.split, several.num_test) == ("given", 15)
    assert build(shards(tmp_path, drawn[:30], ROWS[30:]), renews_tests=True).manifest.split == "hash"


def test_files_that_do_not_fit_together_are_refused_by_name(tmp_path: Path) -> None:
    def refusal_of(*files: SourceFile) -> str:
        with pytest.raises(DataValidationError) as refused:
            build(files, AUTO, LENIENT)
        return str(refused.value)

    named = [{**row, "split": "train" if number else "test"} for number, row in enumerate(ROWS)]
    assert refusal_of(*shards(tmp_path, named[:30], ROWS[30:])).startswith("may/part-1.jsonl has no column split")
    chats = [{"prompt": f"Question {number}", "completion": "Yes."} for number in range(20)]
    different = refusal_of(*shards(tmp_path, ROWS, chats))
    assert different.startswith("may/part-0.jsonl and may/part-1.jsonl have rows of different formats")
    files = shards(tmp_path, ROWS[:20], ROWS[20:40], ROWS[40:])
    others = [SourceFile(tmp_path / "may" / name, f"may/{name}") for name in ("notes.txt", "more.csv")]
    assert ": may/notes.txt, may/more.csv, and the others are jsonl files" in refusal_of(*files, *others)
    files = shards(tmp_path, ROWS[:30], ROWS[30:], ending="parquet")
    files[1].path.write_bytes(files[1].path.read_bytes()[:100])
    assert refusal_of(*files).startswith("may/part-1.parquet: part-1.parquet cannot be read, it is damaged")


@pytest.mark.parametrize(
    ("names", "name"),
    [
        (["a.csv"], "a.csv"),
        (["may/day=1/a.csv"], "may/day=1/a.csv"),
        (["may/day=1/a.csv", "may/b.csv"], "may"),
        (["a.csv", "b.csv", "c.csv"], "a.csv and 2 more"),
        (["may/a.csv", "june/a.csv"], "may/a.csv and 1 more"),
    ],
)
def test_an_arrival_is_called_by_its_file_or_its_folder(names: list[str], name: str) -> None:
    assert name_of([SourceFile(Path(each), each) for each in names]) == name
