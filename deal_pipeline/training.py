"""What trains: flows with typed arguments, which a command runs in its own process and the Python API in a child.

A training is JSON on its way to the child, and so is its result on the way back.
"""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, Field

from tasks.lineage.settings import WatchedLineage
from tasks.spec import AdaptSpec


class _Training(BaseModel, frozen=True, extra="forbid"):
    """The arguments of a flow that trains."""


class Adapt(_Training, frozen=True):
    """Learn one arrival."""

    kind: Literal["adapt"] = "adapt"
    spec: AdaptSpec
    again: bool = False

    def start(self) -> Coroutine[Any, Any, Any]:
        """Return the flow's coroutine."""
        from flows.adapt import adapt

        return adapt(self.spec, again=self.again)

    def result_type(self) -> Any:
        """Return the type of the result."""
        from flows.adapt import AdaptResult

        return AdaptResult


class Requeue(_Training, frozen=True):
    """Learn arrivals again that the champion does not know."""

    kind: Literal["requeue"] = "requeue"
    lineage: str
    versions: tuple[str, ...] = ()

    def start(self) -> Coroutine[Any, Any, Any]:
        """Return the flow's coroutine."""
        from flows.requeue import requeue

        return requeue(self.lineage, self.versions)

    def result_type(self) -> Any:
        """Return the type of the result."""
        from flows.adapt import AdaptResult

        return list[AdaptResult]


class Consolidate(_Training, frozen=True):
    """Learn what is left of all arrivals together."""

    kind: Literal["consolidate"] = "consolidate"
    lineage: str
    origin: Literal["base", "champion"] | None = None

    def start(self) -> Coroutine[Any, Any, Any]:
        """Return the flow's coroutine."""
        from flows.consolidate import consolidate

        return consolidate(self.lineage, self.origin)

    def result_type(self) -> Any:
        """Return the type of the result."""
        from flows.adapt import AdaptResult

        return AdaptResult


class Rebase(_Training, frozen=True):
    """Learn a lineage's arrivals on another base model."""

    kind: Literal["rebase"] = "rebase"
    lineage: str
    base: str
    skip_rejected: bool = False
    accept_lost: bool = False
    engines: tuple[str, ...] = ()
    who: str

    def start(self) -> Coroutine[Any, Any, Any]:
        """Return the flow's coroutine."""
        from flows.rebase import rebase

        running: Coroutine[Any, Any, Any] = rebase(**self.model_dump(exclude={"kind"}))
        return running

    def result_type(self) -> Any:
        """Return the type of the result."""
        from flows.branch import BranchResult

        return BranchResult


class Relearn(_Training, frozen=True):
    """Delete an arrival, and make again every version that learned from it."""

    kind: Literal["relearn"] = "relearn"
    lineage: str
    named: str
    reason: str = ""
    skip_rejected: bool = False
    stops_serving: bool = False
    accept_lost: bool = False
    who: str

    def start(self) -> Coroutine[Any, Any, Any]:
        """Return the flow's coroutine."""
        from flows.relearn import relearn

        running: Coroutine[Any, Any, Any] = relearn(**self.model_dump(exclude={"kind"}))
        return running

    def result_type(self) -> Any:
        """Return the type of the result."""
        from flows.branch import BranchResult

        return BranchResult


class Watch(_Training, frozen=True):
    """Learn what lands in the inbox."""

    kind: Literal["watch"] = "watch"
    spec: WatchedLineage
    once: bool = False
    poll_seconds: float = 2.0

    def start(self) -> Coroutine[Any, Any, Any]:
        """Return the flow's coroutine."""
        from flows.watch import watch

        return watch(self.spec, once=self.once, poll_seconds=self.poll_seconds)

    def result_type(self) -> Any:
        """Return the type of the result."""
        from flows.watch import WatchResult

        return WatchResult


class GiveUp(_Training, frozen=True):
    """End an open branch. It trains nothing, but its flow calls another flow, which needs Prefect's API."""

    kind: Literal["give-up"] = "give-up"
    lineage: str
    who: str

    def start(self) -> Coroutine[Any, Any, Any]:
        """Return the flow's coroutine."""
        from flows.branch import give_up

        return give_up(self.lineage, self.who)

    def result_type(self) -> Any:
        """Return the type of the result."""
        from infra.branches import KnownBranch

        return KnownBranch


Training: TypeAlias = Adapt | Requeue | Consolidate | Rebase | Relearn | Watch | GiveUp
AnyTraining: TypeAlias = Annotated[Training, Field(discriminator="kind")]
