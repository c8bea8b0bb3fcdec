"""The folder store's own behaviour. tests/integration tests the contract that it shares with S3."""

from __future__ import annotations

import hashlib
import os
import tempfile
import threading
from pathlib import Path

import pytest

from deal_core.errors import StoreError
from infra.store import base
from infra.store.base import UnusableObjectError
from infra.store.local import FileStore
from infra.store.opening import store_at
from tasks.data_files import local_files


def test_uris_and_paths_name_the_same_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store_at("my store").put_bytes("a/b", b"x")
    store = store_at(f"file://{tmp_path}/my%20store")
    assert store.get_bytes("a/b") == b"x"
    assert store.uri_of("a/b") == (tmp_path / "my store" / "a" / "b").as_uri()


def test_a_correction_with_the_size_and_the_time_of_what_it_replaces_has_another_etag(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    (tmp_path / "a").write_bytes(b"first")
    os.utime(tmp_path / "a", (1, 1))
    before = store.find("a")
    (tmp_path / "part").write_bytes(b"other")
    os.utime(tmp_path / "part", (1, 1))
    os.replace(tmp_path / "part", tmp_path / "a")  # as rsync -t does
    after = store.find("a")
    assert before is not None and after is not None and before.read_sha256 is not None and after.read_sha256 is not None
    assert (before.size, before.modified) == (after.size, after.modified) and before.etag != after.etag
    assert (before.read_sha256(), after.read_sha256()) == (None, hashlib.sha256(b"other").hexdigest())


@pytest.mark.parametrize("seconds", [-(10**11), 3 * 10**11])
def test_a_time_that_no_calendar_has_breaks_no_listing(seconds: int) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        path = Path(folder, "a")
        path.write_bytes(b"x")
        os.utime(path, (seconds, seconds))
        if os.stat(path).st_mtime != seconds:
            pytest.skip("the file system has no such time")
        (info,) = FileStore(Path(folder)).list()
    assert info.modified.year == (1 if seconds < 0 else 9999)


def test_a_reader_never_sees_half_an_object(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    contents = [bytes([number]) * 200_000 for number in range(2)]
    store.put_bytes("k", contents[0])
    done = threading.Event()
    seen = []

    def read() -> None:
        while not done.is_set():
            seen.append(store.get_bytes("k"))

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(60):
        store.put_bytes("k", contents[number % 2])
    done.set()
    reader.join()
    assert seen and all(content in contents for content in seen)


def test_an_upload_that_breaks_leaves_the_old_object_and_no_litter(tmp_path: Path) -> None:
    store = FileStore(tmp_path / "store")
    store.put_bytes("k", b"old")
    unreadable = tmp_path / "folder"
    unreadable.mkdir()
    with pytest.raises(StoreError):
        store.upload_file(unreadable, "k")
    assert store.get_bytes("k") == b"old"
    assert [info.key for info in store.list()] == ["k"]
    assert list((tmp_path / "store" / base.RESERVED).iterdir()) == []


@pytest.mark.parametrize("if_absent", [False, True])
def test_a_key_cannot_be_the_folder_of_another(tmp_path: Path, if_absent: bool) -> None:
    store = FileStore(tmp_path)
    store.put_bytes("a/b", b"x")
    with pytest.raises(StoreError, match="Cannot write 'a'"):
        store.put_bytes("a", b"x", if_absent=if_absent)
    with pytest.raises(StoreError, match="Cannot write 'a/b/c'"):
        store.put_bytes("a/b/c", b"x", if_absent=if_absent)
    assert [info.key for info in store.list()] == ["a/b"]


@pytest.mark.parametrize("if_absent", [False, True])
def test_a_folder_that_vanishes_under_a_writer_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, if_absent: bool
) -> None:
    store = FileStore(tmp_path)
    name = "link" if if_absent else "replace"
    place, make = getattr(os, name), Path.mkdir
    vanished, collided = [], []

    def place_too_late(part: Path, target: Path) -> None:
        if not vanished:
            vanished.append(target.parent.rmdir())
        place(part, target)

    def collide(path: Path, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        if path.name == "a" and not collided:
            collided.append(path)
            raise FileExistsError(path)
        make(path, mode, parents, exist_ok)

    monkeypatch.setattr(os, name, place_too_late)
    monkeypatch.setattr(Path, "mkdir", collide)
    assert store.put_bytes("a/b", b"x", if_absent=if_absent)
    assert vanished and collided
    assert store.get_bytes("a/b") == b"x"


def test_files_with_odd_names_are_skipped_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = FileStore(tmp_path)
    store.put_bytes("inbox/good", b"x")
    (tmp_path / "inbox" / "bad\nname").write_bytes(b"x")
    Path(os.fsdecode(os.fsencode(tmp_path / "inbox") + b"/latin-\xe4")).write_bytes(b"x")
    assert [info.key for info in store.list("inbox")] == ["inbox/good"]
    assert caplog.text.count("Skipped") == 2
    assert [info.key for info in FileStore(tmp_path).list()] == ["inbox/good"]
    assert caplog.text.count("Skipped") == 2, "a watch lists every two seconds"
    assert list(store.unusable_keys("inbox")) == ["inbox/bad\nname", "inbox/latin-\udce4"]


def test_a_folder_that_cannot_be_read_is_said_rather_than_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = FileStore(tmp_path)
    store.put_bytes("inbox/a/1", b"x")
    store.put_bytes("inbox/b/2", b"x")
    scandir = os.scandir

    def refuse(path: str) -> object:
        if os.fspath(path).endswith("/b"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert [info.key for info in store.list("inbox/a")] == ["inbox/a/1"]
    with pytest.raises(StoreError, match=r"Cannot list 'inbox' .*Permission denied"):
        list(store.list("inbox"))
    assert list(store.list("inbox/a/1")) == [], "a file is no folder"


def test_the_reserved_folder_is_nobodys_key(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="keeps for itself"):
        FileStore(tmp_path).put_bytes(f"{base.RESERVED}/x", b"x")


def test_downloaded_files_have_the_users_usual_permissions(tmp_path: Path) -> None:
    store = FileStore(tmp_path / "store")
    store.put_bytes("a", b"x")
    store.download_file("a", tmp_path / "mine")
    (tmp_path / "plain").write_bytes(b"x")
    assert (tmp_path / "mine").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert (tmp_path / "store" / "a").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_what_is_no_regular_file_is_skipped_said_and_never_waited_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = FileStore(tmp_path)
    store.put_bytes("inbox/t/a.csv", b"x")
    os.mkfifo(tmp_path / "inbox" / "t" / "fifo.csv")
    (tmp_path / "inbox" / "t" / "zero.csv").symlink_to("/dev/zero")
    (tmp_path / "inbox" / "t" / "loop.csv").symlink_to("loop.csv")
    assert [info.key for info in store.list("inbox")] == ["inbox/t/a.csv"]
    assert caplog.text.count("Skipped") == 3
    problems = store.unusable_keys("inbox")
    assert problems["inbox/t/fifo.csv"] == "it is a FIFO, and only regular files are read; remove it"
    for read in (store.get_bytes, lambda key: store.download_file(key, tmp_path / "copy"), store.path_of):
        for key in ("inbox/t/fifo.csv", "inbox/t/zero.csv"):
            if read == store.path_of and "fifo" in key:
                continue  # who opens the path says so
            with pytest.raises(UnusableObjectError, match=r"is a FIFO|leads out"):
                read(key)
    assert not (tmp_path / "copy").exists()


def test_a_link_in_a_store_does_not_leave_its_top_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    secret = tmp_path / "secret.csv"
    secret.write_bytes(b"secret")
    store = FileStore(tmp_path / "store")
    store.put_bytes("inbox/t/a.csv", b"x")
    store.put_bytes("adapters/l/weights", b"private")
    inbox = tmp_path / "store" / "inbox"
    (inbox / "t" / "within.csv").symlink_to("a.csv")
    (inbox / "t" / "absolute.csv").symlink_to(secret)
    (inbox / "t" / "upwards.csv").symlink_to("../../../secret.csv")
    (inbox / "t" / "sideways.csv").symlink_to("../../adapters/l/weights")
    (inbox / "folder").symlink_to(tmp_path)
    out = ["absolute", "sideways", "upwards"]
    assert [info.key for info in store.list("inbox")] == ["inbox/t/a.csv", "inbox/t/within.csv"]
    problems = store.unusable_keys("inbox")
    assert sorted(problems) == ["inbox/folder", *(f"inbox/t/{name}.csv" for name in out)]
    assert problems["inbox/folder"] == "it is a link to a folder, which is not read; put the folder there"
    assert list(store.list("inbox/folder")) == []
    assert store.get_bytes("inbox/t/within.csv") == b"x"
    for key in (*(f"inbox/t/{name}.csv" for name in out), "inbox/folder/secret.csv"):
        with pytest.raises(UnusableObjectError, match=r"a link that leads out of inbox/; put the file there"):
            store.get_bytes(key)
        with pytest.raises(UnusableObjectError), local_files(store, store.uri_of(key)):
            pass


def test_a_top_folder_may_lie_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "inbox").symlink_to(tmp_path / "disk")
    store = FileStore(tmp_path / "store")
    store.put_bytes("inbox/t/a.csv", b"x")
    assert store.get_bytes("inbox/t/a.csv") == b"x"
    assert [info.key for info in store.list("inbox")] == ["inbox/t/a.csv"]
