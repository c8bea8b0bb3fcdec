"""How the commands that serve show their results to people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.markup import escape

from tasks.serving.registered import route_key

if TYPE_CHECKING:
    from tasks.serving.registered import ServingRoute


def show_route(route: ServingRoute) -> Sequence[RenderableType]:
    """Which model name answers for a lineage."""
    return [
        f"[bold green]{escape(route.lineage)}[/] is answered by [bold]{escape(route.model or '–')}[/] "
        f"(version {escape(route.version or '–')}) at {escape(route.url)}",
        f"  requests name it as their model; the name stands in STORE/{escape(route_key(route.lineage))}",
    ]
