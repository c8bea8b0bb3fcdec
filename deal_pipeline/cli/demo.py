"""The demo: one adapter learns three example domains, one after another, and then wrong labels are held."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pydantic import BaseModel

from deal_core.errors import ConfigError
from deal_core.evaluation.accuracy_matrix import AccuracyMatrix, MatrixJson
from deal_core.judging_config import GateConfig
from flows.adapt import adapt
from flows.adapt_result import AdaptResult
from infra.store.base import ObjectStore
from infra.store.opening import open_store
from infra.versions import Versions, champion_of
from tasks.lineage.record import read_record
from tasks.progress import reporter
from tasks.spec import LineageSpec, parse, read_spec

ORDER = ("bank", "clinic", "parcels")
WRONG_MONTH = "bank/july_slipped.jsonl"
"""Rows of a task that is known by then. Its column of labels slipped by one row."""
NO_GATE = GateConfig(
    min_gain_points=-100.0,
    min_gain_over_champion_points=None,
    max_drop_points=100.0,
    max_mean_drop_points=None,
    max_perplexity_ratio=None,
    max_norm_ratio=None,
)
"""For the lineage to compare with: a gate would reject what forgets, and the next arrival would not continue it."""
PLAIN_NAME = "plain LoRA"


class LineageOutcome(BaseModel, frozen=True):
    """The result of one lineage of the demo."""

    lineage: str
    strategy: str
    champion: str | None
    """The version that serves; None: no version passed the gate."""
    matrix: MatrixJson | None
    """The newest version's accuracy matrix, whether the gate accepted it or not."""
    runs: tuple[AdaptResult, ...]
    """The adaptations, in their order."""


class DemoResult(BaseModel, frozen=True):
    """The end of the demo."""

    outcomes: tuple[LineageOutcome, ...]
    picture: Path | None = None
    """The PNG with the accuracy matrix; None: no version passed the gate."""

    @property
    def rejected(self) -> bool:
        """Whether the gate rejected a version of the lineage that the demo is about."""
        return any(run.rejected for run in self.outcomes[0].runs)


async def run_demo(
    *, picture: Path, compare: bool, base_model: str | None = None, examples: Path | None = None
) -> DemoResult:
    """Learn the example domains one after another. Then wrong labels arrive, and are held before any training.

    Args:
        picture: file for the picture of the result (PNG).
        compare: also train plain continued LoRA on the same arrivals, in a second lineage without a gate.
        base_model: base model; None: the one that the examples name.
        examples: folder of the example domains; None: the project's.

    Raises:
        ConfigError: the examples are missing, or the picture cannot be written.
        DataValidationError: A file of the examples is refused.
    """
    _make_room(picture)
    package = Path(__file__).parents[1]
    installed, checkout = package / "examples", package.parent / "examples"
    folder = examples or (installed if installed.is_dir() else checkout)
    if not folder.is_dir():
        raise ConfigError(f"The demo's example data is not in {folder}; install the project again, or use a checkout.")
    specs = [read_spec(folder / name / "spec.yaml") for name in ORDER]
    # the first example's settings are those of all arrivals
    settings = {name: getattr(specs[0], name) for name in LineageSpec.model_fields}
    settings["base_model"] = base_model or specs[0].base_model
    own = {"lineage": "demo", "strategy": "deal", "gate": replace(specs[0].gate, arrival="hold")}
    lineages = [parse(LineageSpec, {**settings, **own}, "options")]
    if compare:
        plain = {"lineage": "demo-seq-lora", "strategy": "seq_lora", "gate": NO_GATE}
        lineages.append(parse(LineageSpec, {**settings, **plain}, "options"))
    runs: dict[str, list[AdaptResult]] = {lineage.lineage: [] for lineage in lineages}
    for number, spec in enumerate(specs, start=1):
        reporter().said(f"\nArrival {number} of {len(specs)}: {spec.task.name}")
        for lineage in lineages:
            if compare:
                reporter().said(f"Lineage {lineage.lineage} ({lineage.strategy})")
            runs[lineage.lineage].append(await adapt(lineage.with_task(spec.task)))
    is_known = not any(run.rejected for run in runs["demo"])
    if is_known and (folder / WRONG_MONTH).is_file():  # examples of one's own need not have it
        month = specs[0].task.model_copy(update={"data": str(folder / WRONG_MONTH), "test_data": None})
        reporter().said(f"\nOne more month of {month.name}, with wrong labels")
        runs["demo"].append(await adapt(lineages[0].with_task(month)))
    store = open_store()
    outcomes = tuple(_outcome(store, lineage, runs[lineage.lineage]) for lineage in lineages)
    return DemoResult(outcomes=outcomes, picture=_draw(outcomes, picture))


def _outcome(store: ObjectStore, lineage: LineageSpec, runs: Sequence[AdaptResult]) -> LineageOutcome:
    versions = Versions(store).all(lineage.lineage)
    champion = champion_of(versions)
    newest = versions[-1:]  # even if rejected: lineages are compared on the same arrivals
    matrix = read_record(store, newest[0]).matrix if newest else None
    return LineageOutcome(
        lineage=lineage.lineage,
        strategy=str(lineage.strategy),
        champion=champion.version if champion else None,
        matrix=matrix.to_json() if matrix else None,
        runs=tuple(runs),
    )


def _make_room(picture: Path) -> None:
    """Check before the work whether the picture can be drawn and written."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("The demo's picture needs matplotlib, which is not installed here; pip install matplotlib.")
    try:
        picture.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"The picture cannot go to {picture} ({error.strerror}); give another --picture.") from None
    if picture.is_dir() or not os.access(picture.parent, os.W_OK):
        raise ConfigError(f"The picture cannot go to {picture}; give the path of a file that can be written.")


def _draw(outcomes: Sequence[LineageOutcome], picture: Path) -> Path | None:
    """Draw the first lineage's matrix, and next to it the second's if both learned the same tasks."""
    matrices = [AccuracyMatrix.from_json(outcome.matrix) if outcome.matrix else None for outcome in outcomes]
    first, rival = [*matrices, None][:2]
    if first is None:
        return None
    from infra.report.figures import result_figure, save_png

    if rival is not None and rival.tasks != first.tasks:
        rival = None
    save_png(result_figure(first, rival, name=outcomes[0].strategy, rival_name=PLAIN_NAME), picture)
    return picture
