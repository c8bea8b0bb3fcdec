"""Every arrival of a known task is answered by the champion first, and held if its labels disagree.

The base model is tiny, but its champion has learned a task that it can learn: the word that names the label.
"""

from __future__ import annotations

import asyncio
import csv
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from benchmarks.tiny_base import NO_LIMITS
from deal_core.errors import ConfigError
from deal_pipeline.cli.app import app
from flows.adapt import adapt
from flows.adapt_result import AdaptResult
from flows.forget import forget
from flows.requeue import requeue
from flows.watch import WatchResult, watch
from infra.lineage_state import read_state
from infra.store.opening import open_store
from infra.versions import Version, Versions
from tasks.arrival_check import read_scores
from tasks.arrivals import held_arrivals, release
from tasks.lineage.held import held_by_check
from tasks.lineage.promotion import roll_back
from tasks.lineage.reports import read_page
from tasks.lineage.requests import add_labels
from tasks.lineage.settings import WatchedLineage
from tasks.spec import AdaptSpec, parse
from tests.conftest import MakeOnce
from tests.in_process import put_back
from tests.receiver import Receiver
from tests.registering import mlflow_run

LABELS = ("card", "loan", "fee")
OTHERS = ["the", "a", "my", "is", "not", "please", "help", "with", "account", "today", "bank", "new", "old", "about"]
NUM_TESTS = 80
Rows = list[tuple[str, str]]

pytestmark = pytest.mark.usefixtures("prefect_api", "home")


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """Undo what a command sets in this process."""
    with put_back():
        yield


def rows(number: int, seed: int) -> Rows:
    """Texts that hold the word of their label."""
    generator = random.Random(seed)
    found: dict[str, str] = {}
    while len(found) < number:
        label = generator.choice(LABELS)
        words = [generator.choice(OTHERS) for _ in range(6)]
        words.insert(generator.randrange(7), label)
        found[" ".join(words)] = label
    return list(found.items())


def half_wrong(right: Rows) -> Rows:
    """The rows; every other one has the next label."""
    return [(text, LABELS[(LABELS.index(label) + place % 2) % 3]) for place, (text, label) in enumerate(right)]


def write(path: Path, content: Rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *content])
    return path


def settings(base: Path, **more: Any) -> dict[str, Any]:
    values = {
        "lineage": "l",
        "base_model": str(base),
        "adapter": {"rank": 8, "target_modules": "all-linear"},
        "gate": {**NO_LIMITS, "arrival": "hold"},
        "train": {"max_steps": 2, "max_prompt_tokens": 64, "max_answer_tokens": 6, "checkpoint_steps": 0},
    }
    return {
        name: {**part, **more.pop(name, {})} if isinstance(part, dict) else part for name, part in values.items()
    } | more


def learn(base: Path, path: Path, **more: Any) -> AdaptResult:
    task = {"name": "desk", "data": str(path), "labels": LABELS, "template": "{text}\nAnswer:", **more.pop("task", {})}
    return asyncio.run(adapt(parse(AdaptSpec, {**settings(base, **more), "task": task}, "test")))


def versions() -> tuple[Version, ...]:
    return Versions(open_store()).all("l")


@pytest.fixture(scope="session")
def first_month(tiny_base: Path, home_made_once: MakeOnce, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home whose champion answers most messages of the desk, and is sure."""
    files = tmp_path_factory.mktemp("desk")
    data, tests = write(files / "april.csv", rows(120, 1)), write(files / "tests.csv", rows(NUM_TESTS, 2))

    def make(folder: Path) -> None:
        train = {"max_steps": 60, "learning_rate": 0.02}
        learned = learn(tiny_base, data, train=train, task={"test_data": str(tests)})
        assert learned.status == "promoted" and learned.arrival is None, "a new task has no champion"
        assert learned.accuracies["desk"] > 0.7

    return home_made_once("desk-learned", make)


@pytest.fixture
def desk(first_month: Path, copy_to_home: Callable[[Path], Path]) -> None:
    copy_to_home(first_month)


@pytest.mark.usefixtures("desk", "without_mlflow")
def test_wrong_labels_are_held_before_any_training_until_a_person_lets_them_go(
    tiny_base: Path, tmp_path: Path, receiver: Receiver
) -> None:
    right = rows(60, 3)
    may = write(tmp_path / "may.csv", half_wrong(right))
    held = learn(tiny_base, may, data={"retain_training_rows": True})
    assert (held.status, held.rejected, held.version, len(versions())) == ("held", False, "1", 1)
    assert held.arrival is not None and held.arrival.verdict == "labels disagree"
    assert held.arrival.num_rows == held.arrival.of_rows == 60 and held.arrival.num_reference == NUM_TESTS
    store = open_store()
    assert not [info.key for info in store.list("datasets") if held.dataset.sha256 in info.key], "no row is kept"
    # the contradictions are rows whose label is wrong: every other row of the file
    assert [row.row is not None and row.row % 2 == 0 for row in held.contradictions] == [True] * 3
    assert not any(row.text or row.label or row.answer for row in held.contradictions), "texts may not be shown"
    texts = [text for text, _ in right]
    assert not any(text in info.read_text() for info in _notes() for text in texts)
    assert [notice["event"] for notice in receiver.told()] == ["deal.arrival.held"]
    assert [(each.key, each.task) for each in held_arrivals(read_state(store, "l"))] == [(str(may), "desk")]

    with_texts = learn(tiny_base, may, data={"include_texts": True})
    assert with_texts.status == "held", "a second try is held too"
    assert {row.text for row in with_texts.contradictions} <= set(texts)
    assert all(row.label != row.answer for row in with_texts.contradictions)

    assert asyncio.run(requeue("l")) == [] and held_by_check(read_state(store, "l")), "release is the only way"
    with pytest.raises(ConfigError):
        release(store, "l", [str(tmp_path / "june.csv")])
    assert release(store, "l", [str(may)]) == (str(may),) and not held_arrivals(read_state(store, "l"))
    learned = learn(tiny_base, may)
    assert (learned.status, len(versions())) == ("promoted", 2)
    assert learned.arrival is not None and learned.arrival.is_released
    assert not read_state(store, "l").held, "it is over"

    # What was learned against the labels of before is no reference, and a requeue is scored and not held.
    roll_back(store, "l", None, who="tester", why="a test")
    (again,) = asyncio.run(requeue("l", ["2"]))
    assert (again.status, again.version) == ("promoted", "3")
    assert again.arrival is not None and again.arrival.verdict == "labels disagree"
    good = learn(tiny_base, write(tmp_path / "june.csv", rows(40, 4)))
    assert good.arrival is not None and good.arrival.num_reference == NUM_TESTS


def _notes() -> Iterator[Path]:
    """The files of the store about arrivals that are held."""
    root = Path(open_store().uri.removeprefix("file://"))
    yield from (path for name in ("lineages", "arrivals") for path in (root / name).rglob("*.json"))


@pytest.mark.usefixtures("desk", "without_mlflow")
def test_corrected_labels_are_another_arrival(tiny_base: Path, tmp_path: Path) -> None:
    right = rows(60, 3)
    may = write(tmp_path / "may.csv", half_wrong(right))
    assert learn(tiny_base, may).status == "held"
    assert learn(tiny_base, write(may, right)).status == "promoted"
    assert not held_arrivals(read_state(open_store(), "l"))


@pytest.mark.usefixtures("desk")
def test_a_good_month_is_scored_and_becomes_part_of_the_reference(tiny_base: Path, tmp_path: Path) -> None:
    may = rows(60, 3)
    learned = learn(tiny_base, write(tmp_path / "may.csv", may))
    score = learned.arrival
    assert score is not None and (learned.status, score.verdict, score.num_rows) == ("promoted", "as expected", 60)
    assert score.low < score.accuracy < score.high
    version = versions()[-1]
    assert version.arrival == score
    kept = read_scores(open_store(), version.adapter_uri)
    assert len(kept) == 60 and sum(kept) / 60 == pytest.approx(score.accuracy)
    metrics = mlflow_run("l", version.run_key).data.metrics
    assert (metrics["arrival/accuracy"], metrics["arrival/num_rows"]) == (score.accuracy, 60)
    assert score.figure in read_page(open_store(), versions(), version.version)[1]

    # Rows that the line has learned say nothing: April's and May's are left out, whatever their label is now.
    old = [*rows(120, 1)[:10], *half_wrong(may[:20])]
    june = checked(write(tmp_path / "june.csv", [*old, *rows(50, 4)]))["score"]
    assert (june["num_rows"], june["num_learned"], june["of_rows"]) == (50, 30, 80)
    assert june["num_reference"] == NUM_TESTS + 60
    asyncio.run(forget(learned.dataset.sha256))
    july = checked(write(tmp_path / "july.csv", rows(40, 5)))["score"]
    assert july["num_reference"] == NUM_TESTS, "a deleted month is no reference"


def checked(path: Path) -> Any:
    """What `deal check` says of a file: the same score, and nothing is learned."""
    found = CliRunner().invoke(app, ["check", str(path), "--task", "desk", "--lineage", "l", "--json"])
    assert found.exit_code == 0, found.output
    return json.loads(found.stdout)["arrival"]


@pytest.mark.usefixtures("desk", "without_mlflow")
def test_a_watch_holds_wrong_labels_goes_on_and_learns_what_is_released(tiny_base: Path, home: Path) -> None:
    inbox = home / "store" / "inbox" / "desk"
    may = write(inbox / "1-may.csv", half_wrong(rows(60, 3)))
    write(inbox / "2-june.csv", rows(40, 4))

    def look() -> list[tuple[str, str, str | None]]:
        spec = parse(WatchedLineage, settings(tiny_base), "test")
        found: WatchResult = asyncio.run(watch(spec, once=True, poll_seconds=0.01))
        return [(seen.key.removeprefix("inbox/desk/"), seen.outcome, seen.version) for seen in found.files]

    assert look() == [("1-may.csv", "held", None), ("2-june.csv", "promoted", "2")]
    assert look() == [], "it waits"
    (held,) = held_arrivals(read_state(open_store(), "l"))
    assert held.key == "inbox/desk/1-may.csv"
    listed = json.loads(CliRunner().invoke(app, ["data", "list", "--json"]).stdout)
    assert [each["name"] for each in listed if each["state"].startswith("held")] == [held.key]
    assert asyncio.run(requeue("l")) == [] and look() == [], "release is the only way"
    assert CliRunner().invoke(app, ["data", "release", held.key, "--lineage", "l"]).exit_code == 0
    assert look() == [("1-may.csv", "promoted", "3")]
    assert may.exists() and not read_state(open_store(), "l").held


@pytest.mark.nightly
@pytest.mark.usefixtures("desk", "without_mlflow")
@pytest.mark.parametrize(("setting", "verdict"), [("warn", "labels disagree"), ("off", "as expected")])
def test_by_its_settings_an_arrival_is_learned_with_a_note_or_without(
    tiny_base: Path, tmp_path: Path, setting: str, verdict: str
) -> None:
    learned = learn(tiny_base, write(tmp_path / "may.csv", half_wrong(rows(60, 3))), gate={"arrival": setting})
    assert learned.status == "promoted" and learned.arrival is not None and learned.arrival.verdict == verdict
    page = read_page(open_store(), versions(), versions()[-1].version)[1]
    assert ("of the labels agree with version 1" in page) is (setting == "warn")


@pytest.mark.nightly
@pytest.mark.usefixtures("desk", "without_mlflow")
def test_rows_with_a_new_label_do_not_count(tiny_base: Path, tmp_path: Path) -> None:
    add_labels(open_store(), "l", "desk", ["theft"])
    new = [(text, "theft") for text, _ in rows(60, 6)]
    learned = learn(tiny_base, write(tmp_path / "may.csv", [*rows(40, 3), *new]))
    assert learned.status == "promoted" and learned.arrival is not None and learned.arrival.num_rows == 40


@pytest.mark.usefixtures("desk")
def test_a_check_says_the_same_and_learns_nothing(tmp_path: Path) -> None:
    may = write(tmp_path / "may.csv", half_wrong(rows(60, 3)))
    before = {info.key: info.etag for info in open_store().list("")}
    arrival = checked(may)
    assert (arrival["score"]["verdict"], arrival["score"]["num_rows"]) == ("labels disagree", 60)
    assert all(row["row"] % 2 == 0 and row["text"] for row in arrival["contradictions"])
    assert {info.key: info.etag for info in open_store().list("")} == before
    shown = CliRunner().invoke(app, ["check", str(may), "--task", "desk", "--lineage", "l", "--no-score", "--json"])
    assert json.loads(shown.stdout)["arrival"] is None
