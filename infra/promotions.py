"""The promotion log of a lineage: which version was champion when, who moved the champion, and why.

The log is only added to. It has one object per move, `promotions/<lineage>/<number>.json`, written with a conditional
put: of two concurrent moves one gets the next number, and the other finds the number taken. MLflow's aliases follow the
log.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from deal_core.judging_config import RolloutKind
from deal_core.shown import Shown
from infra.outcomes import Action
from infra.store import keys
from infra.store.base import ObjectStore
from infra.store.stored import Stored, parse_stored, read_folder, reading_stored, write_stored

ENDING = frozenset({"promoted", "rolled back"})
"""Actions that move the champion. A rollout compares with the champion, so each of them ends it."""


UNTIL_THEN = "Until then nobody knows which version is champion, and nothing is learned; a server that runs serves on."
"""What follows from a promotion log that cannot be read."""


class Change(BaseModel):
    """A change of the champion, and its author."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    action: Annotated[Action, Shown("what")]
    lineage: str
    version: Annotated[str, Shown()]
    """The version that the action is about."""
    before: str | None
    """The champion before; None: there was none."""
    champion: Annotated[str | None, Shown()]
    """The champion after; only `promoted`, `rolled back` and `stopped` change it."""
    who: Annotated[str, Shown()]
    """A person's account, or the part of the pipeline that made the change."""
    why: Annotated[str, Shown()]
    run: str | None = None
    """Key of the adaptation run, if a run made the change."""
    rollout: RolloutKind | None = None
    """How the version is tried on live traffic; only of the action `rollout`."""
    branch: int | None = None
    """Number of the branch that this move swapped in."""


class Move(Change, Stored):
    """An entry of the promotion log."""

    number: int = Field(ge=1)
    """Counts from 1 within the lineage."""
    when: Annotated[datetime, Shown(format="%Y-%m-%d %H:%M:%S")]


class PromotionLog:
    """The promotion logs of a store's lineages."""

    def __init__(self, store: ObjectStore) -> None:
        self.store = store

    def moves(self, lineage: str) -> tuple[Move, ...]:
        """Return all moves of a lineage, oldest first."""
        entries = read_folder(self.store, keys.promotion_folder(lineage))
        return tuple(self.parse(key, content) for key, content in entries.items())

    def last(self, lineage: str) -> Move | None:
        """Return the newest move, if there is one."""
        entries = [info.key for info in self.store.list(keys.promotion_folder(lineage))]
        return self.parse(entries[-1], self.store.get_bytes(entries[-1])) if entries else None

    def champion_at(self, lineage: str, when: datetime) -> str | None:
        """Return the version that was champion at a time; None: the log names no champion for this time."""
        moves = [move for move in self.moves(lineage) if move.when <= when]
        return moves[-1].champion if moves else None

    def open_rollout(self, lineage: str) -> Move | None:
        """Return the entry that began the rollout that runs now; None: no version is tried on live traffic."""
        return rollout_of(self.moves(lineage))

    def add(self, after: Move | None, change: Change) -> Move | None:
        """Write the move that follows `after`; None: another writer was faster, and nothing was written."""
        move = Move(number=after.number + 1 if after else 1, when=datetime.now(UTC), **change.model_dump())
        key = keys.promotion_key(move.lineage, move.number)
        return move if write_stored(self.store, key, move, if_absent=True) else None

    def parse(self, key: str, content: bytes) -> Move:
        """Return the entry with a key; raise StoreError if it is damaged, or another release wrote it."""
        remedy = f"Restore it from a backup of the store, or use the program version that wrote it. {UNTIL_THEN}"
        with reading_stored(self.store, key, "an entry of the promotion log", remedy):
            return parse_stored(content, Move)


def rollout_of(moves: Sequence[Move]) -> Move | None:
    """Return the entry that began the rollout that runs now, of a lineage's moves, oldest first.

    A promotion, a rollback, a rejection of the version, and a newer rollout end it.
    """
    rejected: set[str] = set()
    for move in reversed(moves):
        if move.action == "rollout":
            return None if move.version in rejected else move
        if move.action in ENDING:
            return None
        if move.action == "rejected":
            rejected.add(move.version)
    return None
