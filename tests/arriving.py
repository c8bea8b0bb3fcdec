"""Arrivals and states of a lineage, made of plain values."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

from infra.lineage_state import LineageState, OpenArrival
from infra.store.base import ObjectInfo
from tasks.inbox import Arrival

NOW = datetime(2030, 1, 1, tzinfo=UTC)


def arrival(key: str = "inbox/bank/a.csv", etag: str = "1", *, beside: str = "", age: float = 100.0) -> Arrival:
    """A file that has changed some seconds ago, and the ETag of its task file, if there is one."""
    file = ObjectInfo(key=key, size=1, etag=etag, modified=NOW - timedelta(seconds=age))
    task_file = replace(file, key="inbox/bank/task.yaml", etag=beside)
    return Arrival(key=key, files=(file,), companions=(task_file,) if beside else ())


def state_with(*keys: str, num_rows: int | None = None) -> LineageState:
    """A state in which arrivals wait."""
    return LineageState(
        arrivals={
            key: OpenArrival(
                etag="1",
                written=arrival(key).written,
                state="waiting",
                modified=NOW,
                landed=NOW,
                seen=NOW,
                num_rows=num_rows,
            )
            for key in keys
        }
    )
