"""The champion in memory follows the alias, also with a registry that does not answer or has damaged versions."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from deal_core.errors import ConfigError, RegistryError, StoreError
from deal_core.evaluation.answering import SERVED_FILE, ServedVersion
from infra.served_model import PEFT_FILES, ServingError, require_own_loader, write_served_folder
from infra.serving import champion as serving
from infra.serving.champion import Champion

WAIT_SECONDS = 60


class Registry:
    """A registry that names the champion, or does not answer, and gives folders of versions."""

    def __init__(self) -> None:
        self.version: str | None = "1"
        self.facts = {"accepted": True, "reasons": (), "approval": None, "promoted": None}
        self.base_of = {"9": "another base"}
        self.is_away = self.is_broken = False
        self.num_looks = 0
        self.num_downloads = 0

    def champion(self, lineage: str) -> SimpleNamespace | None:
        self.num_looks += 1
        if self.is_away:
            raise RegistryError("MLflow is away.")
        if self.is_broken:
            raise KeyError("what nobody expects")
        return self.version and SimpleNamespace(lineage=lineage, version=self.version, **self.facts)

    def with_alias(self, lineage: str, alias: str) -> None:
        assert (lineage, alias) == ("l", "rollout")

    def download(self, lineage: str, version: str, folder: Path) -> None:
        self.num_downloads += 1
        folder.mkdir()
        write_mlmodel(folder, python_function={"loader_module": "infra.served_model"})
        served = ServedVersion(
            lineage=lineage,
            base_source="b",
            base_name="b",
            tasks=(),
            newest_task="t",
            base_sha256=self.base_of.get(version, "the base"),
        )
        (folder / SERVED_FILE).write_text(json.dumps(served.to_json()))


class Answerer:
    """Accepts every version except the damaged ones."""

    damaged: ClassVar[set[str]] = set()

    def __init__(self, folder: Path, *_: Any, version: str, **__: Any) -> None:
        self.version, self.base_sha256, self.swaps = version, "the base", list[tuple[str, Any]]()
        self._check(version)

    def swap(self, folder: Path, version: str, base: Any = None) -> None:
        assert (folder / SERVED_FILE).exists()
        self._check(version)
        self.version, self.base_sha256 = version, base or self.base_sha256
        self.swaps.append((version, base))

    def _check(self, version: str) -> None:
        if version in self.damaged:
            raise ConfigError(f"the files of {version} are damaged.")

    def stop(self) -> None:
        pass


def write_mlmodel(folder: Path, **flavors: dict[str, Any]) -> None:
    text = json.dumps({"flavors": flavors, "model_uuid": "m", "utc_time_created": "2026-11-01 00:00:00.000000"})
    (folder / "MLmodel").write_text(text)  # JSON is YAML


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Registry:
    registry = Registry()
    monkeypatch.setenv("DEAL_HOME", str(tmp_path))
    monkeypatch.setattr(serving, "open_registry", lambda: registry)
    monkeypatch.setattr(serving, "load_answerer", Answerer)
    monkeypatch.setattr(serving, "load_base_of", lambda served, *_, **__: served.base_sha256)
    monkeypatch.setattr(serving, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(serving, "MAX_POLL_SECONDS", 0.02)
    monkeypatch.setattr(Answerer, "damaged", set())
    return registry


class Following:
    """A champion that follows the alias in a thread, and its messages."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self._changed = threading.Condition()
        self.champion = Champion("l", self._say)
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

    def looks(self, registry: Registry, number: int) -> None:
        """Wait until the alias was read so many more times."""
        wanted, pause = registry.num_looks + number, threading.Event()
        for _ in range(WAIT_SECONDS * 100):
            if registry.num_looks >= wanted:
                return
            pause.wait(0.01)
        raise AssertionError("nobody looks")

    def end(self) -> None:
        self._stopped.set()
        self._thread.join(WAIT_SECONDS)
        assert not self._thread.is_alive()


@pytest.fixture
def following(registry: Registry) -> Iterator[Following]:
    following = Following()
    yield following
    following.end()


def test_the_alias_is_followed_and_nothing_is_left_on_the_disk(
    registry: Registry, following: Following, tmp_path: Path
) -> None:
    registry.version = "2"
    following.wait_for("Version 2 serves")
    assert following.champion.state() == {
        "lineage": "l",
        "version": "2",
        "champion": "2",
        "starting": None,
        "problem": None,
    }
    registry.version = "1"
    following.wait_for("Version 1 serves")
    assert list((tmp_path / "tmp").iterdir()) == []


def test_a_move_of_the_alias_is_settled_before_its_version_is_loaded(registry: Registry) -> None:
    """`settle` may set the alias back; a server that starts while the store is away takes the alias as it is."""
    calls: list[str] = []

    def set_back() -> None:
        calls.append(registry.version)
        registry.version = "1"

    def store_is_away() -> None:
        raise StoreError("away")

    registry.version = "2"
    champion = Champion("l", lambda text: None, settle=set_back)
    champion.begin()
    assert champion.version == "1" and calls == ["2"]
    registry.version = "3"
    assert champion._let_settle(registry.champion("l")).version == "1"  # type: ignore[union-attr]
    champion._let_settle(registry.champion("l"))
    assert calls == ["2", "3"], "an alias that has not moved is not settled"
    other = Champion("l", lambda text: None, settle=store_is_away)
    other.begin()
    assert other.version == "1"
    registry.version = "4"
    late = Champion("l", lambda text: None, settle=store_is_away)
    late.begin()
    assert late.version == "4", "as it is"
    late._settle = set_back
    assert late._let_settle(registry.champion("l")).version == "1", "once the store answers"  # type: ignore[union-attr]


def test_another_base_model_is_loaded_only_where_the_version_has_one(registry: Registry, following: Following) -> None:
    for version in ("9", "2", "3"):
        registry.version = version
        following.wait_for(f"Version {version} serves")
    assert following.champion._answerer.swaps == [("9", "another base"), ("2", "the base"), ("3", None)]  # type: ignore[union-attr]


def test_what_serves_goes_on_while_mlflow_is_away_and_it_is_said_once(registry: Registry, following: Following) -> None:
    registry.is_away = True
    following.wait_for("MLflow is away. The loaded version continues to serve.")
    following.looks(registry, 5)
    assert following.champion.state()["version"] == "1"
    assert following.champion.state()["problem"] == "MLflow is away. The loaded version continues to serve."
    registry.version, registry.is_away = "2", False
    following.wait_for("Version 2 serves")
    assert following.champion.state()["problem"] is None
    assert sum("away" in text for text in following.said) == 1


def test_the_pause_grows_while_mlflow_is_away(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []

    class Stopped(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            assert timeout is not None
            pauses.append(timeout)
            registry.is_away = len(pauses) < 7
            return len(pauses) > 7

    monkeypatch.setattr(serving, "MAX_POLL_SECONDS", 0.1)
    champion = Champion("l", lambda text: None)
    champion.begin()
    champion.follow(Stopped())
    assert pauses == [0.01, 0.02, 0.04, 0.08, 0.1, 0.1, 0.1, 0.01]


def test_an_output_that_was_closed_ends_nothing(registry: Registry) -> None:
    def closed(text: str) -> None:
        raise BrokenPipeError

    champion = Champion("l", closed)
    champion.begin()
    assert champion.version == "1"


def test_the_thread_outlives_what_nobody_expects(registry: Registry, following: Following) -> None:
    registry.is_broken = True
    following.wait_for("KeyError")
    registry.is_broken, registry.version = False, "2"
    following.wait_for("Version 2 serves")


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"accepted": False, "reasons": ("bank lost 12 points.",)}, "did not pass its gate (bank lost 12 points.)"),
        ({"approval": "refused", "promoted": "1"}, "was rejected by a person"),
        ({"approval": "awaiting"}, "waits for a person's approval"),
    ],
)
def test_an_alias_that_was_moved_past_the_gate_moves_nothing_and_is_said_once(
    registry: Registry, following: Following, facts: dict[str, object], reason: str
) -> None:
    passed, registry.facts = registry.facts, {**registry.facts, **facts}
    registry.version = "2"
    problem = following.wait_for("Version 2 of 'l'")
    assert reason in problem and problem.endswith("The loaded version continues to serve.")
    following.looks(registry, 5)
    assert (following.champion.state()["version"], following.champion.state()["champion"]) == ("1", "1")
    registry.facts = {**passed, "approval": "awaiting", "promoted": "7"}
    following.wait_for("Version 2 serves")
    assert following.champion.state()["problem"] is None
    assert sum(reason in text for text in following.said) == 1


def test_nothing_is_served_where_there_is_no_champion_or_it_may_not_serve(registry: Registry) -> None:
    registry.facts["accepted"] = False
    with pytest.raises(RegistryError, match="did not pass its gate: it is not served"):
        Champion("l", lambda text: None).begin()
    registry.version = None
    with pytest.raises(RegistryError, match="Lineage 'l' has no champion"):
        Champion("l", lambda text: None).begin()
    registry.version, registry.facts["accepted"] = "1", True
    Answerer.damaged.add("1")
    with pytest.raises(ServingError, match="Version 1 does not load: the files of 1 are damaged"):
        Champion("l", lambda text: None).begin()


def test_a_version_that_does_not_load_is_tried_again_after_a_pause(
    registry: Registry, following: Following, monkeypatch: pytest.MonkeyPatch
) -> None:
    Answerer.damaged.add("2")
    registry.version = "2"
    problem = following.wait_for("Version 2 does not load: the files of 2 are damaged; version 1 continues to serve.")
    following.looks(registry, 5)
    assert registry.num_downloads == 2, "it is not tried at every look"
    assert following.champion.state() | {"problem": None} == {
        "lineage": "l",
        "version": "1",
        "champion": "2",
        "starting": None,
        "problem": None,
    }
    assert following.champion.state()["problem"] == problem
    Answerer.damaged.clear()
    monkeypatch.setattr(serving, "PAUSE_SECONDS", 0.0)
    following.wait_for("Version 2 serves")
    assert following.champion.state()["problem"] is None


def test_a_rollback_from_a_version_that_does_not_load_clears_the_problem(
    registry: Registry, following: Following
) -> None:
    Answerer.damaged.add("2")
    registry.version = "2"
    following.wait_for("Version 2 does not load")
    registry.version = "1"
    following.looks(registry, 3)
    assert following.champion.state()["problem"] is None and following.champion.version == "1"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A version's folder with a module and code that must not be imported."""
    folder = tmp_path / "version"
    (folder / "code").mkdir(parents=True)
    (tmp_path / "evil_loader.py").write_text("def _load_pyfunc(path): return None\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return folder


@pytest.mark.parametrize(
    ("flavors", "message"),
    [
        ({"python_function": {"loader_module": "evil_loader"}}, "names the loader evil_loader, and nothing but infra"),
        ({"python_function": {"loader_module": "infra.served_model", "code": "code"}}, r"code of its own \(code\)"),
        ({"python_function": {}}, "the loader None"),
        ({"sklearn": {"loader_module": "infra.served_model"}}, "the loader None"),
    ],
)
def test_code_that_a_folder_names_is_not_run(folder: Path, flavors: dict[str, Any], message: str) -> None:
    write_mlmodel(folder, **flavors)
    with pytest.raises(ServingError, match=message):
        require_own_loader(folder)
    assert "evil_loader" not in sys.modules
    assert str(folder / "code") not in sys.path


def test_a_folder_as_this_project_writes_it_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEAL_HOME", str(tmp_path / "home"))
    adapter, folder = tmp_path / "adapter", tmp_path / "registered"
    adapter.mkdir()
    for name in PEFT_FILES:
        (adapter / name).write_text("{}")
    write_served_folder(
        adapter,
        folder,
        card="",
        served={"base_name": "b", "base_sha256": "0"},
        served_file="deal.json",
        example=[{"input": "x", "task": "bank"}],
        run_id="r",
    )
    meta = require_own_loader(folder)
    assert meta.signature is not None and meta.signature.inputs.input_names() == ["input", "task"]
