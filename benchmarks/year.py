"""A year of one lineage: twelve monthly arrivals of five departments, and what happens to them.

    python -m benchmarks.year run        # about half an hour on two cores; benchmarks/results/year.json
    python -m benchmarks.year page       # docs/year.md and docs/img/year.png from the stored figures

Each month one department sends its messages (`benchmarks.year_rows`), and one command learns them. In May the column of
labels has slipped by one row. In October the rows that came in September have to go, from the weights too. In November
a person takes a version back. In December everything that is left is learned together. A task's 60 test rows land with
its first arrival; they have wordings that the first arrival lacks.

A run that was stopped goes on where it was. Remove its folder to begin anew.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from benchmarks.output import DEAL, RESULTS, Base, Out, bare_environment, read, templates, write_result
from benchmarks.year_rows import DEPARTMENTS, INSTRUCTION, TASKS, messages, slipped
from deal_core.base_model.sources import DEFAULT_BASE
from infra.report.figures import COLOURS, MARKERS, MUTED, new_figure, save_png, spread, tidy

LINEAGE = "city"
NUM_TEST = 60
FOLDER = Path("build/year")
FIGURES = RESULTS / "year.json"
PAGE, PICTURE = Path("docs/year.md"), Path("docs/img/year.png")
REFUSALS = {"held": "held: wrong labels", "rejected": "rejected by the gate"}
REFUSED = COLOURS[1]
app = typer.Typer(no_args_is_help=True, help=__doc__)


@dataclass(frozen=True)
class Arrival:
    """The messages of a month."""

    month: str
    task: str
    num_rows: int
    is_slipped: bool = False
    """Whether each row has the label of the row before it."""


@dataclass(frozen=True)
class Event:
    """What a person does after a month's arrival."""

    month: str
    name: str
    """The words of its mark in the picture."""
    command: str
    """The name of a month stands for the digest of that month's dataset."""


YEAR: Sequence[Arrival | Event] = (
    Arrival("January", "transit", 80),
    Arrival("February", "water", 80),
    Arrival("March", "library", 80),
    Arrival("April", "transit", 40),
    Arrival("May", "water", 40, is_slipped=True),
    Arrival("June", "waste", 80),
    Arrival("July", "library", 40),
    Arrival("August", "housing", 80),
    Arrival("September", "waste", 40),
    Arrival("October", "water", 40),
    Event(
        "October",
        "September's rows deleted",
        f"data delete September --relearn --skip-rejected --lineage {LINEAGE} --yes --reason 'a request'",
    ),
    Arrival("November", "transit", 40),
    Event("November", "rolled back", f"version rollback --lineage {LINEAGE} --reason complaints"),
    Arrival("December", "housing", 40),
    Event("December", "all learned together", f"lineage consolidate {LINEAGE} --yes"),
)


@app.command()
def run(
    folder: Annotated[Path, typer.Option(help="Folder of the story: home, rows, log, what is done.")] = FOLDER,
    base: Base = DEFAULT_BASE,
    out: Out = FIGURES,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Setting of all trainings, for a trial.")
    ] = None,
) -> None:
    """Live the year, and write its figures. In a folder with a part of the year, live the rest.

    Raises:
        typer.BadParameter: A command failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    done = folder / "steps.json"
    steps: list[dict[str, Any]] = json.loads(done.read_text()) if done.is_file() else []
    for step in YEAR[len(steps) :]:
        before, begun = steps[-1] if steps else {"champion": None, "accuracies": {}}, time.monotonic()
        if isinstance(step, Arrival):
            spec = write_arrival(folder, step, is_first=step.task not in before["accuracies"], base=base)
            answer = deal(folder, "adapt", str(spec), *(word for each in settings or () for word in ("--set", each)))
        else:
            digests = {earlier["month"]: earlier["dataset"] for earlier in steps if earlier["dataset"]}
            answer = deal(folder, *(digests.get(word, word) for word in shlex.split(step.command)))
            if answer.get("status") == "stopped":  # without the rows it is worse, and a person accepts that
                deal(folder, "lineage", "branch", LINEAGE, "--accept", "--reason", "the rows have to go")
                answer["status"] = "accepted"
        champion, accuracies = champion_now(folder)
        steps.append(
            {
                "month": step.month,
                "task": step.task if isinstance(step, Arrival) else None,
                "num_rows": step.num_rows if isinstance(step, Arrival) else None,
                "event": None if isinstance(step, Arrival) else step.name,
                "status": answer.get("status"),
                "reasons": answer.get("reasons", []),
                "message": (answer.get("message") or "").replace(f"{Path.cwd()}/", ""),
                "dataset": answer["dataset"]["sha256"] if isinstance(step, Arrival) else None,
                "arrival": answer.get("arrival"),
                "champion": champion,
                "is_new": champion != before["champion"],
                "accuracies": accuracies,
                "seconds": round(time.monotonic() - begun, 1),
            }
        )
        done.write_text(json.dumps(steps, indent=1) + "\n")
        typer.echo(f"{step.month:10}{what_happened(steps[-1])}; {steps[-1]['seconds']:.0f} s")
    write_result(out, {"steps": steps})


def write_arrival(folder: Path, arrival: Arrival, *, is_first: bool, base: str) -> Path:
    """Write the files of an arrival; return its spec. The first arrival of a task brings labels and test rows."""
    place = folder / arrival.month.lower()
    place.mkdir(exist_ok=True)
    rows = [*messages(arrival.task, arrival.num_rows, arrival.month, "first" if is_first else "all")]
    if arrival.is_slipped:
        rows = slipped(rows)
    write_rows(place / "rows.jsonl", rows)
    task: dict[str, Any] = {"name": arrival.task, "data": "rows.jsonl"}
    if is_first:
        task["labels"] = [*TASKS[arrival.task]]
        task["instruction"] = INSTRUCTION.format(department=DEPARTMENTS[arrival.task])
        task["test_data"] = "test.jsonl"
        write_rows(place / "test.jsonl", [*messages(arrival.task, NUM_TEST, "test")])
    spec = {
        "schema_version": 1,
        "lineage": LINEAGE,
        "base_model": base,
        "task": task,
        "data": {"include_texts": True},  # the generator's texts are nobody's
        "gate": {"arrival": "hold"},
    }
    (place / "spec.yaml").write_text(yaml.safe_dump(spec, sort_keys=False))
    return place / "spec.yaml"


def write_rows(path: Path, rows: Sequence[Mapping[str, str]]) -> None:
    """Write rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def deal(folder: Path, *words: str) -> Any:
    """Run a command in the story's home; return what it prints as JSON.

    Raises:
        typer.BadParameter: It failed. A version that its gate rejected, and an arrival that is held, are no failure.
    """
    command = [*DEAL, *words, "--home", str((folder / "home").resolve()), "--json"]
    with (folder / "deal.log").open("a") as log:
        log.write(f"deal {' '.join(words)}\n")
        log.flush()
        done = subprocess.run(
            command, env=bare_environment(), stdout=subprocess.PIPE, stderr=log, text=True, check=False
        )
        log.write(done.stdout)
    if done.returncode not in (0, 3):
        raise typer.BadParameter(f"deal {' '.join(words)} failed; {folder / 'deal.log'} says why.")
    return json.loads(done.stdout)


def champion_now(folder: Path) -> tuple[str, dict[str, float]]:
    """Return the champion's number, and its accuracy on each task that it knows."""
    versions = deal(folder, "version", "list", "--lineage", LINEAGE)
    champion = next(version["version"] for version in versions if "champion" in version["since"]["aliases"])
    matrix = deal(folder, "version", "list", "--matrix", "--lineage", LINEAGE)
    scores = dict(zip(matrix["tasks"], matrix["rows"][-1], strict=True))
    return champion, {task: scores[task] for task in TASKS if scores.get(task) is not None}


@app.command()
def page(figures: Annotated[Path, typer.Option(help="The stored figures.")] = FIGURES) -> None:
    """Write the page and the picture from the stored figures."""
    steps = read(figures)["steps"]
    text = (
        templates()
        .get_template("year.md.j2")
        .render(
            steps=[{**step, "what": what_happened(step), "mean": mean_of(step)} for step in steps],
            tasks=[*TASKS],
            minutes=round(sum(step["seconds"] for step in steps) / 60),
            num_test=NUM_TEST,
        )
    )
    PAGE.write_text(text)
    draw(steps, PICTURE)


def mean_of(step: Mapping[str, Any]) -> float:
    """Return the champion's mean accuracy on the tasks that it knows."""
    return sum(step["accuracies"].values()) / len(step["accuracies"])


def what_happened(step: Mapping[str, Any]) -> str:
    """Return what became of a step, in a few words."""
    event = f"{step['event']}: " if step["event"] else ""
    if step["status"] == "held":
        score = step["arrival"]
        agree, reference = round(100 * score["accuracy"]), round(100 * score["reference"])
        return f"held: {agree} % of the labels agree with the champion, reference {reference} %"
    if step["status"] == "rejected":
        return f"{event}rejected by the gate: {' '.join(step['reasons'])}"
    worse = ", accepted by a person, though worse" if step["status"] == "accepted" else ""
    return f"{event}version {step['champion']} is champion{worse}"


def draw(steps: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw the champion's mean accuracy over the steps, with its number at each move, each task's, and each refusal."""
    figure = new_figure(9.6, 5.0)
    axes = figure.subplots()
    tidy(axes)
    ends: dict[str, float] = {}
    for number, task in enumerate(TASKS):
        places = [place for place, step in enumerate(steps) if task in step["accuracies"]]
        values = [100 * steps[place]["accuracies"][task] for place in places]
        if places:  # a year that was stopped lacks some
            axes.plot(
                places, values, color=COLOURS[number], marker=MARKERS[number], markersize=4, linewidth=1, alpha=0.7
            )
            ends[task] = values[-1]
    means = [100 * mean_of(step) for step in steps]
    axes.plot(range(len(steps)), means, color="black", linewidth=2.8)
    names = {"mean": means[-1], **ends}
    for (name, end), height in zip(names.items(), spread([*names.values()], 4.5), strict=True):
        is_mean = name == "mean"
        colour = "black" if is_mean else COLOURS[[*TASKS].index(name)]
        weight = "bold" if is_mean else "normal"
        axes.text(len(steps) - 0.75, height, f"{end:.0f}  {name}", color=colour, weight=weight, va="center", fontsize=9)
    for place, step in enumerate(steps):
        if step["is_new"]:
            axes.plot(place, means[place], color="black", marker="o", markersize=6)
        is_refused = step["status"] in ("held", "rejected")
        if step["event"] or is_refused:
            mark = ": ".join(filter(None, [step["event"], REFUSALS.get(step["status"])]))
            colour = REFUSED if is_refused else MUTED
            axes.axvspan(place - 0.5, place + 0.5, color=colour, alpha=0.1, linewidth=0)
            axes.text(place, 3, mark, rotation=90, ha="center", va="bottom", fontsize=9.5, color=colour, weight="bold")
    labels = [
        f"{'' if step['event'] else step['month'][:3]}\n{step['task'] or ''}\nv{step['champion']}" for step in steps
    ]
    axes.set_xticks(range(len(steps)), labels, fontsize=8)
    axes.set_xlim(-0.5, len(steps) + 0.8)
    axes.set_ylim(0, 103)
    axes.set_ylabel("accuracy of the champion, %")
    axes.set_title("A year of one adapter: each month a department sends messages", loc="left", fontweight="bold")
    save_png(figure, path)


if __name__ == "__main__":
    app()
