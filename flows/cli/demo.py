"""The demo: three example domains arrive one after another, and one adapter learns each."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml
from pydantic import BaseModel

from deal_core.errors import ConfigError
from deal_core.evaluation.accuracy_matrix import AccuracyMatrix, MatrixJson
from deal_core.judging_config import GateConfig
from flows.adapt import AdaptResult, Scores
from flows.watch import WatchResult, watch
from infra.store.base import ObjectStore
from infra.store.keys import INBOX, TASK_FILE
from infra.versions import Versions
from tasks.context import current_store
from tasks.lineage.record import read_record
from tasks.lineage.settings import WatchedLineage
from tasks.progress import reporter
from tasks.spec import AdaptSpec, LineageSpec, TaskFields, parse, read_spec

ORDER = ("bank", "clinic", "parcels")
POLL_SECONDS = 0.2
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
    scores: Scores | None
    runs: tuple[AdaptResult, ...]
    """The adaptations, in their order."""
    refused: tuple[str, ...]
    """Messages about files that could not be used."""


class DemoResult(BaseModel, frozen=True):
    """The end of the demo."""

    outcomes: tuple[LineageOutcome, ...]
    picture: Path | None = None
    """The PNG with the accuracy matrix; None: no version passed the gate."""

    @property
    def rejected(self) -> bool:
        """Whether the gate rejected a version of the lineage that the demo is about."""
        return any(run.rejected for run in self.outcomes[0].runs)

    @property
    def failed(self) -> bool:
        """Whether a file was refused or its run failed."""
        return any(outcome.refused for outcome in self.outcomes)


async def run_demo(
    *, picture: Path, compare: bool, base_model: str | None = None, examples: Path | None = None
) -> DemoResult:
    """Put the example domains into the inbox one by one, and watch the inbox.

    Args:
        picture: file for the picture of the result (PNG).
        compare: also train plain continued LoRA on the same arrivals, in a second lineage without a gate.
        base_model: base model; None: the one that the examples name.
        examples: folder of the example domains; None: the project's.

    Raises:
        ConfigError: the examples are missing, the picture cannot be written, or the inbox holds other files under the
            names of the demo's files.
    """
    _make_room(picture)
    folder = examples or _examples_folder()
    specs = [_read_example(folder / name) for name in ORDER]
    lineages = [_lineage_of(specs[0], "demo", "deal", base_model)]
    if compare:
        plain = _lineage_of(specs[0], "demo-seq-lora", "seq_lora", base_model)
        lineages.append(plain.model_copy(update={"gate": NO_GATE}))
    store = current_store()
    watched: dict[str, list[WatchResult]] = {lineage.lineage: [] for lineage in lineages}
    files = {spec.task.name: _files_of(spec) for spec in specs}
    all_files = {key: content for each in files.values() for key, content in each.items()}
    _refuse_foreign(store, all_files)
    _clear(store, all_files)  # files of a demo that was stopped
    for number, spec in enumerate(specs, start=1):
        reporter().said(f"\nArrival {number} of {len(specs)}: {spec.task.name}")
        for key, content in files[spec.task.name].items():
            store.put_bytes(key, content)
        for lineage in lineages:
            if compare:
                reporter().said(f"Lineage {lineage.lineage} ({lineage.strategy})")
            watched[lineage.lineage].append(
                await watch(lineage, tasks=(spec.task.name,), once=True, poll_seconds=POLL_SECONDS)
            )
    _clear(store, all_files)  # so that other lineages that watch this inbox do not learn the demo
    outcomes = tuple(_outcome(store, lineage, watched[lineage.lineage]) for lineage in lineages)
    return DemoResult(outcomes=outcomes, picture=_draw(outcomes, picture))


def _examples_folder() -> Path:
    """The examples are in flows/ once installed, and next to the packages in a checkout."""
    installed = Path(__file__).parents[1] / "examples"
    return installed if installed.is_dir() else Path(__file__).parents[2] / "examples"


def _read_example(folder: Path) -> AdaptSpec:
    if not folder.is_dir():
        raise ConfigError(f"The demo's example data is not in {folder}; install the project again, or use a checkout.")
    return read_spec(folder / "spec.yaml")


def _lineage_of(spec: AdaptSpec, lineage: str, strategy: str, base_model: str | None) -> WatchedLineage:
    values = {name: getattr(spec, name) for name in LineageSpec.model_fields}
    changed = {"lineage": lineage, "strategy": strategy, "base_model": base_model or spec.base_model}
    return parse(WatchedLineage, {**values, **changed}, "options")


def _outcome(store: ObjectStore, lineage: LineageSpec, watched: list[WatchResult]) -> LineageOutcome:
    versions = Versions(store).all(lineage.lineage)
    champion = next((version for version in versions if "champion" in version.aliases), None)
    newest = versions[-1:]  # even if rejected: lineages are compared on the same arrivals
    matrix = read_record(store, newest[0].adapter_uri).matrix if newest else None
    return LineageOutcome(
        lineage=lineage.lineage,
        strategy=lineage.strategy,
        champion=champion.version if champion else None,
        matrix=matrix.to_json() if matrix else None,
        scores=Scores.of(matrix) if matrix else None,
        runs=tuple(run for result in watched for run in result.runs),
        refused=tuple(
            seen.message for result in watched for seen in result.files if seen.outcome in ("refused", "failed")
        ),
    )


def _files_of(spec: AdaptSpec) -> dict[str, bytes]:
    """An example's files by key, in the order in which a user would put them: first the task file, last the rows."""
    folder = f"{INBOX}/{spec.task.name}"
    data, test_data = Path(str(spec.task.data)), spec.task.test_data and Path(str(spec.task.test_data))
    fields = TaskFields(**spec.task.given()).model_dump(mode="json", exclude_unset=True)
    files = {}
    if test_data:
        fields["test_data"] = test_data.name
        files[f"{folder}/{test_data.name}"] = test_data.read_bytes()
    task_file = yaml.safe_dump(fields, allow_unicode=True, sort_keys=False).encode()
    return {f"{folder}/{TASK_FILE}": task_file, **files, f"{folder}/{data.name}": data.read_bytes()}


def _refuse_foreign(store: ObjectStore, files: Mapping[str, bytes]) -> None:
    """Refuse to start if a demo file would overwrite a user's file."""
    for key, content in files.items():
        if store.exists(key) and store.get_bytes(key) != content:
            raise ConfigError(
                f"{store.uri_of(key)} is not the demo's own file, and the demo would overwrite it; "
                "run the demo in another home (--home) or store, or move the file away."
            )


def _clear(store: ObjectStore, files: Mapping[str, bytes]) -> None:
    """Remove the demo's files from the inbox. A file that a user has replaced stays."""
    for key, content in files.items():
        if store.exists(key) and store.get_bytes(key) == content:
            store.delete(key)


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
    matrices = [AccuracyMatrix.from_json(each.matrix) if each.matrix else None for each in outcomes]
    first, rival = [*matrices, None][:2]
    if first is None:
        return None
    from infra.report.figures import result_figure, save_png

    if rival is not None and rival.tasks != first.tasks:
        rival = None
    save_png(result_figure(first, rival, name=outcomes[0].strategy, rival_name=PLAIN_NAME), picture)
    return picture
