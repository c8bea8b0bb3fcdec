"""Choose the rows of an arrival that are trained on: noise gate, score, then the largest scores of each label.

The parent scores the rows: the model before the arrival. The first arrival of a lineage has no parent, and the base
model's scores would say how odd the form of an answer is, so its rows are chosen at random.

Shapes: N candidate rows.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from datasets import Dataset
from torch import Tensor

from deal_core.adapter.files import digests_of, sha256_together
from deal_core.adapter.state import adapter_on, load_method_state
from deal_core.base_model.load import BaseModel
from deal_core.data.row_warnings import balance_warning
from deal_core.data.schema import TaskSchema
from deal_core.errors import AdapterStateError, ConfigError
from deal_core.evaluation.generation import OnCount, counting
from deal_core.evaluation.likelihood import measure
from deal_core.method_config import SelectionConfig
from deal_core.regular_file import complete_file
from deal_core.safe_text import listed
from deal_core.schema_version import VersionedJson
from deal_core.selection import score_class
from deal_core.selection.label_noise import check_labels
from deal_core.selection.score import Candidates, RandomScore
from deal_core.strategies.strategy import SEED_STRIDE
from deal_core.training.train import TrainingSetup

SCORE_SEED = 7_919
"""Distance between the seed of the sample and that of the score."""
MAX_NAMED = 10
"""Suspected rows that a note names."""


@dataclass(frozen=True, kw_only=True)
class ChosenRows(VersionedJson, what="selection.json", error=AdapterStateError, version=1):
    """The rows that are trained on. A file keeps them, so a resumed run trains on the same rows."""

    key: str
    """Digest of all that decides the choice: settings, seed, number of rows, task and parent."""
    rows: tuple[int, ...]
    """Numbers of the training rows, ascending from 0."""
    notes: tuple[str, ...]
    """What was chosen and why, for people."""


def choose_rows(
    rows: Dataset,
    setup: TrainingSetup,
    cached_base: Callable[[], BaseModel],
    *,
    parent_folder: Path | None,
    journal: Path,
    on_progress: OnCount = lambda done, total: None,
) -> ChosenRows:
    """Choose training rows by `setup.method.selection`. A second call with the same arguments reads the first's choice.

    Args:
        rows: All training rows, with the columns input and output, and sha256 if notes are to name rows by it.
        setup: The training.
        cached_base: Returns the base model without an adapter. It is called only if a model reads rows.
        parent_folder: The parent's adapter; None for the first task of a lineage.
        journal: The file of the choice. It must outlive the run's checkpoints.
        on_progress: Called with the number of rows that the model has read, and the number that it will read.

    Raises:
        ConfigError: The score is not known or cannot be used, or it returns something else than a number for each row.
        AdapterStateError: The parent's adapter does not fit the base.
    """
    parent = None if parent_folder is None else sha256_together(digests_of(parent_folder))
    deciding = [asdict(setup.method.selection), setup.train.deciding(), len(rows), setup.task.sha256, parent]
    key = hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()
    if journal.is_file():
        chosen = ChosenRows.from_json(json.loads(journal.read_bytes()))
        if chosen.key == key:
            return chosen
    numbers, notes = _choose(rows, setup, cached_base, parent_folder, on_progress)
    chosen = ChosenRows(key=key, rows=tuple(numbers), notes=tuple(notes))
    with complete_file(journal) as part:
        part.write_text(json.dumps(chosen.to_json()), encoding="utf-8")
    return chosen


def rows_read(setup: TrainingSetup, num_rows: int, *, has_parent: bool) -> int:
    """Return how many of `num_rows` rows a model reads before the training; 0 if the choice needs no model.

    If labels are checked and the score reads the model, the rows are read twice.
    """
    config = setup.method.selection
    measures = config.keep is not None and has_parent and score_class(config.score).reads_model
    checks_labels = config.noise != "none" and bool(setup.task.labels)
    return min(num_rows, _most_read(config, num_rows)) * (measures + checks_labels)


def _most_read(config: SelectionConfig, num_rows: int) -> int:
    """Return the most rows that a model reads to choose among `num_rows`."""
    return max(config.max_scored, 0 if config.keep is None else config.num_kept(num_rows))


def _choose(
    rows: Dataset,
    setup: TrainingSetup,
    cached_base: Callable[[], BaseModel],
    parent_folder: Path | None,
    on_progress: OnCount,
) -> tuple[list[int], list[str]]:
    """The numbers of the chosen rows in order, and notes."""
    config, task, train = setup.method.selection, setup.task, setup.train
    labels = [str(label) for label in rows["output"]] if task.labels else None
    score = score_class(config.score)(config.score_options)
    lacks_parent = score.reads_model and parent_folder is None
    if lacks_parent:
        score = RandomScore()
    num_arrivals = 0 if parent_folder is None else load_method_state(parent_folder).num_arrivals
    seed = train.seed + SEED_STRIDE * num_arrivals
    measures = config.keep is not None and score.reads_model
    checks_labels = config.noise != "none" and labels is not None

    # of too many rows, the model reads a random sample
    numbers, limit = list(range(len(rows))), _most_read(config, len(rows))
    if (measures or checks_labels) and len(rows) > limit:
        everything = Candidates(rows=rows, task=task, measured=None, seed=seed)
        numbers = pick_rows(RandomScore().score(everything), labels, limit)

    # noise gate: rows whose label is probably wrong are named, and maybe left out
    left_out: set[int] = set()
    about_labels: list[str] = []
    if config.noise != "none" and labels is None:
        about_labels.append(f"no label was checked: task {task.name!r} has none")
    elif labels is not None and config.noise != "none":
        checked = check_labels(cached_base(), task, rows.select(numbers), train, on_progress)
        suspects = {numbers[suspect.row]: suspect for suspect in checked.suspects}
        if config.noise == "leave_out":
            left_out = {*suspects}
        named = [
            f"{_name_of(rows, number)} ({suspect.label}, likelier {suspect.likelier})"
            for number, suspect in suspects.items()
        ]
        which = f": {listed(named, most=MAX_NAMED, width=200)}" if named else ""
        about_labels.append(checked.describe() + (", and left out" if left_out else "") + which)
        if rare := balance_warning(_counts(labels, task)):
            about_labels.append(rare)
    if config.keep is None:
        return [number for number in range(len(rows)) if number not in left_out], about_labels

    # score: the parent reads the remaining rows if the score needs it
    numbers = [number for number in numbers if number not in left_out]
    some, measured = rows.select(numbers), None
    if measures:
        base = cached_base()
        with adapter_on(base.model, parent_folder) as model:
            measured = measure(
                model,
                base.tokenizer,
                task,
                some,
                max_prompt_tokens=train.max_prompt_tokens,
                max_answer_tokens=train.answer_tokens(task.labels),
                on_progress=counting(on_progress, len(numbers)),
            )
    candidates = Candidates(rows=some, task=task, measured=measured, seed=seed + SCORE_SEED)
    scores_N = score.score(candidates)
    num_finite = int(scores_N.isfinite().sum())
    if scores_N.shape != (len(numbers),) or num_finite < len(numbers):
        raise ConfigError(
            f"The score {score.name!r} returned {num_finite} finite numbers in the shape "
            f"{tuple(scores_N.shape)} for {len(numbers)} rows; correct it to return one for each row."
        )

    # the largest scores of each label
    labels_N = None if labels is None else [labels[number] for number in numbers]
    places = pick_rows(scores_N, labels_N, config.num_kept(len(rows)))
    by = "at random" if isinstance(score, RandomScore) else f"by {score.name}"
    of_labels = "" if labels_N is None else _label_counts([labels_N[place] for place in places], task)
    notes = [f"{len(places):,} of {len(rows):,} training rows were chosen {by}{of_labels}"]
    if lacks_parent:
        notes.append(
            f"the rows were not chosen by {config.score}: the lineage has no version yet, and the base model's "
            "scores would say how odd the form of an answer is"
        )
    if measured is not None:
        read = f"{len(numbers):,}" + (" rows" if len(numbers) == len(rows) else " rows drawn at random")
        loss_N = measured.mean_loss
        notes.append(
            f"the parent version read {read}; its mean loss per answer token is {float(loss_N.mean()):.2f}, on the "
            f"chosen rows {float(loss_N[places].mean()):.2f}"
        )
    return [numbers[place] for place in places], [*notes, *score.notes(candidates), *about_labels]


def _counts(labels: Iterable[str], task: TaskSchema) -> Counter[str]:
    """Rows of every label of the task."""
    counts = Counter(dict.fromkeys(task.labels, 0))
    counts.update(labels)
    return counts


def _label_counts(labels: Sequence[str], task: TaskSchema) -> str:
    """The chosen rows of each label, as the end of a note."""
    counts = _counts(labels, task)
    if len({*counts.values()}) == 1:
        return f", {next(iter(counts.values())):,} of each of {len(counts)} labels"
    return f"; by label: {listed([f'{label} {count:,}' for label, count in counts.most_common()])}"


def _name_of(rows: Dataset, number: int) -> str:
    """A row without its text: by its digest, as its number in the file is not known here."""
    return f"sha256 {rows[number]['sha256'][:12]}" if "sha256" in rows.column_names else f"row {number}"


def quotas(sizes: Mapping[Hashable, int], budget: int) -> dict[Hashable, int]:
    """Divide a budget among labels in proportion to their sizes, by largest remainders.

    Every label gets at least one row if the budget has one for each. Ties go to the label that comes first. The
    budget is at most the number of all rows.
    """
    total = sum(sizes.values())
    shares = {name: budget * size // total for name, size in sizes.items()}
    by_remainder = sorted(sizes, key=lambda name: -(budget * sizes[name] % total))
    for name in by_remainder[: budget - sum(shares.values())]:
        shares[name] += 1
    if budget >= len(sizes):
        for name in [name for name, share in shares.items() if share == 0]:
            shares[max(shares, key=lambda other: shares[other])] -= 1
            shares[name] = 1
    return shares


def pick_rows(scores_N: Tensor, labels: Sequence[Hashable] | None, budget: int) -> list[int]:
    """Return the places of the rows with the largest scores in order, `budget` of them, or all if there are fewer.

    Of equal scores, the first row is taken first. Every label of `labels`, which has the label of every row, keeps its
    share; None: the rows have no labels.
    """
    names = [""] * len(scores_N) if labels is None else labels
    sizes = dict(sorted(Counter(names).items(), key=lambda item: str(item[0])))
    picked: list[int] = []
    for name, quota in quotas(sizes, min(budget, len(scores_N))).items():
        places = [place for place, label in enumerate(names) if label == name]
        best_n = scores_N[places].double().argsort(stable=True, descending=True)
        picked += [places[int(rank)] for rank in best_n[:quota]]
    return sorted(picked)
