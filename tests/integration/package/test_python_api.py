"""Lineages from Python: the caller's process stays as it was, and only a training starts another one."""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import psutil
import pytest
from prefect.settings import get_current_settings

from deal_core.errors import ConfigError
from deal_pipeline import Lineage, frame
from infra.settings import TrackingSettings
from infra.tracking.tracker import Tracker
from tests.adapting import PASS

SETTINGS = {"train": {"max_steps": 3, "max_prompt_tokens": 96, "checkpoint_steps": 0}, "gate": PASS}
COLOURS = pd.DataFrame(
    [{"text": f"Number {number} is {colour}.", "label": colour} for number in range(15) for colour in ("red", "green")]
)


@pytest.fixture
def with_server(prefect_api: None) -> dict[str, str]:
    """The tests' Prefect server: an API of a child's own takes as long to start as all else."""
    return {"PREFECT_API_URL": str(get_current_settings().api.url)}


@contextmanager
def unchanged_process() -> Iterator[None]:
    """Refuse a block that changes the environment or the root logger of this process."""
    before, root = dict(os.environ), logging.getLogger()
    handlers, level = [*root.handlers], root.level
    yield
    assert dict(os.environ) == before
    assert [*root.handlers] == handlers and root.level == level


@pytest.fixture
def no_child(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Refuse to start a process from now on; `undo` allows it again."""

    def refuse(*arguments: object, **_: object) -> None:
        raise AssertionError(f"a process was started: {arguments}")

    monkeypatch.setattr(subprocess.Popen, "__init__", refuse)
    return monkeypatch


def test_a_learned_lineage_is_read_moved_and_asked_in_this_process(
    copied_home: Path, no_child: pytest.MonkeyPatch
) -> None:
    """Version 1 has learned a task, version 2 was rejected, and version 3 has learned another task on version 1."""

    async def work() -> None:  # as in a notebook
        lineage = Lineage("l", home=copied_home, show=None)
        assert [entry.version for entry in lineage.history()] == ["1", "2", "3"] and lineage.champion == "3"
        assert lineage.history()[-1].version == "3"
        shown = [lineage.show(number).version for number in ("2", 3)]
        assert not shown[0].accepted and "champion" in shown[1].aliases
        matrix = lineage.matrix()
        assert frame(matrix).shape == (2, 2) and matrix.tasks == ("bank", "clinic")
        answers = lineage.predict(["I lost my card.", "My ear hurts."], task="clinic")
        assert len(answers) == 2 and lineage.predict("My ear hurts.", task="clinic") == answers[1:]
        assert lineage.answer("My ear hurts.").answer == answers[1], "the newest task is asked"
        with pytest.raises(ConfigError):
            lineage.predict("My ear hurts.", task="parcels")
        again = lineage.evaluate()
        assert again.accuracies.keys() == {"bank", "clinic"} and again.version == "3"
        assert again.accuracies == pytest.approx(again.recorded)
        decision = lineage.rollback(why="a test")
        assert (decision.version, decision.before, decision.left_behind[0].version) == ("1", "3", "3")
        assert [move.why for move in lineage.moves()][-1] == "a test" and lineage.champion == "1"
        assert [arrival.version for arrival in lineage.left_behind()] == ["3"]
        lineage.reject(3, why="another test")
        assert lineage.show(3).version.approval == "refused"

    with unchanged_process():
        asyncio.run(work())
    no_child.undo()
    registered = Tracker(TrackingSettings(home=copied_home)).models.read("l")
    assert registered.number_of("champion") == "1", "MLflow follows the champion"


@pytest.mark.nightly
def test_a_table_is_learned_and_answered_from_a_running_event_loop(
    with_server: dict[str, str], home: Path, tiny_base: Path
) -> None:
    shown = list[str]()

    async def work() -> None:
        with Lineage("api", home=home, show=shown.append, environment=with_server) as lineage:
            first = lineage.adapt(COLOURS, task="colours", base=str(tiny_base), settings=SETTINGS)
            assert first.status == "promoted" and first.version == "1"
            assert first.metrics == {"colours": "exact"} and 0 <= first.accuracies["colours"] <= 1
            wrong = {"train": {"no_such_setting": 1}}
            with pytest.raises(ConfigError, match="no_such_setting"):
                lineage.adapt(COLOURS.to_dict("records"), task="colours", settings=wrong)
            assert len(list((home / "tables").iterdir())) == 1, "the refused call's table is removed"
            answers = lineage.predict(["Number 3 is red.", "Number 4 is green."], task="colours")
            assert len(answers) == 2 and all(isinstance(answer, str) for answer in answers)

    with unchanged_process():
        asyncio.run(work())
    assert any(line.startswith("train") for line in shown), "every stage is told"


@pytest.mark.nightly
def test_a_stopped_call_goes_on_when_it_is_repeated(with_server: dict[str, str], home: Path, tiny_base: Path) -> None:
    def stop(line: str) -> None:
        if line.startswith("ingest"):
            raise KeyboardInterrupt

    rows = home / "colours.csv"
    COLOURS.to_csv(rows, index=False)
    with pytest.raises(KeyboardInterrupt):
        Lineage("api", home=home, show=stop, environment=with_server).adapt(
            rows, task="colours", base=str(tiny_base), settings=SETTINGS
        )
    assert not psutil.Process().children() or not [
        child for child in psutil.Process().children() if "deal_pipeline.training_child" in child.cmdline()
    ]
    lineage = Lineage("api", home=home, show=None, environment=with_server)
    assert lineage.champion is None
    assert lineage.adapt(rows, task="colours", base=str(tiny_base), settings=SETTINGS).version == "1"
