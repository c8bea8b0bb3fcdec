"""An arrival of several files: one dataset, one limit for bad rows, and each row with the name of its file."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from deal_core.config import DataConfig
from deal_core.data.dataset import ArrivalRefusedError, Landing, build_dataset, validate_file
from deal_core.data.schema import DatasetManifest, TaskSchema
from deal_core.data.source_files import SourceFile, SourceFiles, name_of
from deal_core.errors import DataValidationError

ROWS = [{"text": f"Text number {number}", "label": ("cat", "dog")[number % 2]} for number in range(60)]
TASK = TaskSchema(name="pets", format="auto")
LENIENT = DataConfig(max_bad_share=1.0)


def shards(folder: Path, *parts: Iterable[Mapping[str, Any]], ending: str = "jsonl") -> SourceFiles:
    """Parts of an arrival in the folder `may`."""
    (folder / "may").mkdir(exist_ok=True)
    files = []
    for number, part in enumerate(parts):
        path = folder / "may" / f"part-{number}.{ending}"
        match ending:
            case "jsonl.gz":
                path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in part).encode()))
            case "csv":
                pd.DataFrame(part).to_csv(path, index=False)
            case "parquet":
                pd.DataFrame(part).to_parquet(path)
            case _:
                path.write_text("".join(json.dumps(row) + "\n" for row in part))
        files.append(SourceFile(path, f"may/{path.name}"))
    return tuple(files)


def built(folder: Path, sources: SourceFiles, config: DataConfig = LENIENT, **landing: Any) -> DatasetManifest:
    landed = Landing(sources=sources, config=config, **{"task": TASK, **landing})
    return build_dataset(landed, folder / "dataset")


def bad_rows(folder: Path) -> list[tuple[str, int, str]]:
    entries = map(json.loads, (folder / "dataset" / "quarantine.jsonl").read_text().splitlines())
    return [(entry["file"], entry["row"], entry["reason"]) for entry in entries]


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "csv", "parquet"])
def test_the_same_rows_in_one_file_or_in_several_are_the_same_dataset(tmp_path: Path, ending: str) -> None:
    whole = built(tmp_path, shards(tmp_path, ROWS))
    parts = built(tmp_path, shards(tmp_path, ROWS[:10], ROWS[10:11], ROWS[11:], ending=ending))
    assert (parts.sha256, parts.landed_sha256, parts.task) == (whole.sha256, whole.landed_sha256, whole.task)
    assert (parts.num_read, parts.num_train, parts.num_test) == (60, whole.num_train, whole.num_test)
    assert (parts.source, len(parts.files), parts.training_files) == ("may", 3, parts.files)
    assert DatasetManifest.from_json(json.loads((tmp_path / "dataset" / "manifest.json").read_text())) == parts


def test_a_bad_row_is_named_with_its_file_and_its_number_in_that_file(tmp_path: Path) -> None:
    built(
        tmp_path, shards(tmp_path, ROWS[:30], [*ROWS[30:], {"text": "", "label": "cat"}], [{"label": "dog"}, ROWS[5]])
    )
    assert bad_rows(tmp_path) == [
        ("may/part-1.jsonl", 31, "empty text"),
        ("may/part-2.jsonl", 1, "missing column"),
        ("may/part-2.jsonl", 2, "duplicate row"),
    ]


def test_the_limit_for_bad_rows_is_that_of_the_whole_arrival(tmp_path: Path) -> None:
    """As if all rows were in one file: a small file may be bad."""
    bad = {"text": "", "label": "cat"}
    config = DataConfig(max_bad_share=0.05)
    assert built(tmp_path, shards(tmp_path, ROWS, [bad, bad]), config).num_rejected == 2
    told = r"^may: 4 of 64 rows cannot be used .*The first: may/part-1.jsonl row 1 empty text"
    with pytest.raises(ArrivalRefusedError, match=told):
        built(tmp_path, shards(tmp_path, ROWS, [bad] * 4), config)


def test_files_of_another_format_are_refused_by_name(tmp_path: Path) -> None:
    files = shards(tmp_path, ROWS[:20], ROWS[20:40], ROWS[40:])
    for name in ("notes.txt", "more.csv"):
        (tmp_path / "may" / name).write_text("text,label\nSome text,cat\n")
    others = tuple(SourceFile(tmp_path / "may" / name, f"may/{name}") for name in ("notes.txt", "more.csv"))
    told = r"^may has files of more than one format: may/notes\.txt, may/more\.csv, and the others are jsonl files"
    with pytest.raises(DataValidationError, match=told):
        validate_file(Landing(sources=(*files, *others), task=TASK, config=LENIENT))


def test_test_files_may_be_several_and_of_another_format(tmp_path: Path) -> None:
    train = shards(tmp_path, ROWS[:25], [*ROWS[25:40], ROWS[55]])
    tests = shards(tmp_path, ROWS[40:50], ROWS[50:], ending="csv")
    manifest = built(tmp_path, train, test_sources=tests)
    assert (manifest.num_train, manifest.num_test, manifest.num_training_files) == (40, 20, 2)
    assert len(manifest.files) == 4 and manifest.training_files == manifest.files[:2]
    assert bad_rows(tmp_path) == [("may/part-1.jsonl", 16, "text of a test row")]


def test_a_text_that_a_later_file_tests_is_not_learned_from_an_earlier_one(tmp_path: Path) -> None:
    train, test = ([{**row, "split": split} for row in ROWS] for split in ("train", "test"))
    manifest = built(tmp_path, shards(tmp_path, train[:40], [*test[40:], test[7]]))
    assert (manifest.num_train, manifest.num_test) == (39, 21)
    assert bad_rows(tmp_path) == [("may/part-0.jsonl", 8, "text of a test row")]


def test_files_with_and_without_a_split_are_refused_by_name(tmp_path: Path) -> None:
    named = [{**row, "split": "train" if number else "test"} for number, row in enumerate(ROWS)]
    with pytest.raises(DataValidationError, match=r"^may/part-1\.jsonl has no column split, and the other files"):
        built(tmp_path, shards(tmp_path, named[:30], ROWS[30:]))


def test_rows_drawn_at_random_count_if_all_files_say_it(tmp_path: Path) -> None:
    drawn = [{**row, "is_random": number % 4 == 0} for number, row in enumerate(ROWS)]
    several = built(tmp_path, shards(tmp_path, drawn[:30], drawn[30:]), renews_tests=True)
    assert (several.split, several.num_test) == ("given", 15)
    mixed = built(tmp_path, shards(tmp_path, drawn[:30], ROWS[30:]), renews_tests=True)
    assert mixed.split == "hash" and mixed.num_read == mixed.num_train + mixed.num_test


def test_files_whose_rows_differ_in_kind_are_refused_by_name(tmp_path: Path) -> None:
    chats = [{"prompt": f"Question {number}", "completion": "Yes."} for number in range(20)]
    with pytest.raises(DataValidationError, match=r"may/part-0\.jsonl and may/part-1\.jsonl have rows of different"):
        built(tmp_path, shards(tmp_path, ROWS, chats))


def test_a_damaged_file_is_named_with_its_folder(tmp_path: Path) -> None:
    files = shards(tmp_path, ROWS[:30], ROWS[30:], ending="parquet")
    files[1].path.write_bytes(files[1].path.read_bytes()[:100])
    with pytest.raises(DataValidationError, match=r"^may/part-1\.parquet: part-1\.parquet cannot be read, it is damag"):
        built(tmp_path, files)


def test_the_same_file_twice_is_one_file_for_forgetting(tmp_path: Path) -> None:
    manifest = built(tmp_path, shards(tmp_path, ROWS, ROWS))
    assert (len(manifest.files), manifest.num_training_files, manifest.num_rejected) == (1, 1, 60)


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
