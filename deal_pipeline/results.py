"""Results that only the Python API and the commands have. All others are those of the flows and tasks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tasks.lineage.history import HistoryEntry
    from tasks.lineage.reports import WrittenReport
    from tasks.planning import PlanResult
    from tasks.references import ScoredArrival
    from tasks.validate import ValidateResult


@dataclass(frozen=True, kw_only=True)
class ChampionAt:
    """The champion at a time."""

    at: str
    """The time, as ISO 8601 with its zone."""
    champion: str | None
    """Number of the version; None: no version was champion."""


@dataclass(frozen=True, kw_only=True)
class ShownVersion:
    """A version, and its page."""

    version: HistoryEntry
    page: WrittenReport | None
    """The page that --report has written; None: the option was not given."""


@dataclass(frozen=True, kw_only=True)
class ReleasedArrivals:
    """Arrivals of a lineage that were held and go on."""

    lineage: str
    released: tuple[str, ...]
    """As inbox/TASK/FILE, or the address of a file from elsewhere."""


@dataclass(frozen=True, kw_only=True)
class LineageFile:
    """A lineage's file of settings."""

    lineage: str
    file: str
    """Address of the file in the store."""


@dataclass(frozen=True, kw_only=True)
class CheckedRows:
    """Checked rows, and what a run with them takes."""

    data: ValidateResult
    """The checks of the rows."""
    plan: PlanResult | None
    """What a run takes; None: --plan was not given, or the rows are refused."""
    arrival: ScoredArrival | None = None
    """What the champion answers to the training rows; None: it does not know the task, or --no-score was given."""


@dataclass(frozen=True, kw_only=True)
class FetchedBase:
    """A base model that runs can use without a network."""

    source: str
    """The name, Hub id, folder or file that was given."""
    folder: str
    """The folder that it is in."""
