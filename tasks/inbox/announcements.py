"""Announcements: which open arrivals a server was told about, and when to tell it again."""

from __future__ import annotations

import hashlib
import uuid
from datetime import UTC, datetime

from prefect.events import emit_event
from pydantic import BaseModel, ConfigDict, ValidationError

from infra.store.base import ObjectInfo, ObjectNotFoundError, ObjectStore
from infra.store.keys import task_of
from tasks.inbox.listing import growing_pause

ARRIVAL_LANDED = "deal.arrival.landed"
"""The event; its resource is `deal.lineage.<name>`, its payload lineage, task, uri and etag."""
LANDED = "deal-arrival-landed"
"""The automation of prefect.yaml by which the event starts a run, of whichever lineage."""


class Announcement(BaseModel):
    """`landed/<lineage>/<digest of key, content and what lies beside>.json`."""

    model_config = ConfigDict(extra="forbid")

    key: str
    etag: str
    number: int
    """How often it was announced before."""
    at: datetime


def announce(store: ObjectStore, lineage: str, info: ObjectInfo, beside: str) -> None:
    """Tell the server about an arrival, then note it: a crash in between tells it twice, and counts once."""
    _tell(store, lineage, info, beside, number=0)


def announce_again(store: ObjectStore, lineage: str, info: ObjectInfo, beside: str, now: datetime) -> bool:
    """Tell the server once more about an arrival that is still open and that nobody works on.

    Its run may just be waiting for a worker, so the pauses grow; return whether it was time to.
    """
    known = read_announcement(store, lineage, info, beside)
    if known is None or now - known.at < growing_pause(known.number):
        return False
    _tell(store, lineage, info, beside, number=known.number + 1)
    return True


def read_announcement(store: ObjectStore, lineage: str, info: ObjectInfo, beside: str) -> Announcement | None:
    """The last announcement of an arrival; None if there was none, or none that can be understood."""
    try:
        return Announcement.model_validate_json(store.get_bytes(_key(lineage, info, beside)))
    except (ObjectNotFoundError, ValidationError):
        return None


def drop_announcement(store: ObjectStore, lineage: str, info: ObjectInfo, beside: str) -> None:
    """Delete what is noted of an announcement, as its arrival is closed."""
    store.delete(_key(lineage, info, beside))


def _tell(store: ObjectStore, lineage: str, info: ObjectInfo, beside: str, *, number: int) -> None:
    uri, content = store.uri_of(info.key), f"{info.etag} {beside}".strip()
    emit_event(
        event=ARRIVAL_LANDED,
        resource={"prefect.resource.id": f"deal.lineage.{lineage}", "prefect.resource.name": lineage},
        payload={"lineage": lineage, "task": task_of(info.key), "uri": uri, "etag": info.etag},
        id=uuid.uuid5(uuid.NAMESPACE_URL, f"{lineage} {uri}@{content} {number}"),  # told twice, it is one event
        occurred=datetime.now(UTC),
    )
    noted = Announcement(key=info.key, etag=info.etag, number=number, at=datetime.now(UTC))
    store.put_bytes(_key(lineage, info, beside), noted.model_dump_json().encode())


def _key(lineage: str, info: ObjectInfo, beside: str) -> str:
    digest = hashlib.sha256(f"{info.key}\n{info.etag}\n{beside}".encode()).hexdigest()
    return f"landed/{lineage}/{digest[:32]}.json"
