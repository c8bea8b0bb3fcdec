"""The journal of a lineage's runs: what a run learns from, how it goes on, and how it ended."""

from __future__ import annotations

import math
from datetime import timedelta
from pathlib import Path

import pytest

from infra.run_journal import RunJournal
from infra.store.local import FileStore
from tests.stored_versions import CREATED, run, run_key


@pytest.fixture
def journal(tmp_path: Path) -> RunJournal:
    return RunJournal(FileStore(tmp_path / "store"))


def test_a_run_that_is_continued_keeps_its_start_and_its_curves(journal: RunJournal) -> None:
    started = journal.start(run(1, state="running", params={"train": {"max_steps": 3}}))
    journal.add_curve(started, {"loss": ((1, 2.0), (2, 1.5))})
    continued = journal.start(run(1, state="running", started=CREATED + timedelta(days=1)))
    assert (continued.started, continued.curve) == (CREATED, {"loss": ((1, 2.0), (2, 1.5))})
    journal.add_curve(continued, {"loss": ((3, 1.0), (2, 1.25)), "rate": ((3, 0.1),)})
    ended = journal.end(started, "finished")  # as the caller knew it before the training
    assert ended == journal.find("l", run_key(1)) and (ended.state, ended.short_key) == ("finished", run_key(1)[:16])
    assert ended.curve == {"loss": ((1, 2.0), (2, 1.25), (3, 1.0)), "rate": ((3, 0.1),)}
    assert ended.ended is not None and ended.touched == ended.ended > ended.started
    assert journal.find("l", run_key(2)) is None and journal.all("other") == ()


def test_runs_come_in_the_order_of_their_end(journal: RunJournal) -> None:
    for number, (hours, ended) in enumerate(((0, 9), (1, None), (2, 3)), 1):
        end = None if ended is None else CREATED + timedelta(hours=ended)
        journal.start(run(number, started=CREATED + timedelta(hours=hours), ended=end))
    assert [each.run_key for each in journal.all("l")] == [run_key(2), run_key(3), run_key(1)]


def test_a_loss_that_is_no_number_does_not_damage_the_journal(journal: RunJournal) -> None:
    journal.add_curve(run(1), {"loss": ((1, math.nan), (2, math.inf), (3, 1.0))})
    (found,) = journal.all("l")
    lost, endless, last = (value for _, value in found.curve["loss"])
    assert math.isnan(lost) and (endless, last) == (math.inf, 1.0)
    assert b'"NaN"' in journal.store.get_bytes(f"runs/l/{run_key(1)[:16]}.json"), "other readers of JSON read it too"
