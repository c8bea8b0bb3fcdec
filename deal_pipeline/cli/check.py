"""Commands before a run: `deal init` writes its spec, `deal check` reads its rows and plans it."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from rich.console import RenderableType
from rich.markup import escape
from typer import Argument, Option

from deal_core.errors import ConfigError
from deal_core.safe_text import listed
from deal_pipeline.cli.console import home_option
from deal_pipeline.cli.render import heading, render, size_text
from deal_pipeline.cli.session import CommandResult, Session, Settings, SpecLineage, command, main_app

if TYPE_CHECKING:
    from deal_pipeline.results import CheckedRows
    from tasks.planning import PlanResult
    from tasks.references import ScoredArrival
    from tasks.validate import ShownRow, ValidateResult

_SHOWN_CHARS = 1000
_SHOWN_LABELS = 20
_SPEC = """\
# yaml-language-server: $schema={schema}
# Check it with `deal check {out} --plan`, learn it with `deal adapt {out}`.
# Every other setting has a default: after the first run, `deal lineage show NAME` prints all of them.
{values}# What more a task can say:
#   test_data: test.jsonl    # without it, a part of the rows becomes test rows
#   instruction: {instruction}
#   labels: {labels}
# Tasks of one lineage share one adapter. Its base model is fixed by its first arrival:
# base_model: smollm2-135m-instruct    # a Hub id, a local folder or a GGUF file
"""


@dataclass(frozen=True, kw_only=True)
class NewSpec:
    """A spec that was written, and the rows that it is for."""

    spec: str | None
    """Path of the spec; None: the rows are refused, and no spec was written."""
    data: ValidateResult
    """The checks of the rows."""


@command(
    main_app,
    "reading",
    "deal init bank.csv",
    "deal init bank.csv --task bank --out bank.yaml",
    works_without_home=True,
)
def init(
    deal: Session,
    file: Annotated[str, Argument(help="Rows: a file, folder, pattern or address.")],
    task: Annotated[str | None, Option("--task", "-t", help="Name of the task.", show_default="the file's")] = None,
    lineage: SpecLineage = None,
    settings: Settings = None,
    out: Annotated[Path, Option("--out", "-o", help="The new spec.")] = Path("spec.yaml"),
) -> CommandResult[NewSpec]:
    """Write a spec for a file of rows."""
    import yaml

    from tasks.lineage.settings import parse_settings
    from tasks.spec import SPEC_SCHEMA
    from tasks.validate import spec_to_check, validate

    name = re.sub(r"[^a-z0-9_-]+", "-", Path(file).stem.lower()).strip("-_") or "task" if task is None else task
    store = deal.store
    full_spec, _ = spec_to_check(store, file, task=name, lineage=lineage, settings=settings or ())
    data = validate(store, full_spec, on_progress=lambda done: deal.screen.advanced("reading", done, None))
    if not data.accepted:
        return CommandResult(NewSpec(spec=None, data=data), show_validation(data), failed=True)
    # a path in a spec is relative to the spec's folder
    path = file if "://" in file else os.path.relpath(file, out.absolute().parent)
    overrides = parse_settings(settings or ())
    task_values = {"name": name, "data": path, **overrides.get("task", {})}
    values = {"lineage": full_spec.lineage, **overrides, "task": task_values}
    labels = yaml.safe_dump(
        list(data.labels or ("yes", "no")), default_flow_style=True, allow_unicode=True, width=10**6
    )
    text = _SPEC.format(
        schema=SPEC_SCHEMA,
        out=out,
        values=yaml.safe_dump(values, sort_keys=False, allow_unicode=True),
        instruction="Choose the topic of the message." if data.labels else "Answer the question.",
        labels=labels.strip(),
    )
    try:
        with out.open("x", encoding="utf-8") as spec:
            spec.write(text)
    except FileExistsError:
        raise ConfigError(f"{out} is there already; give another file with --out.") from None
    option, spec_file = home_option(deal.home), shlex.quote(str(out))
    return CommandResult(
        NewSpec(spec=str(out), data=data),
        [
            escape(f"{out}: task {name}, {data.num_train} training rows, {data.num_test} test rows, {data.shape}."),
            escape(f"Look at it, then: deal check {spec_file} --plan{option}, and: deal adapt {spec_file}{option}"),
        ],
    )


@command(
    main_app,
    None,
    "deal check bank.csv --task bank",
    "deal check spec.yaml --plan",
    "deal check june.csv --spec spec.yaml",
)
def check(
    deal: Session,
    what: Annotated[
        str, Argument(metavar="FILE|SPEC", help="Rows: a file, folder, pattern or address. Or a spec (.yaml).")
    ],
    spec: Annotated[
        Path | None, Option(help="With a file: the spec whose task and settings apply.", show_default=False)
    ] = None,
    task: Annotated[
        str | None,
        Option("--task", "-t", help="Task of the file.", show_default="task.yaml in the file's folder"),
    ] = None,
    test_data: Annotated[str | None, Option(help="File or folder of test rows.", show_default="the spec's")] = None,
    lineage: SpecLineage = None,
    settings: Settings = None,
    with_model: Annotated[
        bool, Option("--with-model", help="Also let the base model look for wrong labels; takes time.")
    ] = False,
    score: Annotated[
        bool,
        Option("--score/--no-score", help="Let the champion answer the rows, if it knows the task; takes time."),
    ] = True,
    plan: Annotated[
        bool, Option("--plan", help="Also say what a run takes (memory, steps, time) and whether it fits.")
    ] = False,
    device: Annotated[
        str | None,
        Option(
            metavar="[Nx ]NAME [MEMORY]",
            help='With --plan: plan for other devices: "1x A100 80GB", "24GB", "cpu 16GB".',
            show_default="what is free here",
        ),
    ] = None,
    probe: Annotated[
        bool,
        Option("--probe/--no-probe", help="With --plan: time three training steps, if the base model is here."),
    ] = True,
) -> CommandResult[CheckedRows]:
    """Check rows as a run would; with --plan, also what the run takes.

    Nothing is stored, and no weights are fetched.
    """
    file: str | None = what
    if what.endswith((".yaml", ".yml")):
        if spec is not None or task is not None:
            raise ConfigError(f"{what} is a spec, which names its task and file; --spec and --task go with a file.")
        file, spec = None, Path(what)
    if not plan and (device is not None or not probe):
        raise ConfigError("--device and --no-probe go with --plan.")
    if plan and file is not None and spec is None and task is None:
        raise ConfigError("--plan needs the task: give --task NAME, or a spec.")
    with deal.screen.working("checking"):
        from tasks.validate import spec_to_check

        full_spec, task_file = spec_to_check(
            deal.store, file, spec=spec, task=task, lineage=lineage, test_data=test_data, settings=settings or ()
        )
        checked = deal.service.check(
            full_spec, task_file, with_model=with_model, score=score, plan=plan, device=device, probe=probe
        )
    shown = [*show_validation(checked.data), *(show_arrival(checked.arrival) if checked.arrival else [])]
    if checked.plan is None:
        return CommandResult(checked, shown, failed=not checked.data.accepted)
    shown += [heading("What a run takes"), *_show_plan(checked.plan)]
    return CommandResult(checked, shown, failed=checked.plan.refused)


def show_arrival(arrival: ScoredArrival) -> Sequence[RenderableType]:
    """What the champion answers to rows that it has not learned."""
    colour = "green" if arrival.score.verdict == "as expected" else "yellow"
    sentence = arrival.sentence[0].upper() + arrival.sentence[1:]
    return [f"[{colour}]{escape(sentence)}[/]", *render(arrival.contradictions)]


_VERDICTS = {
    "fits": "[bold green]fits[/]",
    "tight": "[bold yellow]fits, with less than a tenth to spare[/]",
    "refused": "[bold red]cannot fit[/]",
}


def _show_plan(plan: PlanResult) -> Sequence[RenderableType]:
    total = sum(plan.parameters.values())
    kinds = ", ".join(f"{count / 1e6:,.1f} M {kind}" for kind, count in plan.parameters.items() if count)
    rehearsed = f" and {plan.rehearsed_per_step} rehearsed" if plan.rehearsed_per_step else ""
    kept = f"; {plan.num_kept} are kept for later arrivals" if plan.num_kept else ""
    chosen = f" ({plan.num_chosen} chosen)" if plan.num_chosen < plan.num_train else ""
    source = "of these rows" if plan.lengths_from == "rows" else "by the spec's limits"
    shown: list[RenderableType] = [
        f"Base model  {escape(plan.base)} ({escape(plan.model_type)}, {plan.precision}): "
        f"{total / 1e6:,.1f} M parameters: {kinds}",
        f"Adapter     {plan.strategy}, rank {plan.rank}: {plan.adapter_parameters / 1e6:,.2f} M parameters",
        f"Rows        {plan.num_train} training{chosen}, {plan.num_test} test, {plan.num_rejected} bad; "
        f"{plan.rows_per_step} a step{rehearsed}{kept}",
        f"Longest     {plan.longest_row_tokens} tokens, {plan.longest_answer_tokens} of them answer, {source}; "
        f"{plan.batch_rows} rows at once",
        f"Steps       {plan.num_steps}, rate {plan.learning_rate:g} at first" + _expected_time(plan),
    ]
    memory = {**plan.memory, "all": plan.total_bytes}
    shown += [
        *render(
            [{"kind": kind, "size": size_text(size)} for kind, size in memory.items()], "Memory at the peak of a step"
        ),
        f"It {_VERDICTS[plan.verdict]}: {size_text(plan.total_bytes)} of {size_text(plan.device_bytes)} "
        f"({escape(plan.device)}).",
    ]
    if plan.refused:
        shown += _remedies(plan)
    return [*shown, *(f"[yellow]{escape(note)}[/]" for note in plan.notes)]


def _expected_time(plan: PlanResult) -> str:
    if plan.expected_seconds is None or plan.seconds_per_step is None:
        return ""
    minutes, seconds = divmod(round(plan.expected_seconds), 60)
    length = f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
    return f", about {length} of training ({plan.seconds_per_step:.2f} s a step, from a probe)"


def _remedies(plan: PlanResult) -> list[RenderableType]:
    certain = sum(plan.memory[kind] for kind in ("weights", "adapter", "optimiser"))
    shown: list[RenderableType] = []
    if certain > plan.device_bytes:
        shown.append(f"Weights, adapter and optimiser alone take {size_text(certain)}, whatever the batch.")
    shown += render(plan.remedies, "What to change")
    if not any(remedy.fits for remedy in plan.remedies):
        shown.append("No setting makes it fit: take a smaller base model, or a device with more memory.")
    return shown


def _show_row(row: ShownRow) -> Sequence[RenderableType]:
    def shown(text: str) -> str:
        is_short = len(text) <= _SHOWN_CHARS
        return escape(text if is_short else f"{text[: _SHOWN_CHARS // 2]} … {text[-_SHOWN_CHARS // 2 :]}")

    worse = [f"rather than:[red]{shown(row.rejected)}[/]"] if row.rejected is not None else []
    note = [f"[yellow]{escape(row.note)}[/]"] if row.note else []
    return [f"{shown(row.prompt)}[green]{shown(row.answer)}[/]", *worse, *note]


def show_validation(result: ValidateResult) -> Sequence[RenderableType]:
    """The result of the checks of a file."""
    verdict = "[green]can be adapted[/]" if result.accepted else "[red]is refused[/]"
    shown: list[RenderableType] = [
        f"{escape(result.file)} {verdict}: {result.num_read} rows read, {result.num_train} training, "
        f"{result.num_test} test, {result.num_rejected} bad"
        + (f"; {result.num_turns} training rows are earlier turns of chats" if result.num_turns else ""),
        *(
            [
                f"{result.num_several} rows have several right answers: the first one is learned, and the metric takes "
                "the best of them"
            ]
            if result.num_several
            else []
        ),
        *([f"settings of {escape(result.task_file)} apply"] if result.task_file else []),
        f"recognised as {escape(result.shape or 'no known shape: no row can be read')}",
        f"format {result.format}" + (f", labels {escape(listed(result.labels))}" if result.labels else ""),
    ]
    if result.example:
        shown += [heading("One row as the model sees it"), *_show_row(result.example)]
    shown += render(result.bad_rows, f"Bad rows (the first {len(result.bad_rows)})")
    if result.label_check is not None:
        shown.append(escape(result.label_check))
    wrong = result.likely_wrong[:_SHOWN_LABELS]
    shown += render(wrong, f"Labels to look at (the first {len(wrong)}; --json has all)")
    shown += [f"[yellow]{escape(warning)}[/]" for warning in result.warnings]
    if result.refusal:
        shown.append(f"[red]{escape(result.refusal)}[/]")
    return shown
