"""Commands that show what is there (status, ui), and those around the servers: up, down, register, sync."""

from __future__ import annotations

import asyncio
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast, get_args

import typer
from rich.console import RenderableType
from rich.markup import escape
from typer import Argument, Option

from deal_core.errors import ConfigError
from deal_core.safe_text import listed
from deal_pipeline.cli.console import show_held
from deal_pipeline.cli.render import render
from deal_pipeline.cli.session import CommandResult, Session, command, main_app

if TYPE_CHECKING:
    from deal_pipeline.server.embedded import UiAddress
    from deal_pipeline.server.local_processes import LocalStack
    from deal_pipeline.server.status import LineageStatus, Status
    from tasks.mlflow_mirror import Synced

NOTHING_LEARNED = "Nothing is learned yet. Learn a file with: deal adapt --task NAME --data FILE, or try: deal demo"

Values = Annotated[
    Path | None, Option("--values", help="YAML file with values of the training pool, such as gpu_count: 8.")
]

server_app = typer.Typer(help="Start, stop or sync the servers around the store.", no_args_is_help=True)


@command(server_app, "starting", "deal server up", "deal server up --trainings 2")
def up(
    deal: Session,
    prefect_port: Annotated[int, Option(min=1, max=65535, help="Prefect's port on loopback.")] = 4200,
    mlflow_port: Annotated[int, Option(min=1, max=65535, help="MLflow's port on loopback.")] = 5000,
    trainings: Annotated[
        int, Option(min=1, help="Lineages that may train at the same time; with several GPUs, each on its own.")
    ] = 1,
) -> CommandResult[LocalStack]:
    """Start servers, deployments and workers on this machine. New files in the inbox are then learned automatically."""
    from deal_pipeline.server.local_stack import bring_up

    stack = asyncio.run(
        bring_up(
            deal.home, prefect_port=prefect_port, mlflow_port=mlflow_port, num_trainings=trainings, say=deal.screen.said
        )
    )
    shown = [
        "[bold green]Everything is up.[/] Files that land in the inbox are adapted automatically.",
        f"  runs        {stack.prefect_url}",
        f"  versions    {stack.mlflow_url}",
        "  what waits  deal status",
        "  end it      deal server down",
    ]
    return CommandResult(stack, shown)


@dataclass(frozen=True, kw_only=True)
class EndedProcesses:
    """What `deal server down` has ended."""

    ended: list[str]
    """Names of the processes that still ran."""


@command(server_app, "ending", "deal server down", "deal server down --home /srv/deal", works_without_home=True)
def down(deal: Session) -> CommandResult[EndedProcesses]:
    """End what `deal server up` started, and nothing else."""
    from deal_pipeline.server.local_processes import stop

    ended = stop(deal.home)
    text = f"Ended: {', '.join(ended)}" if ended else "Nothing was running."
    return CommandResult(EndedProcesses(ended=ended), [escape(text)])


@dataclass(frozen=True, kw_only=True)
class Registered:
    """The Prefect server has what it needs."""

    deployed: Literal[True]
    """Pools, automations and deployments are on the server. An error has no result."""


@command(
    server_app,
    "registering",
    "deal server register",
    "PREFECT_API_URL=http://prefect:4200/api deal server register --type kubernetes --values pool.yaml",
)
def register(
    deal: Session,
    pool_type: Annotated[
        str, Option("--type", help="How the training pool starts a run: process, docker or kubernetes.")
    ] = "process",
    values: Values = None,
    replace: Annotated[bool, Option("--replace", help="Overwrite the deployments of another home or store.")] = False,
) -> CommandResult[Registered]:
    """Create pools, automations and deployments on the Prefect server at PREFECT_API_URL."""
    from deal_core.yaml_file import read_yaml
    from deal_pipeline.server.deploy import PoolType, deploy_all

    if pool_type not in get_args(PoolType):
        raise ConfigError(f"--type is {pool_type!r}; give one of {', '.join(get_args(PoolType))}.")
    given = None if values is None else read_yaml(values)
    asyncio.run(deploy_all(deal.home, cast("PoolType", pool_type), values=given, replace=replace))
    return CommandResult(Registered(deployed=True), ["Pools, automations and deployments are on the server."])


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What `deal server manifest` wrote."""

    file: str
    """The file, for `kubectl apply`."""
    objects: list[str]
    """Kind and name of each object in it."""


@command(
    server_app,
    "writing",
    "deal server manifest ray-cluster --values pool.yaml",
    "deal server manifest train-job --values pool.yaml --out job.yaml",
    works_without_home=True,
)
def manifest(
    deal: Session,
    kind: Annotated[str, Argument(help="train-job (Kubeflow Trainer) or ray-cluster (KubeRay).")],
    values: Values = None,
    out: Annotated[Path, Option("--out", "-o", help="The new file.")] = Path("manifest.yaml"),
) -> CommandResult[Manifest]:
    """Write the Kubernetes objects of a training over several machines."""
    import yaml

    from deal_core.yaml_file import read_yaml
    from deal_pipeline.server.deploy import ManifestKind, make_manifests

    if kind not in get_args(ManifestKind):
        raise ConfigError(f"The kind is {kind!r}; give one of {', '.join(get_args(ManifestKind))}.")
    made = make_manifests(cast("ManifestKind", kind), {} if values is None else read_yaml(values))
    out.write_text(yaml.safe_dump_all(made, sort_keys=False, allow_unicode=True), encoding="utf-8")
    names = [f"{item['kind']} {item['metadata']['name']}" for item in made]
    shown = [f"{out} has {listed(names)}. Next: kubectl apply --filename {shlex.quote(str(out))}"]
    return CommandResult(Manifest(file=str(out), objects=names), [escape(line) for line in shown])


@command(main_app, "looking", "deal status", "deal status --check", works_without_home=True)
def status(
    deal: Session,
    check: Annotated[
        bool,
        Option(
            "--check",
            help="Exit with 1 also if an arrival or a run failed, an arrival is held, or a file is skipped.",
        ),
    ] = False,
) -> CommandResult[Status]:
    """Show what runs, waits, failed or is damaged.

    Exit code 1: a process is gone, or data is damaged.
    """
    result = deal.service.status()
    is_broken = bool(result.damaged) or any(not part.is_alive for part in result.parts)
    if check:
        is_broken |= bool(result.problems or result.failed)
        is_broken |= any(state.failed or state.held_arrivals for state in result.lineages)
    return CommandResult(result, _show_status(result), failed=is_broken)


def _show_status(status: Status) -> Sequence[RenderableType]:
    shown: list[RenderableType] = []
    if status.parts:
        shown += render(status.parts, "Processes")
    elif not status.prefect_url:
        shown.append("No server: files are adapted by deal adapt. Start one with: deal server up")
    if not any(state.champion or state.num_open for state in status.lineages):
        shown.append(NOTHING_LEARNED)
    shown += render(status.lineages, "Lineages")
    shown += [f"  {escape(f'{state.lineage}: {state.run}')}" for state in status.lineages if state.run]
    shown += [f"  {escape(f'{state.lineage} {line.line()}')}" for state in status.lineages for line in state.waiting]
    shown += [f"  {escape(line)}" for state in status.lineages if (line := _lost_points(state))]
    shown += [f"  {escape(f'{state.lineage} live: {state.monitor}')}" for state in status.lineages if state.monitor]
    shown += [f"  {escape(f'{state.lineage} rollout: {state.rollout}')}" for state in status.lineages if state.rollout]
    shown += [f"  [yellow]•[/] {escape(state.branch)}" for state in status.lineages if state.branch]
    rejected = [f"{state.lineage}: {state.rejected}" for state in status.lineages if state.rejected]
    shown += [f"  [yellow]•[/] {escape(line)}" for line in rejected]
    behind = {state.lineage: len(state.mlflow_waiting) for state in status.lineages if state.mlflow_waiting}
    shown += [
        f"  {escape(name)}: MLflow lacks {count} {'entry' if count == 1 else 'entries'}; the next run or deal server "
        "sync writes what is missing"
        for name, count in behind.items()
    ]
    shown += [f"  [red]•[/] {escape(problem)}" for state in status.lineages for problem in state.failed]
    shown += [line for state in status.lineages for line in show_held(state.lineage, state.held_arrivals)]
    shown += [f"[red]•[/] {escape(problem)}" for problem in (*status.damaged, *status.problems)]
    for title, runs in (("Running", status.running), ("Waiting", status.waiting), ("Failed, last 24 h", status.failed)):
        shown += render(runs, title)
    return shown


def _lost_points(lineage: LineageStatus) -> str | None:
    """What the champion's tasks have lost since they were learned, in one line; None: nothing is worth a line."""
    lost = [f"{task} {points:.1f}" for task, points in lineage.debts.items() if points > 0]
    budget = "" if lineage.budget_points is None else f" (budget {lineage.budget_points:.1f} points)"
    due = f" The next run consolidates it: {lineage.consolidation}" if lineage.consolidation else ""
    if not lost and not due:
        return None
    sentence = f"points lost since they were learned: {', '.join(lost)}{budget}." if lost else ""
    return f"{lineage.lineage} {sentence}{due}"


@command(main_app, None, "deal ui", "deal ui --open", works_without_home=True)
def ui(
    deal: Session,
    open_: Annotated[bool, Option("--open", help="Start MLflow's own server here and open it.")] = False,
    port: Annotated[int, Option(min=1, max=65535, help="Port on the loopback address.")] = 5000,
) -> CommandResult[UiAddress]:
    """Show where MLflow lists the runs, or open it."""
    from deal_pipeline.server.embedded import open_ui, ui_address
    from tasks.lineage.settings import has_lineage

    address = ui_address(port)
    safe = address.shown()
    shown = [f"MLflow keeps the runs in {safe.tracking_uri}"]
    if not has_lineage(deal.store):
        shown.insert(0, NOTHING_LEARNED)
    if safe.command:
        shown += ["Show them with:", f"  {safe.line()}", f"and open {safe.url}"]
    result = CommandResult(safe, [*map(escape, shown)])
    if open_:
        deal.home.mkdir(parents=True, exist_ok=True)
        deal.show(result)
        raise typer.Exit(open_ui(address))
    return result


@command(server_app, None, "deal server sync", "deal server sync bank support")
def sync(
    deal: Session,
    lineages: Annotated[list[str] | None, Argument(help="Lineages.", show_default="all with a version")] = None,
) -> CommandResult[list[Synced]]:
    """Write into MLflow what it lacks of the store: runs, models, versions and aliases."""
    synced = deal.service.sync(*lineages or ())
    shown = []
    for result in synced:
        name = result.lineage
        shown.append(f"{name}: {listed(result.written) + ' written' if result.written else 'MLflow lacked nothing'}.")
        if result.promoted:
            shown.append(f"{name}: version {result.promoted} is champion, as somebody moved the alias in MLflow.")
        if result.set_back:
            shown.append(f"{name}: {result.set_back}")
        if result.problem:
            shown.append(f"{name}: MLflow still lacks {listed(result.missing)}. {result.problem}")
    return CommandResult(synced, [*map(escape, shown)], failed=any(result.problem for result in synced))
