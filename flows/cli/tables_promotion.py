"""What the commands of promotion show to people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.markup import escape

from flows.cli.tables import heading, new_table

if TYPE_CHECKING:
    from flows.promote import Decision, Learned
    from infra.promotions import Move


def show_decision(done: Decision) -> Sequence[RenderableType]:
    """What was decided, and what it leaves behind."""
    if done.action == "rejected":
        serves = f"version {done.champion} serves on" if done.champion else "no version serves"
        return [f"[bold]Version {done.version} of {escape(done.lineage)} is rejected; {serves}.[/]"]
    before = f"version {done.before}" if done.before else "none"
    shown: list[RenderableType] = [
        f"[bold green]Champion of {escape(done.lineage)}: version {done.champion}[/] (before: {before})"
    ]
    if done.left_behind:
        shown += ["It has not learned:", _learned(done.left_behind), _remedy(done.lineage)]
    return shown


def show_left_behind(lineage: str, found: Sequence[Learned]) -> Sequence[RenderableType]:
    """Arrivals that the champion has not learned."""
    if not found:
        return [f"The champion of {escape(lineage)} has learned every accepted arrival."]
    return [heading(f"Left behind in {lineage}"), _learned(found), _remedy(lineage)]


def show_moves(lineage: str, moves: Sequence[Move]) -> Sequence[RenderableType]:
    """The promotion log."""
    table = new_table("when", "what", "version", "champion", "who", "why", right=["version", "champion"])
    for move in moves:
        table.add_row(
            f"{move.when.astimezone():%Y-%m-%d %H:%M:%S}", move.action, move.version, move.champion or "–",
            escape(move.who), escape(move.why),
        )  # fmt: skip
    return [heading(f"Moves of {lineage}"), table]


def _learned(found: Sequence[Learned]) -> RenderableType:
    table = new_table("version", "task", "dataset", right=["version"])
    for each in found:
        table.add_row(each.version, escape(each.task), each.dataset_sha256[:12])
    return table


def _remedy(lineage: str) -> str:
    return f"Learn it again with: deal requeue --learn --lineage {escape(lineage)}"
