"""Rows are read from folders that `datasets` writes, from buckets and from the Hub; other addresses are refused."""

from __future__ import annotations

import gzip
import json
import shutil
import sys
from collections.abc import Iterable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote

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
from infra.store.opening import open_store, store_at
from infra.store.s3 import S3Store, make_client
from tasks.adaptation.ingest import ingest
from tasks.arrivals import sense_inbox
from tasks.data_files import local_files
from tasks.inbox import look, task_spec
from tasks.lineage.datasets import read_manifest
from tasks.lineage.settings import WatchedLineage
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


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "lake/may", "lake/may/"])
def test_a_folder_that_does_not_exist_is_called_so(name: str, store: FileStore, tmp_path: Path) -> None:
    with pytest.raises(DataValidationError, match="There is no file or folder /"):
        names(store, str(tmp_path / name))


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


TABLES = ("part-1.csv", "part-0.csv", "day=2/part-0.csv")
"""Names of tables in a folder, not in their order."""
NOTES = ("_SUCCESS", "_committed_1", "_delta_log/0.json", ".part-0.csv.crc", "day=2/.hidden.csv")
"""Names of what engines write beside them."""
READ = ["may/day=2/part-0.csv", "may/part-0.csv", "may/part-1.csv"]


def names(store: FileStore | S3Store, addresses: str | tuple[str, ...]) -> list[str]:
    """The names of the files behind addresses, whose contents are read too."""
    with local_files(store, addresses) as files:
        assert all(file.path.read_bytes() == table() for file in files)
        return [file.name for file in files]


def may(folder: Path, *more: str) -> Path:
    """A folder as an engine writes it."""
    for name in (*TABLES, *NOTES, *more):
        path = folder / "may" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(table())
    return folder / "may"


def test_a_folder_is_read_in_the_order_of_names_without_notes_of_engines(store: FileStore, tmp_path: Path) -> None:
    folder = may(tmp_path)
    for address in (str(folder), f"{folder}/", folder.as_uri()):
        assert names(store, address) == READ
    with local_files(store, str(folder)) as files:
        task, config = TaskSchema(name="t", format="auto"), DataConfig(max_bad_share=1.0)
        report = validate_file(Landing(sources=files, task=task, config=config))
    assert (report.manifest.source, report.manifest.num_read, report.manifest.num_rejected) == ("may", 120, 80)


@pytest.mark.parametrize(
    ("pattern", "read"),
    [
        ("may/part-*.csv", ["part-0.csv", "part-1.csv"]),
        ("may/part-[1-9].csv", ["part-1.csv"]),
        ("may/*", ["day=2/part-0.csv", "part-0.csv", "part-1.csv"]),
        ("m?y", READ),
        ("*/day=*", ["may/day=2/part-0.csv"]),
        ("**/part-0.csv", ["may/day=2/part-0.csv", "may/part-0.csv"]),
    ],
)
def test_a_pattern_is_one_arrival(pattern: str, read: list[str], store: FileStore, tmp_path: Path) -> None:
    """The same on this machine and in a store."""
    may(tmp_path / "here")
    assert names(store, f"{tmp_path / 'here'}/{pattern}") == read
    for file in may(tmp_path / "here").rglob("*"):
        if file.is_file():
            store.upload_file(file, f"rows/{file.relative_to(tmp_path / 'here')}")
    assert names(store, f"{store.uri}/rows/{pattern}") == read


def test_a_name_with_signs_of_a_pattern_is_read_if_it_exists(store: FileStore, tmp_path: Path) -> None:
    for name in ("rows[1].csv", "what?/a*.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(table())
        store.put_bytes(f"inbox/bank/{name}", table())
    assert names(store, str(tmp_path / "rows[1].csv")) == ["rows[1].csv"]
    assert names(store, str(tmp_path / "what?")) == ["what?/a*.csv"]
    assert names(store, store.uri_of("inbox/bank/rows[1].csv")) == ["rows[1].csv"]
    assert names(store, store.uri_of("inbox/bank/what?")) == ["what?/a*.csv"]


def test_several_addresses_are_read_in_their_order(store: FileStore, tmp_path: Path) -> None:
    folder = may(tmp_path)
    (tmp_path / "april.csv").write_bytes(table())
    addresses = (str(tmp_path / "april.csv"), str(folder / "part-1.csv"), str(folder))
    assert names(store, addresses) == ["april.csv", "part-1.csv", *READ]


@pytest.mark.parametrize("name", ["empty", "empty/", "none*.csv", "none/*.csv"])
def test_what_holds_no_file_of_rows_is_refused(name: str, store: FileStore, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "_SUCCESS").touch()
    for address in (str(tmp_path / name), f"{store.uri}/inbox/{name.rstrip('/')}/"):
        with pytest.raises(DataValidationError, match=r"[Nn]o file of rows.*begins with \. or _ are not read"):
            names(store, address)


def test_a_link_to_a_folder_is_refused_by_name(store: FileStore, tmp_path: Path) -> None:
    folder = may(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    (folder / "more").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataValidationError, match=r"may/more is a link to a folder, which is not read"):
        names(store, str(folder))


def test_links_do_not_lead_out_of_a_folder_of_the_store(store: FileStore, tmp_path: Path) -> None:
    (tmp_path / "secret.csv").write_bytes(table())
    store.put_bytes("inbox/bank/may/a.csv", table())
    (tmp_path / "store/inbox/bank/may/b.csv").symlink_to(tmp_path / "secret.csv")
    assert names(store, store.uri_of("inbox/bank/may")) == ["may/a.csv"]


def test_a_saved_dataset_in_the_store_is_read_and_none_that_names_files_elsewhere(
    rows: datasets.Dataset, store: FileStore, tmp_path: Path
) -> None:
    rows.save_to_disk(tmp_path / "store/inbox/bank/saved")
    address = store.uri_of("inbox/bank/saved")
    assert read(address, store) == 40
    (arrow,) = (tmp_path / "store/inbox/bank/saved").glob("*.arrow")
    arrow.rename(tmp_path / "elsewhere.arrow")
    state = tmp_path / "store/inbox/bank/saved/state.json"
    state.write_text(state.read_text().replace(arrow.name, str(tmp_path / "elsewhere.arrow")))
    with pytest.raises(DataValidationError, match=r"looks like a folder of datasets\.save_to_disk and cannot be read"):
        read(address, store)


def test_more_files_than_an_arrival_has_are_refused(
    store: FileStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.data_files.MAX_FILES", 2)
    for address in (str(may(tmp_path)), f"{tmp_path}/may/**/*.csv"):
        with pytest.raises(DataValidationError, match="has more than 2 files; give a folder of one arrival"):
            names(store, address)


@pytest.fixture
def cloud(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A server that answers as Google's object store does, and the paths that were asked."""
    asked: list[str] = []
    found = [f"folder/{name}" for name in ("rows.csv", *(f"may/{name}" for name in (*TABLES, *NOTES)))]

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path, _, query = unquote(self.path).partition("?")
            asked.append(path)
            body, is_found = table(), path.removeprefix("/bucket/") in found
            if "list-type" in query:
                prefix = parse_qs(query)["prefix"][0]
                body, is_found = listing(key for key in found if key.startswith(prefix)), True
            self.send_response(200 if is_found else 404)
            body = body if is_found else b""
            for name, value in {"Content-Length": len(body), "ETag": '"x"'}.items():
                self.send_header(name, str(value))
            self.send_header("Last-Modified", "Wed, 21 Oct 2015 07:28:00 GMT")
            self.end_headers()
            self.wfile.write(body)

    def listing(keys: Iterable[str]) -> bytes:
        entries = "".join(
            f"<Contents><Key>{key}</Key><Size>{len(table())}</Size><ETag>x</ETag>"
            "<LastModified>2015-10-21T07:28:00.000Z</LastModified></Contents>"
            for key in keys
        )
        return f"<ListBucketResult><IsTruncated>false</IsTruncated>{entries}</ListBucketResult>".encode()

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


def test_a_folder_and_a_pattern_of_another_cloud_are_read(cloud: list[str], tmp_path: Path) -> None:
    store = FileStore(tmp_path / "store")
    for address in ("gs://bucket/folder/may/", "gs://bucket/folder/may"):
        assert names(store, address) == READ
    assert names(store, "gs://bucket/folder/m*/part-*") == ["may/part-0.csv", "may/part-1.csv"]
    with pytest.raises(StoreError, match=r"gs://bucket/none/ could not be read \(there is no such object"):
        names(store, "gs://bucket/none/")


def test_without_the_extra_a_cloud_address_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(ConfigError, match=r"needs the extra `cloud`"):
        read("gs://bucket/rows.csv", FileStore(tmp_path / "store"))


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A client of a server that has the bucket `theirs`."""
    server = ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("DEAL_S3_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("DEAL_S3_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("DEAL_S3_SECRET_ACCESS_KEY", "b")
    client = make_client(StoreSettings())
    client.create_bucket(Bucket="theirs")
    yield client
    server.stop()


def test_a_prefix_and_a_pattern_of_a_bucket_are_read(bucket: Any, store: FileStore) -> None:
    for name in (*TABLES, *NOTES):
        bucket.put_object(Bucket="theirs", Key=f"lake/may/{name}", Body=table())
    bucket.put_object(Bucket="theirs", Key="lake/may2/part-0.csv", Body=table())
    own = store_at("s3://theirs/lake")
    assert isinstance(own, S3Store)
    for place in (store, own):
        for address in ("s3://theirs/lake/may/", "s3://theirs/lake/may"):
            assert names(place, address) == READ
        assert names(place, "s3://theirs/lake/may/part-*.csv") == ["part-0.csv", "part-1.csv"]
        assert names(place, "s3://theirs/lake/may/part-1.csv") == ["part-1.csv"], "the bucket need not be the store's"
    with local_files(store, "s3://theirs/lake/may") as files:
        pass
    assert not any(file.path.exists() for file in files)
    with pytest.raises(DataValidationError, match="s3://theirs/lake/june/ has no file of rows"):
        names(store, "s3://theirs/lake/june/")
    with pytest.raises(StoreError, match="There is no object 'lake/june'"):
        names(store, "s3://theirs/lake/june")


def test_a_saved_dataset_of_a_bucket_is_read(
    bucket: Any, rows: datasets.Dataset, store: FileStore, tmp_path: Path
) -> None:
    rows.save_to_disk(tmp_path / "saved")
    for file in (tmp_path / "saved").iterdir():
        bucket.upload_file(str(file), "theirs", f"saved/{file.name}")
    assert read("s3://theirs/saved/", store) == 40


def test_a_folder_in_the_inbox_of_a_bucket_is_one_arrival(bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEAL_STORE_URI", "s3://theirs/lake")
    store, lines = open_store(), table().splitlines(keepends=True)
    header, folder = lines[0], "inbox/bank/may"
    store.put_bytes(f"{folder}/part-1.csv", header + b"".join(lines[30:]) + b",good\n")
    store.put_bytes(f"{folder}/day=2/part-0.csv", b"".join(lines[:30]))
    store.put_bytes("inbox/bank/whole.csv", table())

    def complete() -> list[str]:
        state = sense_inbox(store, WatchedLineage(lineage="l"), look(store), 0)
        return sorted(key for key, note in state.arrivals.items() if note.state == "waiting")

    assert complete() == ["inbox/bank/whole.csv"]
    store.put_bytes(f"{folder}/_SUCCESS", b"")
    assert complete() == [folder, "inbox/bank/whole.csv"]
    arrivals = (task_spec(store, key) for key in complete())
    parts, whole = (ingest(store, arrival, DataConfig(max_bad_share=0.1), None, "l") for arrival in arrivals)
    assert (parts.sha256, parts.num_train, parts.num_test) == (whole.sha256, whole.num_train, whole.num_test)
    (bad,) = map(json.loads, store.get_bytes(str(parts.quarantine)).splitlines())
    assert (bad["file"], bad["row"], bad["reason"]) == ("may/part-1.csv", 12, "empty text")
    assert len(read_manifest(store, parts.uri).files) == 3, "two of the folder, and the one with the same rows"
