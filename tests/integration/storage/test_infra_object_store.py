"""The object store's contract, for a folder and for an S3 server over HTTP.

The server is moto's, in this process. With DEAL_TEST_S3=http://KEY:SECRET@HOST:PORT the same tests use a real
server.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from threading import Barrier, Event
from typing import Any
from urllib.parse import urlsplit

import pytest
from botocore.httpsession import URLLib3Session
from moto.s3.responses import S3Response

import infra.store.s3
from deal_core.errors import ConfigError, StoreError
from infra.settings import StoreSettings
from infra.store.base import ObjectNotFoundError, ObjectStore
from infra.store.opening import store_at
from infra.store.s3 import PROBE, S3Store, make_client
from tasks.housekeeping.garbage import old_temporaries, remove
from tests.s3 import ThreadedMotoServer, put_in_two_steps

SECONDS_TO_ARRIVE = 60


@pytest.fixture(scope="module")
def s3_settings() -> Iterator[StoreSettings]:
    real = os.environ.get("DEAL_TEST_S3")
    if real:
        address = urlsplit(real)
        yield settings_for(f"{address.scheme}://{address.hostname}:{address.port}", address.username, address.password)
        return
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield settings_for(f"http://{host}:{port}", "somebody", "secret")
    server.stop()


def settings_for(url: str, key: str | None, secret: str | None) -> StoreSettings:
    values = {"s3_endpoint_url": url, "s3_access_key_id": key, "s3_secret_access_key": secret}
    return StoreSettings.model_validate({**values, "s3_region": "us-east-1"})


@pytest.fixture
def s3_store(s3_settings: StoreSettings) -> S3Store:
    store = store_at(f"s3://bucket-{uuid.uuid4().hex}/team/store", s3_settings)
    assert isinstance(store, S3Store)
    store.client.create_bucket(Bucket=store.bucket)
    return store


@pytest.fixture(params=["file", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStore:
    if request.param == "s3":
        found: ObjectStore = request.getfixturevalue("s3_store")
        return found
    return store_at((tmp_path / "a store").as_uri())


def keys(store: ObjectStore, prefix: str = "") -> list[str]:
    return [info.key for info in store.list(prefix)]


def test_bytes_come_back_and_the_last_put_wins(store: ObjectStore) -> None:
    assert store.put_bytes("a/b.bin", b"\x00one")
    assert store.put_bytes("a/b.bin", b"two\xff")
    assert store.get_bytes("a/b.bin") == b"two\xff"
    assert store.exists("a/b.bin")
    assert not store.exists("a")
    assert not store.exists("a/b.bin2")


def test_no_more_is_read_than_was_asked_for(store: ObjectStore) -> None:
    store.put_bytes("a/large", b"abcdef")
    store.put_bytes("a/empty", b"")
    assert [store.get_bytes("a/large", at_most=most) for most in (3, 9)] == [b"abc", b"abcdef"]
    assert store.get_bytes("a/empty", at_most=3) == b""
    with pytest.raises(ObjectNotFoundError, match="'a/c'"):
        store.get_bytes("a/c", at_most=4)


def test_what_is_missing_is_said_with_its_key(store: ObjectStore, tmp_path: Path) -> None:
    target = tmp_path / "target"
    with pytest.raises(ObjectNotFoundError, match=r"no object 'a/b'.*check the name"):
        store.get_bytes("a/b")
    with pytest.raises(ObjectNotFoundError, match="'a/b'"):
        store.download_file("a/b", target)
    with pytest.raises(ObjectNotFoundError, match="nothing below 'a'"):
        store.download_folder("a", target)
    with pytest.raises(StoreError, match="there is no file"):
        store.upload_file(tmp_path / "absent", "a/b")
    assert not target.exists()
    assert keys(store) == []


def test_of_racing_conditional_puts_exactly_one_wins(store: ObjectStore) -> None:
    """Racers with different contents, and with the same one, which have the same ETag."""
    num_racers, num_rounds = 12, 3 if isinstance(store, S3Store) else 100
    barrier = Barrier(num_racers)

    def race(content: str) -> bool:
        barrier.wait()
        return store.put_bytes("ledger/base/one.json", content.encode(), if_absent=True)

    with ThreadPoolExecutor(num_racers) as pool:
        for contents in ([f"racer {number}" for number in range(num_racers)], ["racer"] * num_racers):
            for _ in range(num_rounds):
                won = list(pool.map(race, contents))
                assert sum(won) == 1
                assert store.get_bytes("ledger/base/one.json") == contents[won.index(True)].encode()
                assert keys(store) == ["ledger/base/one.json"]
                store.delete("ledger")


def test_an_object_is_replaced_only_while_it_is_what_was_read(store: ObjectStore) -> None:
    store.put_bytes("state", b"one")
    content, tag = store.get_tagged("state")
    assert content == b"one" and store.replace_bytes("state", b"two", tag)
    assert not store.replace_bytes("state", b"three", tag) and store.get_bytes("state") == b"two"
    _, tag = store.get_tagged("state")
    store.delete("state")
    assert not store.replace_bytes("state", b"three", tag) and not store.exists("state")
    with pytest.raises(ObjectNotFoundError):
        store.get_tagged("state")


def test_a_listing_goes_past_one_page(store: ObjectStore) -> None:
    """A page of the server has at most a thousand keys; here it is asked for ten."""
    pages: list[str | None] = []

    def ask_for_ten(params, **_):  # type: ignore[no-untyped-def]
        params["MaxKeys"] = 10
        pages.append(params.get("ContinuationToken"))

    if isinstance(store, S3Store):
        store.client.meta.events.register("provide-client-params.s3.ListObjectsV2", ask_for_ten)
    names = [f"many/{number:04d}" for number in range(25)]
    for name in names:
        store.put_bytes(name, b"x")
    assert keys(store, "many") == names
    assert len(set(pages)) == (3 if isinstance(store, S3Store) else 0)


def test_a_prefix_is_a_folder(store: ObjectStore) -> None:
    for key in ("a/1", "a/b/2", "ab/3", "a.txt"):
        store.put_bytes(key, b"x")
    assert keys(store, "a") == keys(store, "a/") == ["a/1", "a/b/2"]
    assert keys(store) == ["a.txt", "a/1", "a/b/2", "ab/3"]
    assert keys(store, "nothing") == []


def test_a_listing_tells_size_and_change(store: ObjectStore) -> None:
    store.put_bytes("x/one", b"12345")
    (before,) = store.list("x")
    store.put_bytes("x/one", b"54321")
    (after,) = store.list("x")
    found = store.find("x/one")
    assert found is not None and (found.key, found.size, found.etag) == (after.key, 5, after.etag)
    assert store.find("x") is store.find("x/two") is None
    assert before.size == after.size == 5
    assert before.etag != after.etag
    assert before.modified.tzinfo is not None and before.modified <= after.modified


def test_deleting_takes_the_object_and_its_folder_and_no_neighbour(store: ObjectStore) -> None:
    for key in ("a/1", "a/b/2", "ab/3", "c/d"):
        store.put_bytes(key, b"x")
    for prefix in ("a", "c/d", "c/d"):
        store.delete(prefix)
    assert keys(store) == ["ab/3"]
    assert store.put_bytes("a", b"no folder is left in the way")
    with pytest.raises(StoreError):
        store.delete("")
    assert keys(store) == ["a", "ab/3"]


@pytest.mark.parametrize(
    "key", ["", "/a", "a/", "../a", "a/../b", "a//b", "./a", "a\nb", "a\x7f", "a\udcff", "a" * 1025]
)
def test_bad_keys_are_refused(store: ObjectStore, key: str, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"x")
    for attempt in (
        lambda: store.put_bytes(key, b"x"),
        lambda: store.get_bytes(key),
        lambda: store.exists(key),
        lambda: store.upload_file(file, key),
        lambda: store.download_file(key, tmp_path / "target"),
    ):
        with pytest.raises(StoreError, match="The key"):
            attempt()
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize("key", ["inbox/bank/März 2024 (1) + ä%20&?.csv", "..a/b..", "a/...", "日本/語.jsonl"])
def test_unusual_names_work(store: ObjectStore, key: str, tmp_path: Path) -> None:
    store.put_bytes(key, key.encode())
    assert keys(store) == [key]
    store.download_file(key, tmp_path / "target")
    assert (tmp_path / "target").read_bytes() == key.encode()


def test_a_large_file_goes_up_and_down_unchanged(store: ObjectStore, tmp_path: Path) -> None:
    block = bytes(range(256)) * 4096
    source = tmp_path / "source"
    with source.open("wb") as writer:
        for number in range(20):
            writer.write(block[number:] + block[:number])
    store.upload_file(source, "large/file")
    assert [info.size for info in store.list("large")] == [20 << 20]
    store.download_file("large/file", tmp_path / "new" / "target")
    digests = [hashlib.sha256(path.read_bytes()).digest() for path in (source, tmp_path / "new" / "target")]
    assert digests[0] == digests[1]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["target"]


def test_a_folder_goes_up_and_down_with_its_marker_last(store: ObjectStore, tmp_path: Path) -> None:
    source = tmp_path / "source"
    for name in ("manifest.json", "train.parquet", "sub/z.bin"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)
    order = []
    upload = store.upload_file
    store.upload_file = lambda local, key: (order.append(key), upload(local, key))[1]  # type: ignore[method-assign]
    store.upload_folder(source, "data/x", marker="manifest.json")
    assert order[-1] == "data/x/manifest.json"

    store.download_folder("data/x", tmp_path / "target")
    found = {path.relative_to(tmp_path / "target").as_posix() for path in (tmp_path / "target").rglob("*.*")}
    assert found == {"manifest.json", "train.parquet", "sub/z.bin"}
    assert (tmp_path / "target" / "sub" / "z.bin").read_text() == "sub/z.bin"
    with pytest.raises(StoreError, match=r"no file absent\.json"):
        store.upload_folder(source, "data/y", marker="absent.json")
    assert keys(store, "data/y") == []


def test_a_conditional_put_whose_answer_got_lost_still_knows_that_it_won(s3_store: S3Store) -> None:
    sent = []

    def lose_first_answer(request, **_):  # type: ignore[no-untyped-def]
        sent.append(request)
        if len(sent) > 1:
            return None
        answer = URLLib3Session().send(request)
        assert answer.status_code == 200
        answer.status_code = 500
        return answer

    s3_store.check()
    s3_store.client.meta.events.register("before-send.s3.PutObject", lose_first_answer)
    assert s3_store.put_bytes("ledger/one", b"mine", if_absent=True)
    assert len(sent) == 2
    assert not s3_store.put_bytes("ledger/one", b"mine", if_absent=True)


@pytest.mark.parametrize("condition", ["IfNoneMatch", "IfMatch"])
def test_a_server_that_ignores_conditions_is_refused_before_anything_is_written(
    s3_store: S3Store, condition: str
) -> None:
    def ignore(params, **_):  # type: ignore[no-untyped-def]
        params.pop(condition, None)

    s3_store.client.meta.events.register("provide-client-params.s3.PutObject", ignore)
    for attempt in (s3_store.check, lambda: s3_store.put_bytes("ledger/one", b"x", if_absent=True)):
        with pytest.raises(StoreError) as refused:
            attempt()
        assert refused.value.code == "store-conditions"
    assert keys(s3_store) == []
    s3_store.client.meta.events.unregister("provide-client-params.s3.PutObject", ignore)
    s3_store.check()
    assert s3_store.put_bytes("ledger/one", b"x", if_absent=True)
    assert keys(s3_store) == ["ledger/one"]


def test_a_server_that_compares_tags_without_quotes_takes_conditional_puts(s3_store: S3Store) -> None:
    if os.environ.get("DEAL_TEST_S3"):
        pytest.skip("a real server is as it is")

    def as_ceph(params, **_):  # type: ignore[no-untyped-def]
        tag = params["headers"].get("If-Match")
        if tag is not None:
            params["headers"]["If-Match"] = '"another"' if tag.startswith('"') else f'"{tag}"'

    s3_store.client.meta.events.register("before-call.s3.PutObject", as_ceph)
    s3_store.put_bytes("a", b"1")
    _, tag = s3_store.get_tagged("a")
    assert s3_store.replace_bytes("a", b"2", tag)
    assert not s3_store.replace_bytes("a", b"3", tag), "it is not what was read any more"
    assert s3_store.get_bytes("a") == b"2"


def test_a_server_that_looks_and_then_writes_is_refused(s3_store: S3Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """As moto does without the tests' lock. Here its first put waits in the gap until another put is there too."""
    if os.environ.get("DEAL_TEST_S3"):
        pytest.skip("a real server is as it is")
    arrivals, two_are_there, get_checksum = itertools.count(1), Event(), S3Response._get_checksum

    def wait_for_another(self: S3Response, headers: dict[str, Any]) -> Any:
        if next(arrivals) == 2:
            two_are_there.set()
        two_are_there.wait(SECONDS_TO_ARRIVE)
        return get_checksum(self, headers)

    with monkeypatch.context() as moto:
        moto.setattr(S3Response, "put_object", put_in_two_steps)
        moto.setattr(S3Response, "_get_checksum", wait_for_another)
        with pytest.raises(StoreError) as refused:
            s3_store.check()
        assert refused.value.code == "store-conditions"
    assert keys(s3_store) == []
    s3_store.check()
    (left,) = s3_store.client.list_objects_v2(Bucket=s3_store.bucket)["Contents"]
    assert left["Key"] == s3_store.root + PROBE, "the note, and no test object"


def test_a_server_is_tried_out_once_a_store(s3_store: S3Store) -> None:
    puts: list[str] = []
    count = lambda params, **_: puts.append(params["Key"])  # noqa: E731
    s3_store.client.meta.events.register("provide-client-params.s3.PutObject", count)
    s3_store.put_bytes("a", b"1")
    s3_store.put_bytes("b", b"1", if_absent=True)
    s3_store.put_bytes("c", b"1", if_absent=True)
    infra.store.s3._probed.clear()  # another process
    s3_store.put_bytes("d", b"1", if_absent=True)
    before, *probes, note, first, second, third = (key.removeprefix(s3_store.root) for key in puts)
    assert (before, note, first, second, third) == ("a", PROBE, "b", "c", "d")
    is_real = bool(os.environ.get("DEAL_TEST_S3"))  # it may take a second try to learn how it compares tags
    assert len(probes) == 32 or (is_real and 32 < len(probes) <= 48)
    assert len(set(probes)) == 1 and re.fullmatch(rf"{PROBE}-[0-9a-f]{{32}}", probes[0])
    s3_store.client.put_object(Bucket=s3_store.bucket, Key=s3_store.root + probes[0])  # by a key that may not delete
    assert keys(s3_store) == ["a", "b", "c", "d"]


def test_objects_that_others_put_under_odd_keys_are_skipped(
    s3_store: S3Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for key in ("x/../../escaped", "x/", "x/good"):
        s3_store.client.put_object(Bucket=s3_store.bucket, Key=s3_store.root + key, Body=b"x")
    assert keys(s3_store) == ["x/good"]
    s3_store.download_folder("x", tmp_path / "deep" / "target")
    assert [path.name for path in (tmp_path / "deep").rglob("*") if path.is_file()] == ["good"]
    assert not list(tmp_path.rglob("escaped"))
    assert "x/../../escaped" in caplog.text
    assert caplog.text.count("Skipped") == 1, "what shows an empty folder is not worth a warning, and one is enough"
    s3_store.client.put_object(Bucket=s3_store.bucket, Key=s3_store.root + "x//doubled", Body=b"x")
    assert list(s3_store.unusable_keys("x")) == ["x/../../escaped", "x//doubled"]
    assert keys(s3_store, "x") == ["x/good"] and caplog.text.count("Skipped") == 2, "of each key"


def test_a_missing_bucket_and_a_dead_server_are_told_apart(s3_settings: StoreSettings, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    for attempt in (
        lambda: store_at("s3://no-such-bucket", s3_settings).put_bytes("a", b"x"),
        lambda: store_at("s3://no-such-bucket", s3_settings).upload_file(tmp_path / "file", "a"),
    ):
        with pytest.raises(StoreError, match=r"NoSuchBucket; make the bucket first"):
            attempt()
    nowhere = s3_settings.model_copy(update={"s3_endpoint_url": "http://127.0.0.1:9"})
    with pytest.raises(StoreError, match=r"127\.0\.0\.1:9.*check address and network"):
        store_at("s3://bucket", nowhere).get_bytes("a")


def test_a_denied_access_is_told_apart_and_shows_no_key(
    s3_store: S3Store, s3_settings: StoreSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3_store.put_bytes("a", b"1")
    monkeypatch.setattr("moto.settings.INITIAL_NO_AUTH_ACTION_COUNT", 0)  # from here on, moto checks the keys
    keys = settings_for(s3_settings.s3_endpoint_url or "", "nobody-known", "top-secret")
    stranger = S3Store(s3_store.bucket, s3_store.root, keys)
    for attempt in (
        lambda: stranger.get_bytes("a"),
        lambda: stranger.find("a"),
        lambda: stranger.put_bytes("b", b"x"),
        lambda: stranger.upload_file(Path(__file__), "b"),
        lambda: stranger.download_file("a", tmp_path / "a"),
        lambda: list(stranger.list()),
        lambda: stranger.delete("a"),
    ):
        with pytest.raises(StoreError, match="check the keys and what they are allowed to do") as refused:
            attempt()
        assert not isinstance(refused.value, ObjectNotFoundError)
        assert "nobody-known" not in str(refused.value) and "top-secret" not in str(refused.value)


def test_two_prefixes_of_one_bucket_are_two_stores(s3_store: S3Store, s3_settings: StoreSettings) -> None:
    other = store_at(f"s3://{s3_store.bucket}/team/store2", s3_settings)
    s3_store.put_bytes("a", b"1")
    other.put_bytes("a", b"2")
    assert (s3_store.get_bytes("a"), other.get_bytes("a")) == (b"1", b"2")
    raw = s3_store.client.list_objects_v2(Bucket=s3_store.bucket)
    assert [item["Key"] for item in raw["Contents"]] == ["team/store/a", "team/store2/a"]
    assert s3_store.uri_of("a") == f"s3://{s3_store.bucket}/team/store/a"


@pytest.mark.parametrize("key_id", [None, "alias/ours"])
def test_writes_are_encrypted_as_asked(s3_store: S3Store, s3_settings: StoreSettings, key_id: str | None) -> None:
    if os.environ.get("DEAL_TEST_S3"):
        pytest.skip("a real server encrypts over TLS alone, with keys of its own")
    kind = "aws:kms" if key_id else "AES256"
    settings = s3_settings.model_copy(update={"s3_encryption": kind, "s3_kms_key_id": key_id})
    store = S3Store(s3_store.bucket, "x", settings)
    store.put_bytes("a", b"1")
    store.put_bytes("b", b"1", if_absent=True)
    store.upload_file(Path(__file__), "c")
    for name in "abc":
        head = s3_store.client.head_object(Bucket=s3_store.bucket, Key=f"x/{name}")
        assert (head["ServerSideEncryption"], head.get("SSEKMSKeyId")) == (kind, key_id)


def test_a_key_without_its_encryption_is_refused(s3_settings: StoreSettings) -> None:
    with pytest.raises(ConfigError, match="DEAL_S3_ENCRYPTION is not aws:kms"):
        S3Store("bucket", "", s3_settings.model_copy(update={"s3_kms_key_id": "alias/ours"}))


def test_gc_ends_old_uploads_and_leaves_young_ones_those_to_the_inbox_and_objects(
    s3_store: S3Store, home: Path
) -> None:
    kept = "datasets/bank/77/train.parquet"
    s3_store.put_bytes(kept, b"complete")
    for key in (kept, "inbox/bank/may.csv"):
        named = {"Bucket": s3_store.bucket, "Key": s3_store.root + key}
        named["UploadId"] = s3_store.client.create_multipart_upload(**named)["UploadId"]
        s3_store.client.upload_part(**named, PartNumber=1, Body=b"rows")
    (upload,) = s3_store.uploads("datasets")
    assert (upload.key, upload.size) == (kept, 4)
    assert old_temporaries(s3_store, now=upload.modified + timedelta(hours=23)) == ()
    later = upload.modified + timedelta(hours=25)
    (removal,) = old_temporaries(s3_store, now=later)
    assert (removal.kind, removal.address, removal.num_bytes) == ("unfinished upload", kept, 4)
    for _ in range(2):  # the second time it has ended
        remove(s3_store, removal, later)
    assert [each.key for each in s3_store.uploads()] == ["inbox/bank/may.csv"]
    assert s3_store.get_bytes(kept) == b"complete"


def test_a_server_that_is_away_for_a_moment_is_waited_for(free_port: int) -> None:
    settings = settings_for(f"http://127.0.0.1:{free_port}", "somebody", "secret")
    patient = S3Store("patient", "", settings.model_copy(update={"s3_max_attempts": 15}))
    hasty = S3Store("patient", "", settings.model_copy(update={"s3_max_attempts": 1}))
    with pytest.raises(StoreError, match="check address and network"):
        hasty.put_bytes("a", b"1")
    tries: list[object] = []

    def start_at_the_third_try(**event: object) -> None:
        tries.append(event)
        if len(tries) == 3:
            server.start()
            make_client(settings).create_bucket(Bucket="patient")

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=free_port, verbose=False)
    patient.client.meta.events.register("before-send.s3.PutObject", start_at_the_third_try)
    assert patient.put_bytes("a", b"1")
    server.stop()
    assert len(tries) >= 3
