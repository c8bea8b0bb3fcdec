"""Rows are read from folders that `datasets` writes, from buckets and from the Hub; other addresses are refused."""

from __future__ import annotations

import gzip
import json
import shutil
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from urllib.parse import unquote

import datasets
import pytest
from huggingface_hub.utils import filter_repo_objects

from deal_core.config import DataConfig
from deal_core.data.dataset import Landing, validate_file
from deal_core.data.reading.lines import sha256_of_input
from deal_core.data.schema import TaskSchema
from deal_core.errors import ConfigError, DataValidationError, StoreError
from infra.settings import StoreSettings
from infra.store.local import FileStore
from infra.store.s3 import make_client
from tasks.data_files import local_files
from tests.loopback import Loopback
from tests.s3 import ThreadedMotoServer


@pytest.fixture
def rows() -> datasets.Dataset:
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])}
    )
    content = {"text": [f"Text {number}" for number in range(40)], "label": [number % 2 for number in range(40)]}
    return datasets.Dataset.from_dict(content, features=features)


@pytest.fixture
def store(tmp_path: Path) -> FileStore:
    return FileStore(tmp_path / "store")


def test_a_saved_dataset_is_read_with_the_names_of_its_labels(rows: datasets.Dataset, tmp_path: Path) -> None:
    rows.select(range(30)).save_to_disk(tmp_path / "saved")
    with local_files(FileStore(tmp_path / "store"), str(tmp_path / "saved")) as files:
        report = validate_file(Landing(sources=files, task=TaskSchema(name="t", format="auto"), config=DataConfig()))
    assert (report.manifest.num_read, set(report.manifest.task.labels)) == (30, {"bad", "good"})
    assert not files[0].path.exists()


def test_a_saved_dataset_has_the_same_digest_each_time(
    rows: datasets.Dataset, store: FileStore, tmp_path: Path
) -> None:
    rows.save_to_disk(tmp_path / "saved")
    digests = set()
    for _ in range(2):
        with local_files(store, str(tmp_path / "saved")) as (file,):
            digests.add(sha256_of_input(file.path))
    assert len(digests) == 1


def test_a_folder_of_several_splits_is_refused_with_their_names(
    rows: datasets.Dataset, store: FileStore, tmp_path: Path
) -> None:
    datasets.DatasetDict(train=rows, validation=rows).save_to_disk(tmp_path / "saved")
    told = "holds the splits train, validation; give the folder of one"
    with pytest.raises(DataValidationError, match=told), local_files(store, str(tmp_path / "saved")):
        pass
    with local_files(store, str(tmp_path / "saved" / "train")) as (file,):
        assert file.name == "train.parquet"


def test_a_damaged_folder_is_refused(rows: datasets.Dataset, store: FileStore, tmp_path: Path) -> None:
    rows.save_to_disk(tmp_path / "saved")
    next((tmp_path / "saved").glob("*.arrow")).write_bytes(b"no arrow")
    told = r"cannot be read.*save it again"
    with pytest.raises(DataValidationError, match=told), local_files(store, str(tmp_path / "saved")):
        pass


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "loop"])
def test_a_path_that_nothing_can_be_is_left_to_the_reader(name: str, store: FileStore, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with local_files(store, str(tmp_path / name)) as (file,):
        assert file.path == tmp_path / name


def table() -> bytes:
    return b"text,label\n" + b"".join(b"Text %d,%s\n" % (number, (b"bad", b"good")[number % 2]) for number in range(40))


def read(address: str, store: FileStore) -> int:
    with local_files(store, address) as files:
        report = validate_file(Landing(sources=files, task=TaskSchema(name="t", format="auto"), config=DataConfig()))
    assert set(report.manifest.task.labels) == {"bad", "good"} and not files[0].path.exists()
    return report.manifest.num_read


@pytest.fixture
def offline_hub(rows: datasets.Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hub's cache with one dataset of two splits, as huggingface_hub lays it out."""
    repository = tmp_path / "hub" / "datasets--ours--reviews"
    folder = repository / "snapshots" / ("a" * 40)
    (folder / "data").mkdir(parents=True)
    for split, part in (("train", rows.select(range(30))), ("test", rows.select(range(30, 40)))):
        part.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    (repository / "refs").mkdir()
    for name in ("main", "v2"):
        (repository / "refs" / name).write_text("a" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.mark.usefixtures("offline_hub")
@pytest.mark.parametrize(("suffix", "num_rows"), [("", 30), (":test", 10), ("@v2", 30), ("@v2:test", 10)])
def test_a_split_of_a_dataset_of_the_hub_is_read(suffix: str, num_rows: int, tmp_path: Path) -> None:
    assert read(f"hf://datasets/ours/reviews{suffix}", FileStore(tmp_path / "store")) == num_rows


@pytest.mark.parametrize("name", ["train.tsv", "train.csv.gz", "data/train.jsonl.gz", "train.json.gz", "train.tsv.gz"])
def test_a_dataset_of_the_hub_may_be_packed_or_have_tabs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hub" / "data").mkdir(parents=True)
    content = table().replace(b",", b"\t") if "tsv" in name else table()
    if "json" in name:
        content = b"".join(b'{"text": "Text %d", "label": "%s"}\n' % (i, (b"bad", b"good")[i % 2]) for i in range(40))
    (tmp_path / "hub" / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)

    def fetch(repository: str, kind: str, patterns: list[str], revision: str | None) -> Path:
        (tmp_path / "fetched" / "data").mkdir(parents=True)
        for each in filter_repo_objects([name], allow_patterns=patterns):
            shutil.copy(tmp_path / "hub" / each, tmp_path / "fetched" / each)
        return tmp_path / "fetched"

    monkeypatch.setattr("tasks.data_files.fetch_snapshot", fetch)
    assert read("hf://datasets/ours/reviews", FileStore(tmp_path / "store")) == 40


@pytest.mark.usefixtures("offline_hub")
@pytest.mark.parametrize(
    ("address", "error", "message"),
    [
        ("hf://datasets/ours/reviews:other", DataValidationError, "with the split 'other'"),
        ("hf://datasets/ours/absent", ConfigError, "could not be fetched from the Hub"),
        ("hf://models/ours/reviews", ConfigError, "is not a dataset of the Hub; give hf://datasets/OWNER/NAME"),
        ("ftp://me:secret@host/rows.csv", ConfigError, "^ftp://[^m]*host/rows.csv has a scheme that is not known"),
    ],
)
def test_an_address_that_cannot_be_read_says_what_to_give(
    address: str, error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message) as raised, local_files(FileStore(tmp_path / "store"), address):
        pass
    assert "secret" not in str(raised.value)


@pytest.fixture
def cloud(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A server that answers as Google's object store does, and the paths that were asked."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(unquote(self.path))
            found = asked[-1] == "/bucket/folder/rows.csv"
            body = table() if found else b""
            self.send_response(200 if found else 404)
            for name, value in {"Content-Length": len(body), "ETag": '"x"'}.items():
                self.send_header(name, str(value))
            self.send_header("Last-Modified", "Wed, 21 Oct 2015 07:28:00 GMT")
            self.end_headers()
            self.wfile.write(body)

    with Loopback(Handler) as server:
        key = {
            "gcs_base_url": server.address,
            "disable_oauth": True,
            "client_email": "",
            "private_key": "",
            "private_key_id": "",
        }
        monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT_KEY", json.dumps(key))
        monkeypatch.setenv("GOOGLE_ALLOW_HTTP", "true")
        yield asked


def test_a_file_of_another_cloud_is_read(cloud: list[str], tmp_path: Path) -> None:
    store = FileStore(tmp_path / "store")
    assert read("gs://bucket/folder/rows.csv", store) == 40 and cloud == ["/bucket/folder/rows.csv"]
    with pytest.raises(StoreError, match=r"gs://bucket/folder/none\.csv could not be read"):
        read("gs://bucket/folder/none.csv", store)


def test_without_the_extra_a_cloud_address_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(ConfigError, match=r"needs the extra `cloud`"):
        read("gs://bucket/rows.csv", FileStore(tmp_path / "store"))


def test_a_file_of_another_bucket_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bucket need not be the store's."""
    server = ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("DEAL_S3_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("DEAL_S3_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("DEAL_S3_SECRET_ACCESS_KEY", "b")
    try:
        client = make_client(StoreSettings())
        client.create_bucket(Bucket="theirs")
        client.put_object(Bucket="theirs", Key="may/rows.csv", Body=table())
        assert read("s3://theirs/may/rows.csv", FileStore(tmp_path / "store")) == 40
    finally:
        server.stop()
