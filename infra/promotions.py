"""The promotion log of a store: which version of a lineage was champion when, who moved it, and why.

One object per move, `promotions/<lineage>/<number>.json`, written with a conditional put: of two moves at once one gets
the next number, the other finds it taken. The log is the truth; the registry's alias follows it.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from deal_core.errors import StoreError
from infra.store import keys
from infra.store.base import ObjectStore

Action = Literal["promoted", "rolled back", "rejected"]


class Change(BaseModel):
    """What a move does, and who wants it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    action: Action
    lineage: str
    version: str
    """The version it is about."""
    before: str | None
    """The champion before; None: there was none."""
    champion: str | None
    """The champion from then on; as before, where a version was rejected."""
    who: str
    """A person's account, or the part of the pipeline that moved it."""
    why: str
    run: str | None = None
    """Key of the adaptation run, where one moved it."""


class Move(Change):
    """One entry of the log."""

    schema_version: Literal[1] = 1
    number: int = Field(ge=1)
    """Counts from 1 within the lineage."""
    when: datetime


class PromotionLog:
    """The entries of one store; they are only ever added."""

    def __init__(self, store: ObjectStore) -> None:
        self.store = store

    def moves(self, lineage: str) -> tuple[Move, ...]:
        """All moves of a lineage, oldest first."""
        found = sorted(info.key for info in self.store.list(keys.promotion_folder(lineage)))
        return tuple(self._read(key) for key in found)

    def last(self, lineage: str) -> Move | None:
        """The newest move, if there is one."""
        key = max((info.key for info in self.store.list(keys.promotion_folder(lineage))), default=None)
        return self._read(key) if key else None

    def champion_at(self, lineage: str, when: datetime) -> str | None:
        """The version that was champion at a moment, as far as the log goes back; None: none was."""
        moves = [move for move in self.moves(lineage) if move.when <= when]
        return moves[-1].champion if moves else None

    def add(self, after: Move | None, change: Change) -> Move | None:
        """Write the move that follows `after`; None: somebody else was faster, and nothing was written."""
        move = Move(number=after.number + 1 if after else 1, when=datetime.now(UTC), **change.model_dump())
        data = json.dumps(move.model_dump(mode="json"), ensure_ascii=False, indent=2).encode()
        key = keys.promotion_key(move.lineage, move.number)
        won = self.store.put_bytes(key, data, if_absent=True)
        return move if won or self._read(key) == move else None  # a put that was sent twice finds its own entry

    def _read(self, key: str) -> Move:
        try:
            return Move.model_validate_json(self.store.get_bytes(key))
        except ValidationError as error:
            raise StoreError(
                f"The promotion log's entry {self.store.uri_of(key)} is damaged ({error.error_count()} of its values "
                "do not fit). Restore it from a backup of the store, or use the program version that wrote it. The "
                "lineage still predicts and serves; until then its champion does not move, and nothing is learned."
            ) from error
