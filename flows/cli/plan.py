"""The command that says before a run what it will take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flows.cli.session import FAILED, Debug, Home, Json, session

plan_app = typer.Typer()


@plan_app.command()
def plan(
    spec: Annotated[Path, typer.Argument(help="Spec file (YAML).", show_default=False)],
    device_memory: Annotated[
        str | None,
        typer.Option(
            "--device-memory", help="Plan for another machine: 24GiB, 80GB.", show_default="what is free here"
        ),
    ] = None,
    precision: Annotated[
        str, typer.Option("--precision", help="bf16, fp32 or auto, of the weights there: auto is this machine's.")
    ] = "auto",
    probe: Annotated[
        bool, typer.Option("--probe/--no-probe", help="Take three steps for the time, where the base model is here.")
    ] = True,
    home: Home = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Say what a run will take (memory, steps, time) and whether it fits; fetches no weights and keeps nothing."""
    with session(home, as_json, debug) as deal:
        with deal.screen.working("reading"):
            from flows.server.embedded import calm_libraries
            from tasks.context import current_store
            from tasks.lineage.resolve_spec import spec_from_options
            from tasks.planning import plan as plan_run

            calm_libraries()
            asked = spec_from_options(current_store(), spec, task=None, data=None, test_data=None)
            found = plan_run(
                asked, device_memory=device_memory, precision=precision, probe=probe,  # type: ignore[arg-type]
                on_progress=deal.screen.stage_started,
            )  # fmt: skip
        from flows.cli.tables_plan import show_plan

        deal.screen.result(found.model_dump(mode="json"), *show_plan(found))
        if found.refused:
            raise typer.Exit(FAILED)
