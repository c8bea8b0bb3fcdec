"""What becomes of an arrival: functions from one state of a lineage to the next, which read no store and no clock.

`sense` puts what a look at the inbox has found into the state. `claim` chooses what is learned next, by the settings
`retrain`; it reads no file. `finish` puts in how a try has ended. The local watch, the server's sensor and
`deal status` use the same three. `hold`, `put_back` and `lose` are for runs that did not come to an end, `let_go` is
for a person. `tasks.arrivals` reads the store for them.

Arrivals of one task that are learned together are a batch. A batch stays as it was claimed until it ends, so what lands
after a crash does not change what is tried again. At most one batch of a lineage is claimed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import NamedTuple

from infra.lineage_state import Batch, Content, EndedArrival, LineageState, OpenArrival
from infra.outcomes import Outcome
from infra.store.keys import task_of
from tasks.inbox import Arrival, InboxLook
from tasks.lineage.retrain import RetrainPolicy, Waiting, WaitingFile, when_to_train

PAUSE = timedelta(seconds=60)
"""Pause before the second try after a failure that may pass; see `growing_pause`."""
MAX_DOUBLINGS = 6
MAX_READER_DEATHS = 2
"""Tries of files of which one ends the process that reads it. The first may have been for want of memory."""
NUM_AT_ONCE = 3
"""Tries that begin at once after a process died. Later ones begin after growing pauses."""


def growing_pause(num_before: int) -> timedelta:
    """Return the pause after a try. It starts at a minute and doubles with every earlier try, up to about an hour."""
    return PAUSE * (1 << min(num_before, MAX_DOUBLINGS))


def is_of(note: Content, arrival: Arrival) -> bool:
    """Return whether a note is about this content. A restored backup has the same contents with other ETags."""
    if note.etag == arrival.etag:
        return True
    return note.content is not None and note.written == arrival.written and note.content == arrival.content


def is_closed(end: EndedArrival | None, arrival: Arrival) -> bool:
    """Return whether an arrival has ended with this content. A refused one may be of use with other companions."""
    if end is None or not is_of(end, arrival):
        return False
    return end.outcome != "refused" or end.beside == arrival.stamp


# -- a look at the inbox


def sense(
    state: LineageState,
    ended: Mapping[str, EndedArrival],
    inbox: InboxLook,
    now: datetime,
    *,
    tasks: Collection[str] = (),
    settle_seconds: float,
    quiet_seconds: float,
    num_rows: Mapping[str, int] | None = None,
) -> LineageState:
    """Return the state after a look at the inbox.

    New and changed arrivals have landed; what is gone from the inbox leaves the state. An arrival waits as soon as it
    is complete: it and its companions have not changed for `settle_seconds`, by their own times or since they were
    seen first. So is a folder with a file `_SUCCESS`. Another folder is complete after `quiet_seconds`, because the
    pause between two of its files may be long. What is claimed stays as it is: its run looks at its files itself.

    Args:
        state: The state before.
        ended: How arrivals ended, by key.
        inbox: The look.
        now: The present time.
        tasks: The lineage's tasks; empty: all of the inbox.
        settle_seconds: See above.
        quiet_seconds: See above.
        num_rows: Numbers of rows, by the keys of arrivals that were counted for this call.
    """
    claimed = state.claimed
    at_work = frozenset(claimed.files if claimed else ())
    # A count of rows may take minutes. Meanwhile another process may have looked, and seen other contents.
    newer = {key for key, note in state.arrivals.items() if inbox.at < note.seen <= now}
    # A process that died after it had noted an end, and before the arrival left the state.
    over = {
        key for key, note in state.arrivals.items() if note.batch and key in ended and ended[key].batch == note.batch
    }
    arrivals = {key: note for key, note in state.arrivals.items() if key not in over}
    changed = set[str]()
    present = {arrival.key: arrival for arrival in inbox.of(tasks)}
    for key in arrivals.keys() - present.keys() - at_work - newer:
        task = task_of(key)
        if task not in inbox.unread and (not tasks or task in tasks):
            changed.add(key)
            del arrivals[key]
    for key, arrival in present.items():
        note = arrivals.get(key)
        if note is not None and (key in at_work or (key in newer and note.etag != arrival.etag)):
            continue
        is_same = note is not None and is_of(note, arrival)
        if not is_same and is_closed(ended.get(key), arrival):
            if arrivals.pop(key, None) is not None:
                changed.add(key)
            continue
        # What is held stays held with other companions. What has failed may succeed with them.
        if note is None or not is_same or (note.beside != arrival.stamp and note.state != "held"):
            if note is not None:
                changed.add(key)
            note = _landed(arrival, now, is_asked_for=is_same and note is not None and note.is_asked_for)
        elif note.etag != arrival.etag:  # a copy: it is not read for its content again
            note = note.model_copy(update={"etag": arrival.etag})
        if note.state == "landed":
            pause = quiet_seconds if arrival.waits_for_quiet else settle_seconds
            if (now - _unchanged_since(arrival, note, now)).total_seconds() >= pause:
                note = note.model_copy(update={"state": "waiting"})
        if num_rows and key in num_rows:
            note = note.model_copy(update={"num_rows": num_rows[key]})
        arrivals[key] = note
    # A batch with an arrival that is another one now, or is gone, is none any more; the others wait again.
    broken = {batch.id for batch in state.batches if batch.claimed is None and changed & {*batch.files}}
    batches = []
    for batch in state.batches:
        files = tuple(key for key in batch.files if key not in over)
        if batch.id not in broken and (files or not batch.files):
            batches.append(batch.model_copy(update={"files": files}))
    for key, note in arrivals.items():
        if note.batch in broken:
            state_now = "waiting" if note.state == "failed" else note.state
            arrivals[key] = note.model_copy(update={"batch": None, "state": state_now, "why": ""})
    return state.model_copy(update={"arrivals": arrivals, "batches": tuple(batches)})


def _landed(arrival: Arrival, now: datetime, *, is_asked_for: bool) -> OpenArrival:
    return OpenArrival(
        etag=arrival.etag,
        written=arrival.written,
        beside=arrival.stamp,
        state="landed",
        modified=min(arrival.modified, now),
        landed=min(arrival.landed, now),
        seen=now,
        num_files=len(arrival.files),
        is_asked_for=is_asked_for,
    )


def _unchanged_since(arrival: Arrival, note: OpenArrival, now: datetime) -> datetime:
    """The time since which an arrival and its companions are as they are. A copy may keep the times of its original."""
    own = arrival.landed if arrival.waits_for_quiet else arrival.modified
    changed = max([own, *(info.modified for info in arrival.companions)])
    return min(changed, note.seen if note.seen <= now else now)  # a clock may run ahead


# -- what is learned next


class Plan(NamedTuple):
    """What a lineage has to learn, in this order, and what waits."""

    due: tuple[Batch, ...]
    """Batches, each as it would be claimed but for its id and its time. A new one has no id."""
    waiting: tuple[Waiting, ...]
    """One entry for each task of which files wait or are due; empty if nothing ever waits for this lineage."""


def plan(
    state: LineageState,
    policy: RetrainPolicy,
    now: datetime,
    spent_hours: Callable[[datetime], float],
    *,
    tasks: Collection[str] = (),
    failed_before: datetime | None = None,
) -> Plan:
    """Decide what a lineage has to learn now. What was begun comes first, then the task with the oldest arrival.

    `spent_hours` returns the hours of the lineage's trainings that ended in the month of a time. What failed before
    `failed_before` is due without a pause. For the other arguments see `sense`.
    """
    begun = [batch for batch in state.batches if batch.claimed is not None or batch.is_due(now, failed_before)]
    fresh = {
        key: note
        for key, note in sorted(state.arrivals.items(), key=lambda item: (item[1].modified, item[0]))
        if note.state == "waiting" and note.batch is None and (not tasks or task_of(key) in tasks)
    }
    behind = {batch.task for batch in state.batches if batch.is_fixed}
    if not policy.may_wait:
        new = [_new_batch([key], now) for key in fresh if task_of(key) not in behind]
        return Plan((*begun, *new), ())

    def describe(task: str, notes: Iterable[OpenArrival], is_due: bool, why: str) -> Waiting:
        notes = list(notes)
        return Waiting(
            task=task,
            num_files=sum(note.num_files for note in notes),
            num_rows=sum(note.num_rows or 0 for note in notes),
            since=min(note.landed for note in notes).astimezone(policy.zone),
            is_due=is_due,
            why=why,
        )

    due, waiting = list(begun), list[Waiting]()
    by_task: dict[str, dict[str, OpenArrival]] = defaultdict(dict)
    for key, note in fresh.items():
        by_task[task_of(key)][key] = note
    for batch in begun:
        if batch.files:
            notes = [state.arrivals[key] for key in batch.files if key in state.arrivals]
            if notes:
                waiting.append(describe(batch.task, notes, True, "A run has begun to learn this"))
    for task in behind & by_task.keys():
        waiting.append(describe(task, by_task.pop(task).values(), False, "An earlier batch of the task must end first"))
    for task, notes_of in by_task.items():
        counted = {key: note for key, note in notes_of.items() if note.num_rows is not None}
        # What cannot be counted is due at once, alone, so that it is refused and holds up nothing.
        due += [_new_batch([key], now) for key, note in counted.items() if not note.num_rows]
        countable = {key: note for key, note in counted.items() if note.num_rows}
        decided = when_to_train(
            policy,
            task,
            [
                WaitingFile(note.landed, note.num_rows or 0, note.num_files, is_asked_for=note.is_asked_for)
                for note in countable.values()
            ],
            now=now,
            spent_hours=lambda: spent_hours(now),
        )
        if decided is not None:
            waiting.append(decided)
            due += [_new_batch([*countable], now, is_fixed=True)] if decided.is_due else []
    return Plan(tuple(due), tuple(waiting))


def _new_batch(files: Sequence[str], now: datetime, *, is_fixed: bool = False) -> Batch:
    return Batch(id="", task=task_of(files[0]), files=tuple(files), is_fixed=is_fixed, made=now)


def claim(
    state: LineageState,
    policy: RetrainPolicy,
    now: datetime,
    spent_hours: Callable[[datetime], float],
    new_id: str,
    *,
    tasks: Collection[str] = (),
    failed_before: datetime | None = None,
    is_alone: bool = False,
    run: str | None = None,
) -> LineageState:
    """Claim the next batch; the state's `claimed` says which. Nothing changes while another batch is claimed.

    Whoever holds the lineage is the only one at work on it (`is_alone`): what is claimed then was left by a dead
    process or waits for its run, and is claimed again. `new_id` becomes the id of a new batch, and `run` is the run of
    the caller. For the other arguments see `plan`.
    """
    if state.paused is not None:
        return state
    if state.claimed is not None:
        if not is_alone:
            return state
        batch = state.claimed
        if run is not None and batch.run == run:  # the run that was started for it
            return state
    else:
        due = plan(state, policy, now, spent_hours, tasks=tasks, failed_before=failed_before).due
        if not due:
            return state
        batch = due[0]
    is_new = not batch.id
    attempt = batch.attempt if is_new else batch.attempt + 1
    changes = {"id": batch.id or new_id, "attempt": attempt, "claimed": now, "run": run, "due": None}
    return _put(state, batch.model_copy(update=changes), "claimed")


def claim_consolidation(state: LineageState, now: datetime, new_id: str, run: str | None) -> LineageState:
    """Claim a consolidation, unless a batch is claimed. Whoever calls this holds the lineage."""
    if state.claimed is not None:
        return state
    return _put(state, Batch(id=new_id, made=now, claimed=now, run=run), "claimed")


def with_run(state: LineageState, id_: str, attempt: int, run: str) -> LineageState:
    """Note the run that was started for an attempt."""
    batch = state.batch(id_)
    if batch is None or batch.attempt != attempt or batch.claimed is None or batch.run is not None:
        return state
    return _put(state, batch.model_copy(update={"run": run}), "claimed")


def _put(state: LineageState, batch: Batch, arrivals_become: str, **changes: object) -> LineageState:
    """Put a batch in the place of the one with its id, or behind all others, and change the states of its arrivals."""
    arrivals = {
        key: note.model_copy(update={"state": arrivals_become, "batch": batch.id, **changes})
        if key in batch.files
        else note
        for key, note in state.arrivals.items()
    }
    batches = [batch if each.id == batch.id else each for each in state.batches]
    batches += [] if batch in batches else [batch]
    return state.model_copy(update={"arrivals": arrivals, "batches": tuple(batches)})


def _put_unclaimed(
    state: LineageState, batch: Batch, arrivals_become: str, why: str, **changes: object
) -> LineageState:
    batch = batch.model_copy(update={"claimed": None, "run": None, **changes})
    return _put(state, batch, arrivals_become, why=why)


def _take_away(
    state: LineageState, batches: Sequence[Batch], become: Callable[[str, OpenArrival], OpenArrival] | None
) -> LineageState:
    """Take batches away. `become` makes of each of their arrivals what it is then; None: they leave the state."""
    ids, files = {batch.id for batch in batches}, {key for batch in batches for key in batch.files}
    arrivals = {
        key: note if become is None or key not in files else become(key, note)
        for key, note in state.arrivals.items()
        if become is not None or key not in files
    }
    left = tuple(batch for batch in state.batches if batch.id not in ids)
    return state.model_copy(update={"arrivals": arrivals, "batches": left})


def _waits_again(_: str, note: OpenArrival) -> OpenArrival:
    return note.model_copy(update={"state": "waiting", "batch": None})


# -- how a try ends


class Result(NamedTuple):
    """How a try of a batch has ended."""

    outcome: Outcome | str
    """One that ends the arrivals; or failed, held, or split: its arrivals are tried one after another."""
    message: str
    version: str | None = None
    is_final: bool = False
    """Whether it would fail again, so that it is tried only if asked."""
    has_killed_reader: bool = False
    """Whether a file ended the process that read it."""


def judged(batch: Batch, result: Result) -> Result:
    """Return the result of a try, in view of the tries before: what killed its reader again is refused."""
    num_deaths = batch.num_reader_deaths + result.has_killed_reader
    if result.outcome == "failed" and result.has_killed_reader and num_deaths >= MAX_READER_DEATHS:
        message = f"{result.message} It did so in {num_deaths} tries, so it is set aside until it changes."
        return result._replace(outcome="refused", message=message)
    return result


def ends_of(
    state: LineageState, batch: Batch, result: Result, now: datetime, arrivals: Mapping[str, Arrival]
) -> dict[str, EndedArrival]:
    """Return the notes about arrivals that have ended with a result; empty: they are tried again or are held.

    `arrivals` are the present ones by key, as far as they are there.
    """
    if result.outcome in ("failed", "held", "split"):
        return {}
    return {
        key: EndedArrival(
            etag=note.etag,
            written=note.written,
            content=_content_of(note, arrivals.get(key)),
            beside=note.beside,
            outcome=result.outcome,
            message=result.message,
            version=result.version,
            num_tries=batch.num_failed + 1,
            batch=batch.id,
            at=now,
        )
        for key, note in state.arrivals.items()
        if note.batch == batch.id
    }


def _content_of(note: OpenArrival, arrival: Arrival | None) -> str | None:
    """A digest of the content that a note is about, by which a copy of the store is known."""
    return arrival.content if arrival is not None and arrival.etag == note.etag else note.content


def finish(
    state: LineageState, id_: str, result: Result, now: datetime, arrivals: Mapping[str, Arrival]
) -> LineageState:
    """Return the state after a try of a batch. A batch that somebody has ended meanwhile changes nothing.

    Arrivals that have ended leave the state: `ends_of` makes the notes about them, which are written first.
    """
    batch = state.batch(id_)
    if batch is None:
        return state
    match result.outcome:
        case "failed":
            return _put_unclaimed(
                state,
                batch,
                "failed",
                result.message,
                due=None if result.is_final else now + growing_pause(batch.num_failed),
                num_failed=batch.num_failed + 1,
                failed=now,
                num_reader_deaths=batch.num_reader_deaths + result.has_killed_reader,
            )
        case "held":
            return _hold(state, [batch], result.message, arrivals)
        case "split":
            state = _take_away(state, [batch], _waits_again)
            for number, key in enumerate(batch.files):
                single = Batch(
                    id=f"{batch.id}-{number}", task=batch.task, files=(key,), made=batch.made, attempt=0, due=now
                )
                state = _put(state, single, "waiting")
            return state
        case _:
            return _take_away(state, [batch], None)


def put_back(state: LineageState, run: str | None, due: datetime) -> LineageState:
    """Let the batch of a run wait that cannot begin it, as the lineage is at work or paused; it is due then."""
    batch = state.claimed
    return state if batch is None or batch.run != run else _put_unclaimed(state, batch, "waiting", "", due=due)


def dissolve(state: LineageState, id_: str) -> LineageState:
    """Take away a batch of which a file has changed since it was claimed; the next look finds what is there."""
    batch = state.batch(id_)
    return state if batch is None else _take_away(state, [batch], _waits_again)


def lose(state: LineageState, id_: str, attempt: int, now: datetime) -> LineageState:
    """Let a batch be tried again whose run is over and has not ended it: its process died, or somebody deleted it."""
    batch = state.batch(id_)
    if batch is None or batch.attempt != attempt or batch.claimed is None:
        return state
    pause = timedelta(0) if batch.num_lost < NUM_AT_ONCE else growing_pause(batch.num_lost - NUM_AT_ONCE)
    return _put_unclaimed(state, batch, "waiting", "", due=now + pause, num_lost=batch.num_lost + 1)


def hold(
    state: LineageState,
    id_: str,
    attempt: int,
    others: Sequence[Batch],
    why: str,
    seen_before: datetime,
    arrivals: Mapping[str, Arrival],
) -> LineageState:
    """Hold the arrivals of a batch whose run a person has cancelled, and what that run would have learned next.

    `others` are the batches that were due; what was seen first after `seen_before` goes on.
    """
    batch = state.batch(id_)
    if batch is None or batch.attempt != attempt or batch.claimed is None:
        return state
    early = {key for key, note in state.arrivals.items() if note.seen <= seen_before}
    return _hold(state, [batch, *(other for other in others if early.issuperset(other.files))], why, arrivals)


def _hold(state: LineageState, batches: Sequence[Batch], why: str, arrivals: Mapping[str, Arrival]) -> LineageState:
    def held(key: str, note: OpenArrival) -> OpenArrival:
        content = _content_of(note, arrivals.get(key))
        return note.model_copy(update={"state": "held", "batch": None, "why": why, "content": content})

    return _take_away(state, batches, held)


def let_go(state: LineageState, keys: Collection[str]) -> LineageState:
    """Let held arrivals go on: they wait for nothing."""
    arrivals = {
        key: note.model_copy(update={"state": "waiting", "why": "", "is_asked_for": True})
        if key in keys and note.state == "held"
        else note
        for key, note in state.arrivals.items()
    }
    return state.model_copy(update={"arrivals": arrivals})


def open_again(state: LineageState, arrivals: Iterable[Arrival], now: datetime) -> LineageState:
    """Let arrivals be learned again that have ended."""
    opened = {
        arrival.key: _landed(arrival, now, is_asked_for=True).model_copy(update={"state": "waiting"})
        for arrival in arrivals
        if arrival.key not in state.arrivals
    }
    return state.model_copy(update={"arrivals": {**state.arrivals, **opened}})
