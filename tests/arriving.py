"""Arrivals and states of a lineage, made of plain values; files that land; and what a run says of them."""

from __future__ import annotations

import os
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

from infra.lineage_state import LineageState, OpenArrival
from infra.store.base import ObjectInfo
from tasks.inbox import Arrival
from tasks.progress import LogReporter

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


def land(home: Path, name: str, content: bytes, age: float = 100) -> None:
    """Land a file in the inbox of a home. It keeps the time of its original, `age` seconds before a day of 2023."""
    path = home / "store" / "inbox" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    os.utime(path, (1_700_000_000 - age, 1_700_000_000 - age))


class Said(LogReporter):
    """Keeps the messages of a run."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def said(self, message: str) -> None:
        self.lines.append(message)
