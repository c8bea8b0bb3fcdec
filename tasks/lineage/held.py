"""Held arrivals of a lineage, by the state of its watch. `tasks.cancelled` holds them and lets them go on.

Commands that only read import this module, so it imports no Prefect.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from pydantic import BaseModel

from infra.store.base import ObjectStore
from tasks.inbox import InboxLook, InboxState, look, read_state


class HeldArrival(BaseModel, frozen=True):
    """An arrival that waits for `deal requeue`."""

    key: str
    why: str

    def remedy(self, lineage: str) -> str:
        """Return the command that lets the arrival go on."""
        return f"deal requeue {shlex.quote(self.key)} --lineage {lineage}"


def held_arrivals(inbox: InboxLook, state: InboxState, tasks: Sequence[str] = ()) -> tuple[HeldArrival, ...]:
    """Return the arrivals of these tasks that are held, oldest first; without tasks: all of them."""
    return tuple(
        HeldArrival(key=info.key, why=known.message)
        for info in inbox.of(tasks)
        if (known := state.files.get(info.key)) and known.outcome == "held" and known.etag == info.etag
    )


def find_held(store: ObjectStore, lineage: str) -> tuple[HeldArrival, ...]:
    """Return all held arrivals of a lineage, oldest first."""
    state = read_state(store, lineage)
    if not any(known.outcome == "held" for known in state.files.values()):
        return ()
    return held_arrivals(look(store), state)
