"""What becomes of an arrival, on plain values: looks, claims, ends of tries, and what a person does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

import pytest

from infra.lineage_state import EndedArrival, LineageState
from tasks.arrival_queue import (
    NUM_AT_ONCE,
    PAUSE,
    Plan,
    Result,
    claim,
    claim_consolidation,
    dissolve,
    ends_of,
    finish,
    hold,
    judged,
    let_go,
    lose,
    open_again,
    plan,
    put_back,
    sense,
    with_run,
)
from tasks.inbox import Arrival, InboxLook
from tasks.lineage.retrain import RetrainPolicy
from tests.arriving import NOW, arrival

A, B, C = "inbox/bank/a.csv", "inbox/bank/b.csv", "inbox/clinic/c.csv"
LATER = NOW + timedelta(seconds=10)


def looked(
    state: LineageState,
    *arrivals: Arrival,
    ended: Mapping[str, EndedArrival] | None = None,
    now: datetime = NOW,
    unread: frozenset[str] = frozenset(),
    at: datetime | None = None,
    **options: Any,
) -> LineageState:
    inbox = InboxLook(arrivals, {}, unread, at or now)
    return sense(state, ended or {}, inbox, now, **{"settle_seconds": 2.0, "quiet_seconds": 300.0, **options})


def states(state: LineageState) -> dict[str, str]:
    return {key: note.state for key, note in state.arrivals.items()}


def claimed(
    state: LineageState, new_id: str = "one", now: datetime = NOW, policy: RetrainPolicy | None = None, **options: Any
) -> LineageState:
    return claim(state, policy or RetrainPolicy(), now, lambda _: 0.0, new_id, **options)


def ended(state: LineageState, outcome: str, now: datetime = NOW, id_: str = "one", **facts: Any) -> LineageState:
    return finish(state, id_, Result(outcome, "because", **facts), now, {})


def notes(state: LineageState, outcome: str, *arrivals: Arrival, **facts: Any) -> dict[str, EndedArrival]:
    """The notes about the arrivals of the claimed batch."""
    assert state.claimed is not None
    present = {each.key: each for each in arrivals}
    return ends_of(state, state.claimed, Result(outcome, "because", **facts), NOW, present)


def decided(state: LineageState, now: datetime = NOW, spent: float = 0.0, **policy: Any) -> Plan:
    return plan(state, RetrainPolicy(**policy), now, lambda _: spent)


def due(found: Plan) -> list[Sequence[str]]:
    return [list(batch.files) for batch in found.due]


# -- looks


def test_an_old_file_waits_at_once_and_a_young_one_has_landed() -> None:
    state = looked(LineageState(), arrival(A), arrival(B, age=0.5))
    assert states(state) == {A: "waiting", B: "landed"}
    assert states(looked(state, arrival(A), arrival(B, age=0.5), now=LATER)) == {A: "waiting", B: "waiting"}


def test_a_file_that_changes_again_and_again_stays_landed() -> None:
    state = LineageState()
    for second in range(5):
        now = NOW + timedelta(seconds=second)
        state = looked(state, arrival(etag=str(second), age=0.5 - second), now=now)
        assert states(state) == {A: "landed"}


def test_a_file_from_a_clock_that_runs_ahead_waits_from_its_first_look_on() -> None:
    ahead = arrival(age=-365 * 86400)
    state = looked(LineageState(), ahead)
    assert states(state) == {A: "landed"} and state.arrivals[A].landed == NOW
    state = looked(state, ahead, now=LATER)
    assert states(state) == {A: "waiting"} and state.arrivals[A].landed == NOW


def test_a_companion_from_a_clock_that_runs_ahead_holds_up_no_file() -> None:
    ahead = replace(arrival(beside="x").companions[0], modified=NOW + timedelta(days=365))
    beside = replace(arrival(), companions=(ahead,))
    state = looked(LineageState(), beside)
    assert states(state) == {A: "landed"}
    assert states(looked(state, beside, now=LATER)) == {A: "waiting"}


def test_a_file_waits_for_its_companions_and_another_companion_makes_it_land_again() -> None:
    young = replace(arrival(beside="x").companions[0], modified=NOW - timedelta(seconds=0.5))
    beside = replace(arrival(), companions=(young,))
    state = looked(LineageState(), beside)
    assert states(state) == {A: "landed"}
    state = looked(state, beside, now=LATER)
    other = replace(arrival(), companions=(replace(young, etag="y", modified=LATER),))
    assert states(state) == {A: "waiting"}
    assert states(looked(state, other, now=LATER)) == {A: "landed"}


def test_a_folder_without_a_mark_waits_for_quiet_since_it_came_here() -> None:
    file = replace(arrival("inbox/bank/may/a.csv").files[0], landed=NOW - timedelta(seconds=100))
    folder = Arrival(key="inbox/bank/may", files=(file,))
    state = looked(LineageState(), folder)
    assert states(state) == {folder.key: "landed"}, "the times of its files may be those of their originals"
    assert states(looked(state, folder, now=NOW + timedelta(seconds=201))) == {folder.key: "waiting"}
    assert states(looked(LineageState(), replace(folder, is_marked=True))) == {folder.key: "waiting"}


@pytest.mark.parametrize("outcome", ["promoted", "rejected", "repeat", "refused", "skipped"])
def test_what_has_ended_is_closed_until_its_content_changes(outcome: str) -> None:
    state = claimed(looked(LineageState(), arrival()))
    ends = notes(state, outcome)
    state = ended(state, outcome)
    assert state == LineageState()
    assert looked(state, arrival(), ended=ends) == state
    assert states(looked(state, arrival(etag="2"), ended=ends)) == {A: "waiting"}


def test_what_was_refused_is_open_again_with_other_companions_and_what_was_learned_is_not() -> None:
    state = claimed(looked(LineageState(), arrival(beside="1")))
    for outcome, found in (("refused", {A: "waiting"}), ("promoted", {})):
        ends = notes(state, outcome)
        assert states(looked(ended(state, outcome), arrival(beside="2"), ended=ends)) == found


def test_a_process_that_dies_between_the_note_of_an_end_and_the_state_ends_the_arrival_all_the_same() -> None:
    state = claimed(looked(LineageState(), arrival(A), arrival(C)))
    ends = notes(state, "promoted")
    state = looked(state, arrival(A), arrival(C), ended=ends)
    assert states(state) == {C: "waiting"} and state.batches == ()


def test_what_is_gone_leaves_the_state_and_what_cannot_be_seen_now_does_not() -> None:
    state = looked(LineageState(), arrival(A), arrival(C))
    assert states(looked(state, arrival(C))) == {C: "waiting"}
    assert states(looked(state, arrival(C), unread=frozenset({"bank"}))) == {A: "waiting", C: "waiting"}
    assert states(looked(state, arrival(A), tasks=["bank"])) == {A: "waiting", C: "waiting"}, "of another task"


def test_an_older_look_takes_nothing_back_that_was_seen_since() -> None:
    state = looked(LineageState(), arrival(A), arrival(B), now=LATER)
    assert looked(state, arrival(B, etag="0"), now=LATER + PAUSE, at=NOW) == state
    assert states(looked(state, arrival(B, etag="0"), now=LATER + PAUSE)) == {B: "waiting"}


def test_a_copy_of_a_store_is_known_by_its_contents() -> None:
    file = replace(arrival().files[0], read_sha256=lambda: "ab")
    original = Arrival(key=A, files=(file,))
    copy = Arrival(key=A, files=(replace(file, etag="copied"),))
    corrected = Arrival(key=A, files=(replace(file, etag="copied", read_sha256=lambda: "cd"),))
    state = claimed(looked(LineageState(), original))
    ends = notes(state, "promoted", original)
    assert looked(LineageState(), copy, ended=ends) == LineageState()
    assert states(looked(LineageState(), corrected, ended=ends)) == {A: "waiting"}, "rsync -t corrects a file like this"
    state = finish(state, "one", Result("held", "cancelled"), NOW, {A: original})
    assert states(looked(state, copy)) == {A: "held"} and looked(state, copy).arrivals[A].etag == "copied"


# -- claims


def test_claims_take_the_oldest_first_and_one_batch_at_a_time() -> None:
    state = claimed(looked(LineageState(), arrival(A), arrival(B, age=200)))
    assert states(state) == {A: "waiting", B: "claimed"}
    assert claimed(state, "two") == state
    state = claimed(ended(state, "promoted"), "two")
    assert states(state) == {A: "claimed"}
    assert claimed(state.model_copy(update={"paused": "holiday", "batches": ()}), "three").batches == ()


def test_nothing_is_claimed_that_may_still_be_written_is_of_another_task_or_lands_during_a_pause() -> None:
    state = looked(LineageState(), arrival(A, age=0.5), arrival(C))
    assert states(claimed(state)) == {A: "landed", C: "claimed"}
    assert claimed(state, tasks=["bank"]) == state
    paused = state.model_copy(update={"paused": "holiday"})
    assert claimed(paused) == paused


def test_the_holder_of_a_lineage_takes_over_what_a_dead_process_has_left() -> None:
    state = claimed(looked(LineageState(), arrival()))
    again = claimed(state, "two", is_alone=True)
    (batch,) = again.batches
    assert (batch.id, batch.attempt, states(again)) == ("one", 2, {A: "claimed"})
    started = with_run(state, "one", 1, "run-1")
    assert claimed(started, "two", is_alone=True, run="run-1") == started, "the run was started for it"
    assert with_run(started, "one", 1, "run-2") == started and with_run(again, "one", 1, "run-1") == again


def test_what_failed_is_tried_again_ever_more_seldom_and_holds_up_no_other() -> None:
    state, now, minutes = looked(LineageState(), arrival(A), arrival(B)), NOW, []
    for _ in range(9):
        state = ended(claimed(state, now=now), "failed", now)
        (batch,) = state.batches
        assert batch.due is not None and states(state) == {A: "failed", B: "waiting"}
        minutes.append((batch.due - now) / timedelta(minutes=1))
        assert due(decided(state, batch.due - timedelta(seconds=1))) == [[B]]
        now = batch.due
        assert due(decided(state, now)) == [[A], [B]]
    assert minutes == [1, 2, 4, 8, 16, 32, 64, 64, 64]
    assert due(decided(state, NOW - timedelta(days=1)))[0] == [A], "the clock was set back"
    assert notes(claimed(state, now=now), "promoted")[A].num_tries == 10


def test_what_would_fail_again_is_tried_only_if_asked_or_with_other_companions() -> None:
    state = ended(claimed(looked(LineageState(), arrival(beside="1"))), "failed", is_final=True)
    assert due(decided(state, NOW + timedelta(days=365))) == []
    assert plan(state, RetrainPolicy(), LATER, lambda _: 0.0, failed_before=LATER).due != ()
    assert plan(state, RetrainPolicy(), LATER, lambda _: 0.0, failed_before=NOW).due == ()
    assert states(looked(state, arrival(beside="2"))) == {A: "waiting"}


def test_a_file_that_kills_its_reader_twice_is_refused() -> None:
    died = Result("failed", "It died.", has_killed_reader=True)
    state = claimed(looked(LineageState(), arrival()))
    assert state.claimed is not None and judged(state.claimed, died).outcome == "failed"
    state = claimed(finish(state, "one", died, NOW, {}), now=NOW + PAUSE)
    state = claimed(ended(state, "failed", NOW + PAUSE), now=NOW + 5 * PAUSE)
    assert state.claimed is not None
    second = judged(state.claimed, died)
    assert second.outcome == "refused" and second.message.endswith("in 2 tries, so it is set aside until it changes.")


def test_a_batch_whose_run_was_lost_is_tried_at_once_and_later_after_pauses() -> None:
    state, waits = claimed(looked(LineageState(), arrival())), []
    for attempt in range(1, NUM_AT_ONCE + 3):
        assert lose(state, "one", attempt - 1, NOW) == state, "another attempt"
        state = lose(state, "one", attempt, NOW)
        (batch,) = state.batches
        assert batch.due is not None and states(state) == {A: "waiting"} and batch.run is None
        waits.append(batch.due - NOW)
        state = claimed(state, now=batch.due)
        assert state.claimed is not None and state.claimed.attempt == attempt + 1
    assert waits == [timedelta(0)] * NUM_AT_ONCE + [PAUSE, 2 * PAUSE]


def test_a_cancelled_run_holds_its_batch_and_what_it_had_still_to_learn() -> None:
    state = claimed(looked(LineageState(), arrival(A), arrival(B)))
    state = looked(state, arrival(A), arrival(B), arrival(C), now=LATER)
    others = decided(state, LATER).due
    assert hold(state, "one", 2, others, "cancelled", NOW, {}) == state, "another attempt"
    held = hold(state, "one", 1, others, "cancelled", NOW, {})
    assert states(held) == {A: "held", B: "held", C: "waiting"} and held.batches == ()
    assert due(decided(held, LATER)) == [[C]]
    assert ended(held, "promoted") == held, "what its process still tells changes nothing"
    assert states(looked(held, arrival(A), arrival(B, etag="2"))) == {A: "held", B: "waiting"}
    free = let_go(held, [A, C])
    assert states(free) == {A: "waiting", B: "held", C: "waiting"}
    assert due(decided(free, LATER, min_rows=99)) == [] and free.arrivals[A].is_asked_for


def test_a_batch_can_wait_for_a_lineage_that_is_at_work() -> None:
    started = with_run(claimed(looked(LineageState(), arrival())), "one", 1, "run")
    assert put_back(started, "another run", NOW + PAUSE) == started
    state = put_back(started, "run", NOW + PAUSE)
    assert states(state) == {A: "waiting"} and due(decided(state)) == []
    assert claimed(state, now=NOW + PAUSE).claimed is not None


def test_a_consolidation_is_claimed_as_a_batch_without_arrivals() -> None:
    state = claim_consolidation(looked(LineageState(), arrival()), NOW, "one", "run")
    assert state.claimed is not None and state.claimed.files == () and claimed(state, "two") == state
    lost = lose(state, "one", 1, NOW)
    assert due(decided(lost)) == [[], [A]], "another run goes on with it"
    assert ended(state, "repeat").batches == ()


def test_what_is_learned_again_is_open_though_it_has_ended() -> None:
    state = claimed(looked(LineageState(), arrival()))
    ends = notes(state, "rejected", version="1")
    state = open_again(ended(state, "rejected"), [arrival()], NOW)
    assert states(looked(state, arrival(), ended=ends)) == {A: "waiting"}


# -- the settings `retrain`


def counted(state: LineageState, **num_rows: int) -> LineageState:
    keys = {"a": A, "b": B, "c": C}
    rows = {keys[name]: number for name, number in num_rows.items()}
    return state.model_copy(
        update={
            "arrivals": {
                key: note.model_copy(update={"num_rows": rows.get(key, note.num_rows)})
                for key, note in state.arrivals.items()
            }
        }
    )


def test_rows_are_waited_for_and_files_of_a_task_are_one_batch() -> None:
    state = looked(LineageState(), arrival(A, age=200), arrival(B, age=300), arrival(C, age=900))
    assert due(decided(state, min_rows=4)) == [], "nothing is counted yet"
    found = decided(counted(state, a=2, b=2, c=3), min_rows=4)
    assert due(found) == [[B, A]] and found.due[0].is_fixed
    both = decided(counted(state, a=2, b=2, c=4), min_rows=4)
    assert due(both) == [[C], [B, A]], "tasks in the order of their oldest file"
    assert {each.task: (each.is_due, each.num_rows) for each in found.waiting} == {
        "bank": (True, 4),
        "clinic": (False, 3),
    }


def test_what_cannot_be_counted_is_due_alone() -> None:
    found = decided(counted(looked(LineageState(), arrival(A), arrival(B)), a=0, b=2), min_rows=3)
    assert due(found) == [[A]] and [each.num_rows for each in found.waiting] == [2]


def test_a_budget_that_is_used_up_lets_wait() -> None:
    state = counted(looked(LineageState(), arrival()), a=2)
    assert due(decided(state, spent=0.5, budget_hours=1)) == [[A]]
    assert due(decided(state, spent=1.5, budget_hours=1)) == []
    asked = counted(let_go(state.model_copy(update={"arrivals": held_ones(state)}), [A]), a=2)
    assert due(decided(asked, spent=1.5, budget_hours=1)) == [[A]], "a person has asked for it"


def held_ones(state: LineageState) -> dict[str, Any]:
    return {key: note.model_copy(update={"state": "held"}) for key, note in state.arrivals.items()}


def begun() -> LineageState:
    """A batch of two files, which has failed."""
    policy = RetrainPolicy(min_rows=4)
    state = counted(looked(LineageState(), arrival(A), arrival(B)), a=2, b=2)
    state = ended(claimed(state, policy=policy), "failed")
    later = "inbox/bank/later.csv"
    state = looked(state, arrival(A), arrival(B), arrival(later), num_rows={later: 9})
    assert states(state) == {A: "failed", B: "failed", later: "waiting"}
    return state


def test_a_batch_stays_as_it_was_and_newer_files_of_its_task_wait_for_its_end() -> None:
    state = begun()
    assert due(decided(state, min_rows=4)) == []
    found = decided(state, NOW + PAUSE, min_rows=4)
    assert due(found) == [[A, B]]
    assert [(each.is_due, each.num_rows) for each in found.waiting] == [(True, 4), (False, 9)]
    assert due(decided(state, NOW + PAUSE)) == [[A, B]], "also after the lineage got another policy"
    over = ended(claimed(state, now=NOW + PAUSE, policy=RetrainPolicy(min_rows=4)), "refused")
    assert due(decided(over, min_rows=4)) == [["inbox/bank/later.csv"]]


@pytest.mark.parametrize("left", [(A,), (A, B)])
def test_a_batch_of_which_a_file_is_gone_or_another_one_is_over(
    left: tuple[str, ...],
) -> None:
    state = looked(begun(), *(arrival(key, etag="2" if key == B else "1") for key in left))
    assert state.batches == () and set(states(state).values()) == {"waiting"}
    assert due(decided(counted(state, a=2, b=3), min_rows=5)) == ([[A, B]] if B in left else [])


def test_what_is_refused_together_is_learned_one_after_another() -> None:
    state = counted(looked(LineageState(), arrival(A), arrival(B)), a=2, b=2)
    policy = RetrainPolicy(min_rows=4)
    state = ended(claimed(state, policy=policy), "split")
    assert due(decided(state, min_rows=4)) == [[A], [B]]
    state = claimed(state, policy=policy)
    assert state.claimed is not None and state.claimed.attempt == 1
    state = claimed(ended(state, "refused", id_=state.claimed.id), policy=policy)
    assert states(state) == {B: "claimed"}


def test_a_file_that_changed_since_it_was_claimed_is_left_to_the_next_look() -> None:
    state = dissolve(claimed(looked(LineageState(), arrival(A), arrival(B))), "one")
    assert states(looked(state, arrival(A, etag="2", age=0), arrival(B))) == {A: "landed", B: "waiting"}
