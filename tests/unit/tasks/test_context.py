"""Folders that `datasets` writes are read like files; other folders are refused."""

from __future__ import annotations

from pathlib import Path

import datasets
import pytest

from deal_core.config import DataConfig
from deal_core.data.dataset import Landing, validate_file
from deal_core.data.reading.lines import sha256_of_input
from deal_core.data.schema import TaskSchema
from deal_core.errors import DataValidationError
from infra.store.local import FileStore
from tasks.context import as_file, local_file


@pytest.fixture
def rows() -> datasets.Dataset:
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])}
    )
    content = {"text": [f"Text {number}" for number in range(40)], "label": [number % 2 for number in range(40)]}
    return datasets.Dataset.from_dict(content, features=features)


def test_a_saved_dataset_is_read_with_the_names_of_its_labels(rows: datasets.Dataset, tmp_path: Path) -> None:
    rows.select(range(30)).save_to_disk(tmp_path / "saved")
    with local_file(FileStore(tmp_path / "store"), str(tmp_path / "saved")) as file:
        report = validate_file(Landing(source=file, task=TaskSchema(name="t", format="auto"), config=DataConfig()))
    assert (report.manifest.num_read, set(report.manifest.task.labels)) == (30, {"bad", "good"})
    assert not file.exists()


def test_a_saved_dataset_has_the_same_digest_each_time(rows: datasets.Dataset, tmp_path: Path) -> None:
    rows.save_to_disk(tmp_path / "saved")
    digests = set()
    for _ in range(2):
        with as_file(tmp_path / "saved") as file:
            digests.add(sha256_of_input(file))
    assert len(digests) == 1


def test_a_folder_of_several_splits_is_refused_with_their_names(rows: datasets.Dataset, tmp_path: Path) -> None:
    datasets.DatasetDict(train=rows, validation=rows).save_to_disk(tmp_path / "saved")
    told = "holds the splits train, validation; give the folder of one"
    with pytest.raises(DataValidationError, match=told), as_file(tmp_path / "saved"):
        pass
    with as_file(tmp_path / "saved" / "train") as file:
        assert file.name == "train.parquet"


def test_a_damaged_folder_is_refused(rows: datasets.Dataset, tmp_path: Path) -> None:
    rows.save_to_disk(tmp_path / "saved")
    next((tmp_path / "saved").glob("*.arrow")).write_bytes(b"no arrow")
    with pytest.raises(DataValidationError, match=r"cannot be read.*save it again"), as_file(tmp_path / "saved"):
        pass


def test_any_other_folder_is_no_file_of_rows(tmp_path: Path) -> None:
    landing = Landing(source=tmp_path, task=TaskSchema(name="t", format="auto"), config=DataConfig())
    with pytest.raises(DataValidationError, match="is a folder; give one file of rows"):
        validate_file(landing)


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "loop"])
def test_a_path_that_nothing_can_be_is_left_to_the_reader(name: str, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with as_file(tmp_path / name) as file:
        assert file == tmp_path / name
