"""Announcements: a server is told of an arrival by an event, which starts a run that learns the arrival."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime

from prefect.events import emit_event
from pydantic import BaseModel, ConfigDict, ValidationError

from infra.store.base import ObjectInfo, ObjectNotFoundError, ObjectStore
from infra.store.keys import task_of
from tasks.inbox import InboxLook, growing_pause

ARRIVAL_LANDED = "deal.arrival.landed"
"""The event. Its resource is `deal.lineage.NAME`, its payload has lineage, task, uri and etag."""
LANDED = "deal-arrival-landed"
"""The automation of prefect.yaml that starts a run for the event."""


class Announcement(BaseModel):
    """The last announcement of an arrival, at `landed/LINEAGE/DIGEST.json` (digest of key, content and companions).

    An arrival that a run began before its announcement counts as announced; see `note_begun`.
    """

    model_config = ConfigDict(extra="forbid")

    key: str
    etag: str
    number: int
    """Number of earlier announcements."""
    at: datetime


def announce(
    store: ObjectStore, lineage: str, info: ObjectInfo, beside: str, released: datetime | None = None
) -> None:
    """Announce an arrival to the server, then note the announcement. A repeat after a crash counts once.

    `released` is when a person ended a hold of the arrival. The server ignores an event that it has had half an hour
    before; an announcement after the hold is another event than one before.
    """
    _announce(store, lineage, info, beside, released, number=0)


def announce_again(
    store: ObjectStore, lineage: str, info: ObjectInfo, beside: str, now: datetime, released: datetime | None = None
) -> bool:
    """Announce an open arrival without a run once more, if the pause since the last announcement is over.

    The pauses grow, because the arrival's run may be waiting for a worker. Return whether the pause was over. For
    `released` see `announce`.
    """
    known = read_announcement(store, lineage, info, beside)
    if known is None or now - known.at < growing_pause(known.number):
        return False
    _announce(store, lineage, info, beside, released, number=known.number + 1)
    return True


def note_begun(store: ObjectStore, lineage: str, info: ObjectInfo, beside: str) -> None:
    """Note an arrival that a run begins and that was not announced. If the run is lost, a server announces it again."""
    _note(store, lineage, info, beside, number=0)


def read_announcements(
    store: ObjectStore, lineage: str, inbox: InboxLook, arrivals: Sequence[ObjectInfo]
) -> dict[str, Announcement]:
    """Return the last announcement of each arrival that has one, by the arrival's key."""
    found = ((info.key, read_announcement(store, lineage, info, inbox.stamp(info))) for info in arrivals)
    return {key: announced for key, announced in found if announced is not None}


def read_announcement(store: ObjectStore, lineage: str, info: ObjectInfo, beside: str) -> Announcement | None:
    """Return the last announcement of an arrival; None: there was none, or its note is damaged."""
    try:
        return Announcement.model_validate_json(store.get_bytes(_announcement_key(lineage, info, beside)))
    except (ObjectNotFoundError, ValidationError):
        return None


def drop_announcement(store: ObjectStore, lineage: str, info: ObjectInfo, beside: str) -> None:
    """Delete the note of an announcement after its arrival was handled."""
    store.delete(_announcement_key(lineage, info, beside))


def _announce(
    store: ObjectStore, lineage: str, info: ObjectInfo, beside: str, released: datetime | None, *, number: int
) -> None:
    uri, content = store.uri_of(info.key), f"{info.etag} {beside}".strip()
    after = f" after {released.isoformat()}" if released else ""
    emit_event(
        event=ARRIVAL_LANDED,
        resource={"prefect.resource.id": f"deal.lineage.{lineage}", "prefect.resource.name": lineage},
        payload={"lineage": lineage, "task": task_of(info.key), "uri": uri, "etag": info.etag},
        id=uuid.uuid5(uuid.NAMESPACE_URL, f"{lineage} {uri}@{content} {number}{after}"),  # a repeat has the same id
        occurred=datetime.now(UTC),
    )
    _note(store, lineage, info, beside, number=number)


def _note(store: ObjectStore, lineage: str, info: ObjectInfo, beside: str, *, number: int) -> None:
    noted = Announcement(key=info.key, etag=info.etag, number=number, at=datetime.now(UTC))
    store.put_bytes(_announcement_key(lineage, info, beside), noted.model_dump_json().encode())


def _announcement_key(lineage: str, info: ObjectInfo, beside: str) -> str:
    digest = hashlib.sha256(f"{info.key}\n{info.etag}\n{beside}".encode()).hexdigest()
    return f"landed/{lineage}/{digest[:32]}.json"
