"""Parts of files, read and checked apart, are what one process finds; Ray only carries them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from deal_core.config import DataConfig
from deal_core.data import on_ray
from deal_core.data.batch_check import CheckedFiles, FileCheck, checked_here
from deal_core.data.dataset import Landing, build_dataset
from deal_core.data.on_ray import checked_on_ray, parts_of
from deal_core.data.reading.part import Part
from deal_core.data.schema import TaskSchema
from deal_core.data.source_files import files_at
from deal_core.errors import ReaderDiedError

TASK = TaskSchema(name="pets", labels=("Dog", "cat"))
FILES = ("manifest.json", "quarantine.jsonl", "train.parquet", "train.inputs", "test.parquet")


def rows(start: int, count: int) -> list[dict[str, Any]]:
    """Good rows, and in between bad ones, odd ones and repetitions of earlier ones."""
    found = []
    for number in range(start, start + count):
        row = {"text": f"text number {number}", "label": "Dog" if number % 2 else "cat", "more": number}
        odd = {3: {"label": "bird"}, 5: {"text": "cafe\u0301"}, 7: {"text": None}, 8: {"text": "text number 1"}}
        found.append(row | odd.get(number % 10, {}))
    return found


@pytest.fixture
def landing(tmp_path: Path) -> Landing:
    """Two Parquet files of several row groups; rows of the first are repeated in the second."""
    for name, start in (("a", 0), ("b", 60)):
        table = pa.Table.from_pylist(rows(start, 100))
        pq.write_table(table, tmp_path / f"{name}.parquet", row_group_size=17)
    sources = files_at(tmp_path / "a.parquet", tmp_path / "b.parquet")
    return Landing(sources=sources, task=TASK, config=DataConfig(max_bad_share=1.0))


@pytest.fixture
def lines(tmp_path: Path) -> Landing:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(0, 50)) + '{"text": "cut\n{"text": "\\ud800"}\n')
    return Landing(sources=files_at(path), task=TASK, config=DataConfig(max_bad_share=1.0))


def built(landing: Landing, folder: Path) -> dict[str, bytes]:
    build_dataset(landing, folder)
    return {name: (folder / name).read_bytes() for name in FILES}


def carried(files: Any) -> CheckedFiles:
    """`checked_on_ray` without Ray: each part on its own, and Arrow's bytes in between."""
    for place, file in enumerate(files):
        for part in parts_of(file):
            columns = {name: np.array([value]) for name, value in {"file": place, **part._asdict()}.items()}
            for cells in on_ray._check_parts(files, columns):
                (item,) = pa.table(cells).to_pylist()
                if item["error"]:
                    raise on_ray._ERRORS[item["error"]](item["rows"].decode())
                yield item["file"], *on_ray._unpacked(item, files[item["file"]])


def test_parts_of_a_file_cover_its_row_groups(landing: Landing, monkeypatch: pytest.MonkeyPatch) -> None:
    (file, _) = [FileCheck(source, TASK, None, 9) for source in landing.sources]  # type: ignore[arg-type]  # not read
    assert parts_of(file) == [Part(0, 6, 1)]
    monkeypatch.setattr(on_ray, "PART_ROWS", 30)
    assert parts_of(file) == [Part(0, 2, 1), Part(2, 4, 35), Part(4, 6, 69)]


@pytest.mark.parametrize("name", ["landing", "lines"])
def test_what_is_checked_in_parts_gives_the_same_dataset(
    name: str, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of equal rows the first in file order is kept, and the others are in quarantine with their numbers."""
    monkeypatch.setattr(on_ray, "PART_ROWS", 30)
    ours = request.getfixturevalue(name)
    assert ours.check is checked_here
    here = built(ours, tmp_path / "here")
    assert built(replace(ours, check=carried), tmp_path / "there") == here
    assert b"duplicate row" in here["quarantine.jsonl"] and b"bird" in here["quarantine.jsonl"]


def test_the_error_of_a_part_arrives_as_it_is(
    landing: Landing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(self: FileCheck, part: Part) -> Any:
        raise ReaderDiedError("b.parquet ended the process that reads it")

    monkeypatch.setattr(FileCheck, "batches", dies)
    with pytest.raises(ReaderDiedError, match=r"^b\.parquet ended"):
        build_dataset(replace(landing, check=carried), tmp_path / "out")


@pytest.mark.nightly
def test_a_cluster_gives_the_same_dataset(landing: Landing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray", reason="the extra `ray` is not installed")
    monkeypatch.setattr(on_ray, "PART_ROWS", 30)
    there = built(replace(landing, check=checked_on_ray), tmp_path / "there")
    assert there == built(landing, tmp_path / "here")
