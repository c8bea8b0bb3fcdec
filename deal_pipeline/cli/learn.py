"""Commands that let a lineage learn: demo and adapt."""

from __future__ import annotations

from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich.console import RenderableType
from rich.markup import escape
from typer import Argument, Option

from deal_core.errors import ConfigError
from deal_pipeline.cli.console import home_option, named_scores, show_adaptation
from deal_pipeline.cli.render import heading, render, render_matrix
from deal_pipeline.cli.session import CommandResult, Session, Settings, SpecLineage, command, main_app

if TYPE_CHECKING:
    from deal_pipeline.cli.demo import DemoResult
    from flows.adapt_result import AdaptResult
    from flows.watch import WatchResult


@command(main_app, "starting", "deal demo", "deal demo --compare")
def demo(
    deal: Session,
    compare: Annotated[
        bool, Option("--compare", help="Also let plain continued LoRA learn the same arrivals, without a gate.")
    ] = False,
    base: Annotated[str | None, Option(help="Another base model.", show_default="smollm2-135m-instruct")] = None,
    picture: Annotated[
        Path | None, Option(help="File for the picture of the result (PNG).", show_default="HOME/demo.png")
    ] = None,
) -> CommandResult[DemoResult]:
    """Learn three example tasks, and show what is kept of each."""

    def start() -> Coroutine[Any, Any, DemoResult]:
        from deal_pipeline.cli.demo import run_demo

        return run_demo(picture=picture or deal.home / "demo.png", compare=compare, base_model=base)

    outcome = deal.run(start, trains=True)
    return CommandResult(outcome, show_demo(outcome, deal.home), rejected=outcome.rejected)


def show_demo(result: DemoResult, home: Path) -> Sequence[RenderableType]:
    """The result of the demo, lineages side by side."""
    shown: list[RenderableType] = []
    comparison = []
    for outcome in result.outcomes:
        if outcome.champion is None:
            shown.append(f"[red]No version of {outcome.lineage} has passed the gate.[/]")
        if outcome.matrix is None:
            continue
        shown += render_matrix(outcome.matrix, f"Accuracy of {outcome.lineage} ({outcome.strategy}), %")
        own: dict[str, str | None] = {
            "lineage": outcome.lineage,
            "strategy": outcome.strategy,
            "champion": outcome.champion,
        }
        comparison.append({**own, **named_scores(outcome.matrix)})
    shown += render(comparison, "In the end, %")
    for outcome in result.outcomes:
        for run in outcome.runs:
            if run.rejected:
                shown += [f"[red]{escape(run.message)}[/]", *(f"  • {escape(reason)}" for reason in run.reasons)]
            if run.status == "held":
                shown += [heading(f"One more month of {run.task}, with wrong labels"), *show_adaptation(run)]
    if result.picture is not None:
        shown.append(f"Picture:      {escape(str(result.picture))}")
    option, first = home_option(home), result.outcomes[0].lineage
    return [
        *shown,
        escape(
            f"Look closer:  deal version list --lineage {first}{option}\n"
            f"              deal ui{option}\n"
            f'              deal predict --lineage {first} --task parcels "My parcel is stuck at customs"{option}'
        ),
    ]


@command(
    main_app, "starting", "deal adapt spec.yaml", "deal adapt --task bank --data bank.csv --set train.num_epochs=1"
)
def adapt(
    deal: Session,
    spec: Annotated[Path | None, Argument(help="Spec file (YAML).", show_default=False)] = None,
    task: Annotated[
        list[str] | None,
        Option("--task", "-t", help="Task of the file. With --watch: only this task's files; repeat it for several."),
    ] = None,
    data: Annotated[
        str | None, Option("--data", "-d", help="File, folder, pattern or address: CSV, JSON lines or Parquet.")
    ] = None,
    test_data: Annotated[str | None, Option(help="File or folder of test rows.")] = None,
    lineage: SpecLineage = None,
    settings: Settings = None,
    force: Annotated[bool, Option("--force", help="Train even if this file was already learned.")] = False,
    watch: Annotated[
        bool, Option("--watch", help="Learn what lands in the inbox (STORE/inbox/TASK/NAME), each file once.")
    ] = False,
    once: Annotated[bool, Option("--once", help="With --watch: learn what is there, then end.")] = False,
    poll: Annotated[
        float | None, Option(min=0.1, help="With --watch: seconds between two looks.", show_default="2.0")
    ] = None,
) -> CommandResult[AdaptResult | Annotated[WatchResult, "with --watch"]]:
    """Train a new version on a file, or on what lands (--watch).

    The lineage's champion learns one arrival, given by a spec or by --task and --data. --set wins over the spec, and
    the spec over the lineage's settings.
    """
    if watch:
        if data is not None or test_data is not None or force:
            raise ConfigError(
                "--watch learns what lands in the inbox; it goes without --data, --test-data and --force."
            )
        from tasks.lineage.settings import watched_from_options

        watched = watched_from_options(deal.store, spec, tasks=task or None, lineage=lineage, settings=settings or ())
        result = deal.lineage(watched.lineage).watch(watched, once=once, poll_seconds=poll or 2.0)
        return CommandResult(
            result, show_watch(result), failed=result.num_refused > 0, rejected=result.num_rejected > 0
        )
    if once or poll is not None or (task is not None and len(task) > 1):
        raise ConfigError("--once, --poll and several tasks go with --watch; one adaptation has one task.")
    from tasks.lineage.settings import spec_from_options

    adapt_spec = spec_from_options(
        deal.store,
        spec,
        task=task[0] if task else None,
        data=data,
        test_data=test_data,
        lineage=lineage,
        settings=settings or (),
    )

    if lineage is None and spec is None:
        deal.screen.said(f"Lineage {adapt_spec.lineage} learns {adapt_spec.task.name}.")

    outcome = deal.lineage(adapt_spec.lineage).learn(adapt_spec, force=force)
    return CommandResult(outcome, show_adaptation(outcome), rejected=outcome.rejected or outcome.status == "held")


def show_watch(result: WatchResult) -> Sequence[RenderableType]:
    """The files that a watch has handled."""
    if not result.files:
        return ["Nothing is due. What waits: deal status"]
    return render(result.files, f"Handled for {result.lineage}")
