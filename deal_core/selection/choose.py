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
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from datasets import Dataset
from torch import Tensor

from deal_core.adapter.files import digests_of, sha256_together
from deal_core.adapter.state import adapter_on, load_method_state
from deal_core.base_model.load import BaseModel
from deal_core.data.row_warnings import balance_warning
from deal_core.errors import AdapterStateError, ConfigError
from deal_core.evaluation.generation import counting
from deal_core.evaluation.likelihood import measure
from deal_core.method_config import SelectionConfig
from deal_core.regular_file import complete_file
from deal_core.safe_text import listed
from deal_core.schema_version import VersionedJson
from deal_core.selection import score_class
from deal_core.selection.label_noise import LabelCheck, check_labels
from deal_core.selection.score import Candidates, RandomScore
from deal_core.strategies.strategy import SEED_STRIDE
from deal_core.training.train import TrainingSetup

OnProgress = Callable[[int, int], None]
SAMPLE, SCORE = range(2)
"""Numbers of the random choices of one selection; each has its own seed."""
PURPOSE_STRIDE = 7_919
"""Distance between the seeds of these choices."""
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
    lend_base: Callable[[], BaseModel],
    *,
    parent_folder: Path | None,
    journal: Path,
    on_progress: OnProgress = lambda done, total: None,
) -> ChosenRows:
    """Choose training rows by `setup.method.selection`. A second call with the same arguments reads the first's choice.

    `rows` are all training rows, with the columns input and output, and sha256 if rows are to be named by it.
    `lend_base` returns the base model without an adapter; it is called only if a model reads rows. `parent_folder` is
    None for the first task of a lineage. The file `journal` must outlive the run's checkpoints. `on_progress` is called
    with the number of rows that the model has read, and the number that it will read.

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
    chosen = _Choosing(rows, setup, lend_base, parent_folder, on_progress).make(key)
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


class _Choosing:
    """One choice while it is made. Rows are meant by their numbers in all training rows."""

    def __init__(
        self,
        rows: Dataset,
        setup: TrainingSetup,
        lend_base: Callable[[], BaseModel],
        parent_folder: Path | None,
        on_progress: OnProgress,
    ) -> None:
        self._rows, self._task, self._train = rows, setup.task, setup.train
        self._lend_base, self._parent_folder, self._on_progress = lend_base, parent_folder, on_progress
        self._config = config = setup.method.selection
        self._labels = [str(label) for label in rows["output"]] if setup.task.labels else None
        self._budget = config.num_kept(len(rows))
        self._score = score_class(config.score)(config.score_options)
        self._lacks_parent = self._score.reads_model and parent_folder is None
        if self._lacks_parent:
            self._score = RandomScore()
        self._measures = config.keep is not None and self._score.reads_model
        self._checks_labels = config.noise != "none" and self._labels is not None
        num_arrivals = 0 if parent_folder is None else load_method_state(parent_folder).num_arrivals
        self._first_seed = setup.train.seed + SEED_STRIDE * num_arrivals

    def make(self, key: str) -> ChosenRows:
        """Run the steps."""
        rows = self._sample()
        checked = LabelCheck()
        if self._checks_labels:
            some = self._rows.select(rows)
            checked = check_labels(self._lend_base(), self._task, some, self._train, self._on_progress)
            checked = replace(checked, suspects=tuple(replace(row, row=rows[row.row]) for row in checked.suspects))
        left_out = {row.row for row in checked.suspects} if self._config.noise == "leave_out" else set()
        notes: list[str] = []
        if self._config.keep is None:
            chosen = [row for row in range(len(self._rows)) if row not in left_out]
        else:
            chosen, notes = self._scored([row for row in rows if row not in left_out])
        if self._config.noise != "none":
            notes.append(self._about_labels(checked))
            if self._labels is not None and (rare := balance_warning(self._counts(range(len(self._rows))))):
                notes.append(rare)
        return ChosenRows(key=key, rows=tuple(chosen), notes=tuple(notes))

    def _seed(self, purpose: int) -> int:
        return self._first_seed + PURPOSE_STRIDE * purpose

    def _sample(self) -> list[int]:
        """The rows to choose from: all of them, or a random sample if a model reads them and they are too many."""
        rows = list(range(len(self._rows)))
        limit = _most_read(self._config, len(rows))
        if not (self._measures or self._checks_labels) or len(rows) <= limit:
            return rows
        candidates = Candidates(rows=self._rows, task=self._task, measured=None, seed=self._seed(SAMPLE))
        return self._pick(RandomScore().score(candidates), rows, limit)

    def _scored(self, rows: Sequence[int]) -> tuple[list[int], list[str]]:
        """The rows that are picked by their scores, and notes."""
        some, measured = self._rows.select(rows), None
        if self._measures:
            base = self._lend_base()
            with adapter_on(base.model, self._parent_folder) as model:
                measured = measure(
                    model,
                    base.tokenizer,
                    self._task,
                    some,
                    max_prompt_tokens=self._train.max_prompt_tokens,
                    max_answer_tokens=self._train.answer_tokens(self._task.labels),
                    on_progress=counting(self._on_progress, len(rows)),
                )
        candidates = Candidates(rows=some, task=self._task, measured=measured, seed=self._seed(SCORE))
        scores_N = self._score.score(candidates)
        num_finite = int(scores_N.isfinite().sum())
        if scores_N.shape != (len(rows),) or num_finite < len(rows):
            raise ConfigError(
                f"The score {self._score.name!r} returned {num_finite} finite numbers in the shape "
                f"{tuple(scores_N.shape)} for {len(rows)} rows; correct it to return one for each row."
            )
        chosen = self._pick(scores_N, rows, self._budget)
        notes = self._about_choice(chosen)
        if measured is not None:
            read = f"{len(rows):,}" + (" rows" if len(rows) == len(self._rows) else " rows drawn at random")
            places = {row: place for place, row in enumerate(rows)}
            loss_N, chosen_n = measured.mean_loss, torch.tensor([places[row] for row in chosen])
            notes.append(
                f"the parent version read {read}; its mean loss per answer token is {float(loss_N.mean()):.2f}, on the "
                f"chosen rows {float(loss_N[chosen_n].mean()):.2f}"
            )
        return chosen, [*notes, *self._score.notes(candidates)]

    def _pick(self, scores_N: Tensor, rows: Sequence[int], budget: int) -> list[int]:
        """The picked ones of `rows`, which have these scores."""
        labels = None if self._labels is None else [self._labels[row] for row in rows]
        return [rows[place] for place in pick_rows(scores_N, labels, budget)]

    def _about_choice(self, chosen: Sequence[int]) -> list[str]:
        """Notes: how many rows were chosen, by what, and how many of each label."""
        config = self._config
        by = "at random" if isinstance(self._score, RandomScore) else f"by {self._score.name}"
        of_labels = ""
        if self._labels is not None:
            counts = self._counts(chosen)
            of_labels = f"; by label: {listed([f'{label} {count:,}' for label, count in counts.most_common()])}"
            if len(set(counts.values())) == 1:
                of_labels = f", {next(iter(counts.values())):,} of each of {len(counts)} labels"
        notes = [f"{len(chosen):,} of {len(self._rows):,} training rows were chosen {by}{of_labels}"]
        if self._lacks_parent:
            notes.append(
                f"the rows were not chosen by {config.score}: the lineage has no version yet, and the base model's "
                "scores would say how odd the form of an answer is"
            )
        return notes

    def _counts(self, rows: Iterable[int]) -> Counter[str]:
        """Rows of every label of the task."""
        assert self._labels is not None
        counts = Counter(dict.fromkeys(self._task.labels, 0))
        counts.update(self._labels[row] for row in rows)
        return counts

    def _about_labels(self, checked: LabelCheck) -> str:
        """A note: the rows whose label is probably wrong."""
        if not self._checks_labels:
            return f"no label was checked: task {self._task.name!r} has none"
        named = [f"{self._name_of(row.row)} ({row.label}, likelier {row.likelier})" for row in checked.suspects]
        fate = ", and left out" if self._config.noise == "leave_out" and named else ""
        return checked.describe() + fate + (f": {listed(named, most=MAX_NAMED, width=200)}" if named else "")

    def _name_of(self, row: int) -> str:
        """A row without its text: by its digest, as its number in the file is not known here."""
        has_digests = "sha256" in self._rows.column_names
        return f"sha256 {self._rows[row]['sha256'][:12]}" if has_digests else f"row {row}"


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
