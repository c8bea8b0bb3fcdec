"""What trains: flows with typed arguments, which a command runs in its own process and the Python API in a child.

A training is JSON on its way to the child, and so is its result on the way back. Its fields are the arguments of its
flow.
"""

from __future__ import annotations

from collections.abc import Coroutine
from pkgutil import resolve_name
from typing import Annotated, Any, ClassVar, Literal, TypeAlias, get_type_hints

from pydantic import BaseModel, Field

from tasks.lineage.settings import WatchedLineage
from tasks.spec import AdaptSpec


class _Training(BaseModel, frozen=True, extra="forbid"):
    """The arguments of a flow that trains."""

    flow: ClassVar[str]
    """The flow, as MODULE:NAME. It is imported when it is needed: with Prefect that takes seconds."""

    def coroutine(self) -> Coroutine[Any, Any, Any]:
        """Return the flow's coroutine."""
        arguments = {name: getattr(self, name) for name in type(self).model_fields if name != "kind"}
        coroutine: Coroutine[Any, Any, Any] = resolve_name(self.flow)(**arguments)
        return coroutine

    def result_type(self) -> Any:
        """Return the type of the flow's result."""
        return get_type_hints(resolve_name(self.flow))["return"]


class Adapt(_Training, frozen=True):
    """Learn one arrival."""

    kind: Literal["adapt"] = "adapt"
    flow = "flows.adapt:adapt"
    spec: AdaptSpec
    again: bool = False


class Requeue(_Training, frozen=True):
    """Learn arrivals again that the champion does not know."""

    kind: Literal["requeue"] = "requeue"
    flow = "flows.requeue:requeue"
    lineage: str
    versions: tuple[str, ...] = ()


class Consolidate(_Training, frozen=True):
    """Learn what is left of all arrivals together."""

    kind: Literal["consolidate"] = "consolidate"
    flow = "flows.consolidate:consolidate"
    lineage: str
    start: Literal["base", "champion"] | None = None


class Rebase(_Training, frozen=True):
    """Learn a lineage's arrivals on another base model."""

    kind: Literal["rebase"] = "rebase"
    flow = "flows.rebase:rebase"
    lineage: str
    base: str
    skip_rejected: bool = False
    accept_lost: bool = False
    engines: tuple[str, ...] = ()
    who: str


class Relearn(_Training, frozen=True):
    """Delete an arrival, and make again every version that learned from it."""

    kind: Literal["relearn"] = "relearn"
    flow = "flows.relearn:relearn"
    lineage: str
    named: str
    reason: str = ""
    skip_rejected: bool = False
    stops_serving: bool = False
    accept_lost: bool = False
    who: str


class Watch(_Training, frozen=True):
    """Learn what lands in the inbox."""

    kind: Literal["watch"] = "watch"
    flow = "flows.watch:watch"
    spec: WatchedLineage
    once: bool = False
    poll_seconds: float = 2.0


class GiveUp(_Training, frozen=True):
    """End an open branch. It trains nothing, but its flow calls another flow, which needs Prefect's API."""

    kind: Literal["give-up"] = "give-up"
    flow = "flows.branch:give_up"
    lineage: str
    who: str


Training: TypeAlias = Adapt | Requeue | Consolidate | Rebase | Relearn | Watch | GiveUp
AnyTraining: TypeAlias = Annotated[Training, Field(discriminator="kind")]
