"""The champion in memory follows the promotion log, also with a store that does not answer or has damaged versions."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from deal_core.config import Quantize
from deal_core.errors import ConfigError, StoreError
from deal_core.evaluation.answerer import GivenUpError
from deal_core.evaluation.answering import SERVED_FILE, InputRow, ServedVersion
from deal_core.judging_config import RolloutTerms
from infra.serving import champion as serving
from infra.serving.champion import Champion, NoChampionError, ServingError
from infra.serving.prediction_log import PredictionLog
from infra.serving.version_files import SERVED_FILES
from infra.store.base import ObjectInfo
from infra.store.local import FileStore
from infra.versions import Version, Versions
from tests.stored_versions import move, store_version

WAIT_SECONDS = 60
BASES = ("the base", "another base", "the base", "the base")
"""The base models of versions 1 to 4."""


class Store(FileStore):
    """A folder that notes what is read, or does not answer."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.requests: list[str] = []
        self.is_away = self.is_broken = False

    def get_bytes(self, key: str, *, at_most: int | None = None) -> bytes:
        self._note(f"get {key}")
        return super().get_bytes(key, at_most=at_most)

    def download_file(self, key: str, local: Path) -> None:
        self._note(f"download {key}")
        super().download_file(key, local)

    def _list_all(self, prefix: str) -> Iterator[ObjectInfo]:
        self._note(f"list {prefix}")
        return super()._list_all(prefix)

    def _note(self, request: str) -> None:
        self.requests.append(request)
        if self.is_away:
            raise StoreError("The store is away.")
        if self.is_broken:
            raise KeyError("what nobody expects")

    @property
    def num_looks(self) -> int:
        return self.requests.count("list promotions/l")

    @property
    def num_downloads(self) -> int:
        return sum(request.endswith(f"/{SERVED_FILE}") for request in self.requests)


class Answerer:
    """Accepts every version except the broken ones."""

    broken: ClassVar[set[str]] = set()
    retry_seconds = 60.0

    def __init__(self, folder: Path, *_: Any, version: str, **__: Any) -> None:
        self.version, self.held_base, self.swaps = version, ("the base", "none"), list[tuple[str, Any]]()
        self.candidate: str | None = None
        self._check(version)

    def swap(self, folder: Path, version: str, base: Any = None) -> None:
        assert {path.name for path in folder.iterdir()} == {*SERVED_FILES}
        self._check(version)
        self.version, self.held_base = version, base or self.held_base
        self.swaps.append((version, base))

    def add_candidate(self, folder: Path, version: str) -> None:
        assert {path.name for path in folder.iterdir()} == {*SERVED_FILES}
        self.candidate = version

    def drop_candidate(self) -> None:
        self.candidate = None

    def _check(self, version: str) -> None:
        if version in self.broken:
            raise ConfigError(f"the files of {version} do not fit.")

    def stop(self) -> None:
        pass


def files_of(number: int, quantize: Quantize = "none") -> dict[str, bytes]:
    """The files of a version in the store."""
    served = ServedVersion(
        lineage="l",
        base_source="b",
        base_name="b",
        tasks=(),
        newest_task="t",
        base_sha256=BASES[number - 1],
        quantize=quantize,
    )
    return {
        "adapter_config.json": b"{}",
        "adapter_model.safetensors": f"weights {number}".encode(),
        SERVED_FILE: json.dumps(served.to_json()).encode(),
        "record.json": b"not needed to answer",
    }


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Store:
    """A store with the versions 1 to 4 of `l`, of which 1 is champion."""
    monkeypatch.setenv("DEAL_HOME", str(tmp_path))
    monkeypatch.setattr(serving, "load_answerer", Answerer)
    monkeypatch.setattr(serving, "Answerer", Answerer)
    monkeypatch.setattr(serving, "load_base_of", lambda served, *_, **__: served.held_base)
    monkeypatch.setattr(serving, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(serving, "MAX_POLL_SECONDS", 0.02)
    monkeypatch.setattr(Answerer, "broken", set())
    store = Store(tmp_path / "store")
    for number in range(1, len(BASES) + 1):
        store_version(store, files_of(number))
    move(store, "1")
    store.requests.clear()
    return store


def a_champion(store: Store) -> Champion:
    return Champion(store, "l", lambda text: None)


class Following:
    """A champion that follows the log in a thread, and its messages."""

    def __init__(self, store: Store) -> None:
        self.said: list[str] = []
        self._store = store
        self._changed = threading.Condition()
        self.champion = Champion(store, "l", self._say)
        self.champion.begin()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self.champion.follow, args=(self._stopped,))
        self._thread.start()

    def _say(self, text: str) -> None:
        with self._changed:
            self.said.append(text)
            self._changed.notify_all()

    def wait_for(self, text: str) -> str:
        """The first message that contains the text."""
        with self._changed:
            assert self._changed.wait_for(lambda: any(text in each for each in self.said), WAIT_SECONDS), self.said
            return next(each for each in self.said if text in each)

    def looks(self, number: int) -> None:
        """Wait until the log was read so many more times."""
        wanted, pause = self._store.num_looks + number, threading.Event()
        for _ in range(WAIT_SECONDS * 100):
            if self._store.num_looks >= wanted:
                return
            pause.wait(0.01)
        raise AssertionError("nobody looks")

    def end(self) -> None:
        self._stopped.set()
        self._thread.join(WAIT_SECONDS)
        assert not self._thread.is_alive()


@pytest.fixture
def following(store: Store) -> Iterator[Following]:
    following = Following(store)
    yield following
    following.end()


def test_the_log_is_followed_and_nothing_is_left_on_the_disk(
    store: Store, following: Following, tmp_path: Path
) -> None:
    move(store, "3")
    following.wait_for("Version 3 serves")
    assert following.champion.state() == {
        "lineage": "l",
        "version": "3",
        "champion": "3",
        "starting": None,
        "problem": None,
    }
    move(store, "1", "rolled back")
    following.wait_for("Version 1 serves")
    assert list((tmp_path / "tmp").iterdir()) == []


def test_another_base_model_is_loaded_only_where_the_version_has_one(store: Store, following: Following) -> None:
    for version in ("2", "3", "4"):
        move(store, version)
        following.wait_for(f"Version {version} serves")
    assert following.champion._answerer.swaps == [  # type: ignore[union-attr]
        ("2", ("another base", "none")),
        ("3", ("the base", "none")),
        ("4", None),
    ]


def test_a_version_that_was_judged_on_a_quantized_base_model_gets_that_one(store: Store, following: Following) -> None:
    store_version(store, files_of(1, "4bit"))
    move(store, "5")
    following.wait_for("Version 5 serves")
    assert following.champion._answerer.swaps == [("5", ("the base", "4bit"))]  # type: ignore[union-attr]


def test_a_look_takes_two_small_requests_while_nothing_moves(store: Store) -> None:
    for version in ("3", "1") * 20:
        move(store, version)
    champion = a_champion(store)
    champion.begin()
    store.requests.clear()
    for _ in range(3):
        champion._read_log()
        champion._keep_up()
    assert store.requests == ["list promotions/l", "get promotions/l/00000041.json"] * 3
    move(store, "3")
    store.requests.clear()
    champion._read_log()
    assert "list versions/l" in store.requests, "a move is looked up"
    store.requests.clear()
    champion._keep_up()
    uri = Versions(FileStore(store.root)).all("l")[2].adapter_uri
    assert store.requests == [f"download {uri}/{name}" for name in SERVED_FILES], "and only what answering needs"


def test_what_serves_goes_on_while_the_store_is_away_and_it_is_said_once(store: Store, following: Following) -> None:
    store.is_away = True
    following.wait_for("The store is away. The loaded version continues to serve.")
    following.looks(5)
    assert following.champion.state()["version"] == "1"
    assert following.champion.state()["problem"] == "The store is away. The loaded version continues to serve."
    store.is_away = False
    move(store, "3")
    following.wait_for("Version 3 serves")
    assert following.champion.state()["problem"] is None
    assert sum("away" in text for text in following.said) == 1


def test_a_folder_that_is_gone_is_no_lineage_without_a_champion(store: Store, following: Following) -> None:
    """A network folder that is not mounted lists nothing."""
    aside = store.root.with_name("unmounted")
    store.root.rename(aside)
    problem = following.wait_for("has no promotion log of 'l' any more")
    assert store.uri in problem and problem.endswith("The loaded version continues to serve.")
    assert following.champion.state()["champion"] == "1"
    aside.rename(store.root)
    following.looks(3)
    assert following.champion.state()["problem"] is None


@pytest.mark.parametrize("is_remote", [False, True])
def test_the_pause_grows_while_the_store_is_away(
    store: Store, monkeypatch: pytest.MonkeyPatch, is_remote: bool
) -> None:
    pauses: list[float] = []

    class Stopped(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            assert timeout is not None
            pauses.append(timeout)
            store.is_away = len(pauses) < 7
            return len(pauses) > 7

    monkeypatch.setattr(serving, "MAX_POLL_SECONDS", 0.1)
    if is_remote:  # where every look costs money
        monkeypatch.setattr(serving, "REMOTE_POLL_SECONDS", 0.04)
        monkeypatch.setattr(serving, "FileStore", type(None))
    champion = a_champion(store)
    champion.begin()
    champion.follow(Stopped())
    expected = [0.04, 0.08, *[0.1] * 5, 0.04] if is_remote else [0.01, 0.02, 0.04, 0.08, 0.1, 0.1, 0.1, 0.01]
    assert pauses == expected


def test_an_output_that_was_closed_ends_nothing(store: Store) -> None:
    def closed(text: str) -> None:
        raise BrokenPipeError

    champion = Champion(store, "l", closed)
    champion.begin()
    assert champion.version == "1"


def test_the_thread_outlives_what_nobody_expects(store: Store, following: Following) -> None:
    store.is_broken = True
    following.wait_for("KeyError")
    store.is_broken = False
    move(store, "3")
    following.wait_for("Version 3 serves")


def test_nothing_is_served_where_there_is_no_champion_or_it_does_not_load(store: Store) -> None:
    with pytest.raises(NoChampionError, match="Lineage 'nobody' has no champion"):
        Champion(store, "nobody", lambda text: None).begin()
    Answerer.broken.add("1")
    with pytest.raises(ServingError, match="Version 1 does not load: the files of 1 do not fit"):
        a_champion(store).begin()
    move(store, "7")
    with pytest.raises(StoreError, match="lacks the entry of version 7 of 'l', which the promotion log names"):
        a_champion(store).begin()


def test_a_server_that_waits_for_an_engine_ends_when_the_champion_is_stopped(store: Store) -> None:
    champion = a_champion(store)
    Answerer.broken.add("1")

    class Engines:
        is_away = True

        @property
        def retry_seconds(self) -> float:
            move(store, "1", "stopped", champion=None)
            return 0.0

    champion._engines = Engines()  # type: ignore[assignment]
    with pytest.raises(NoChampionError):
        champion.begin()


@pytest.mark.parametrize("name", SERVED_FILES)
@pytest.mark.parametrize("is_missing", [False, True])
def test_a_damaged_file_of_a_version_is_refused_by_name_and_the_old_version_serves_on(
    store: Store, following: Following, monkeypatch: pytest.MonkeyPatch, name: str, is_missing: bool
) -> None:
    uri = Versions(FileStore(store.root)).all("l")[2].adapter_uri
    path, whole = store.root / uri / name, files_of(3)[name]
    path.unlink() if is_missing else path.write_bytes(whole + b" ")
    move(store, "3")
    problem = following.wait_for("Version 3 does not load")
    found = "is missing" if is_missing else "has sha256"
    assert f"{name} {found}" in problem and store.uri_of(uri) in problem and "Restore the folder" in problem
    assert problem.endswith("version 1 continues to serve.")
    assert (following.champion.version, following.champion.state()["champion"]) == ("1", "3")
    path.write_bytes(whole)
    monkeypatch.setattr(Answerer, "retry_seconds", 0.0)
    following.wait_for("Version 3 serves")


def test_a_version_that_does_not_load_is_tried_again_after_a_pause(
    store: Store, following: Following, monkeypatch: pytest.MonkeyPatch
) -> None:
    Answerer.broken.add("3")
    move(store, "3")
    problem = following.wait_for("Version 3 does not load: the files of 3 do not fit; version 1 continues to serve.")
    following.looks(5)
    assert store.num_downloads == 2, "it is not tried at every look"
    assert following.champion.state() | {"problem": None} == {
        "lineage": "l",
        "version": "1",
        "champion": "3",
        "starting": None,
        "problem": None,
    }
    assert following.champion.state()["problem"] == problem
    Answerer.broken.clear()
    monkeypatch.setattr(Answerer, "retry_seconds", 0.0)
    following.wait_for("Version 3 serves")
    assert following.champion.state()["problem"] is None


def test_a_rollback_from_a_version_that_does_not_load_clears_the_problem(store: Store, following: Following) -> None:
    Answerer.broken.add("3")
    move(store, "3")
    following.wait_for("Version 3 does not load")
    move(store, "1", "rolled back")
    following.looks(3)
    assert following.champion.state()["problem"] is None and following.champion.version == "1"


def test_what_the_log_says_is_in_rollout_is_tried_next_to_the_champion(store: Store) -> None:
    log = PredictionLog(store, "l", keeps_texts=False, retention_days=30)
    champion = Champion(store, "l", lambda text: None, log)
    champion.begin()
    terms = RolloutTerms("canary", 0.5, 200, 10.0, 0.95)
    tried: Version = store_version(store, files_of(3), parent_version="1", rollout=terms)

    def look() -> tuple[str | None, str | None]:
        champion._read_log()
        champion._keep_up()
        return champion.canary, champion._answerer.candidate  # type: ignore[union-attr, return-value]

    assert look() == (None, None), "it is registered, and no rollout began"
    move(store, tried.version, "rollout", rollout="canary")
    assert look() == (tried.version, tried.version)
    move(store, tried.version, "rejected")
    assert look() == (None, None)


def test_nothing_answers_while_no_version_is_champion(store: Store, following: Following) -> None:
    move(store, "1", "stopped", champion=None)
    following.wait_for("No version is champion")
    with pytest.raises(GivenUpError, match="No version of 'l' serves"):
        asyncio.run(following.champion.ask([InputRow("a text", "t")]))
    move(store, "1")
    following.looks(3)
    assert following.champion.state()["champion"] == "1" and following.champion.state()["problem"] is None
    move(store, "1", "stopped", champion=None)
    move(store, "3")
    following.wait_for("Version 3 serves")
