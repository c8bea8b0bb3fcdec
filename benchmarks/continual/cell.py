"""One cell of the benchmark: all settings that decide its figures, and the answers that its file keeps.

Shapes: N test rows, L labels.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from benchmarks.continual.suites import Part
from deal_core.config import AdapterConfig, TrainConfig
from deal_core.data.schema import PromptForm
from deal_core.errors import ConfigError
from deal_core.evaluation.metrics import number_labels, plain_answer
from deal_core.method_config import MethodConfig
from deal_core.strategies import PLUGINS, strategy_class

if TYPE_CHECKING:
    from torch import Tensor

SCHEMA_VERSION = 3
"""Version 3 says every setting of the training and of the strategy, so no default of today is needed to read it."""

Scored = Literal["all", "ends", "last"]
"""Which entries of the accuracy matrix are measured. all: after every task, all tasks so far and the next one. ends:
every task directly after it was learned, and all tasks at the end. last: all tasks at the end."""

Scoring = Literal["generated", "likeliest"]
"""How the answers of tasks with labels are found. generated: written token by token, as in production. likeliest: the
label with the largest log-probability, which is faster. Free answers are always generated."""

BOUNDS = ("base", "per_task", "joint")
"""Bounds for comparison: the base model itself, an adapter per task, and one adapter for all rows together."""
PROTOCOL: dict[str, Any] = {
    "learning_rate": 1e-3,
    "max_prompt_tokens": 160,
    "max_answer_tokens": 50,
    "checkpoint_steps": 0,
}
"""The benchmark's own defaults of TrainConfig. No checkpoints are needed: a cell continues at its unfinished task."""
COMMON = ("selection",)
"""Parts of MethodConfig that every strategy heeds. A cell has a part's settings only where the part is on."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """The tasks, the strategy and all settings of one training with its scores. The digest names the cell's file.

    Attributes:
        strategy: A strategy, or one of BOUNDS.
        tasks: Tasks in order of arrival.
        seed: Seed of initialisation and of the order of rows.
        rows: Training rows per task; the first rows are used.
        part: Part of the test rows that is scored.
        max_test_rows: Most test rows of a task; the first ones are used. None: all.
        consolidate_every: After so many tasks, all tasks so far are learned together, from the base model, as a version
            more; None: never.
        scores_unused: Whether the last version also answers the training rows that no cell of this many rows uses.
        method: Dotted name of a method setting → its value, for the settings that the strategy reads.
        base: Name and digest of the base model.
        data: Digest of the tasks.
        prompt: Form of the prompts, see `TaskSchema.prompt`.
    """

    strategy: str
    tasks: tuple[str, ...]
    seed: int
    rows: int
    part: Part
    max_test_rows: int | None
    scored: Scored
    scoring: Scoring = "generated"
    scores_unused: bool = False
    consolidate_every: int | None = None
    adapter: AdapterConfig
    train: TrainConfig
    method: dict[str, Any]
    base: str
    data: str
    prompt: PromptForm = "plain"

    def to_json(self) -> dict[str, Any]:
        """The cell as a dict of JSON types, with the strategy's revision. No default of today is needed to read it."""
        values = {
            "schema_version": SCHEMA_VERSION,
            **asdict(self),
            "train": self.train.deciding(),
            "revision": revision_of(self.strategy),
        }
        if self.consolidate_every is None:  # a cell that was stored before this setting keeps its digest
            del values["consolidate_every"]
        return dict(json.loads(json.dumps(values)))

    def digest(self) -> str:
        """Twelve hexadecimal digits over all fields."""
        return _digest(self.to_json())

    @property
    def file_name(self) -> str:
        """Name of the cell's file."""
        return f"{self.strategy}-{self.seed}-{self.digest()}.json"

    def scored_after(self, version: int) -> tuple[str, ...]:
        """Return the tasks that are scored after task number `version`, counted from 0."""
        if version == len(self.tasks) - 1:
            return self.tasks
        return {"all": self.tasks[: version + 2], "ends": self.tasks[version : version + 1], "last": ()}[self.scored]

    def shared_digest(self) -> str | None:
        """Digest of the first version if it is plain LoRA on all rows without kept rows; else None.

        Cells with the same digest share their first version, which is trained and scored once.
        """
        is_plain = not self.method.get("rehearsal.rows") and not any(
            name.partition(".")[0] in COMMON for name in self.method
        )
        if self.strategy in BOUNDS or not (is_plain and strategy_class(self.strategy).first_is_plain):
            return None
        names = ("seed", "rows", "part", "max_test_rows", "scoring", "adapter", "train", "base", "data", "prompt")
        cell = self.to_json()
        values = {name: cell[name] for name in names} | {"revision": revision_of("seq_lora")}
        return _digest([self.tasks[0], self.scored_after(0), values])


def make_cell(
    strategy: str, tasks: tuple[str, ...], *, method: MethodConfig, seed: int, train: TrainConfig, **fields: Any
) -> Cell:
    """Return a cell with the method settings that its strategy reads. A bound has none, and its tasks are sorted.

    Raises:
        ConfigError: There is no such strategy, or it does not take its options.
    """
    if strategy not in (names := (*PLUGINS.find(), *BOUNDS)):
        raise ConfigError(f"strategy is {strategy!r}; give {', '.join(names)}.")
    is_bound = strategy in BOUNDS
    return Cell(
        strategy=strategy,
        tasks=tuple(sorted(tasks)) if is_bound else tasks,
        seed=0 if strategy == "base" else seed,
        train=train,
        method={} if is_bound else settings_read(strategy, method),
        **fields,
    )


def revision_of(strategy: str) -> int:
    """Return the revision of a strategy; bounds train with seq_lora."""
    return strategy_class("seq_lora" if strategy in BOUNDS else strategy).revision


def settings_read(strategy: str, method: MethodConfig) -> dict[str, Any]:
    """Return the method settings that a strategy reads, by dotted name; those of a part of COMMON if it is on.

    Raises:
        ConfigError: The strategy does not take its options.
    """
    learner = strategy_class(strategy)
    options = learner.options_of(method)
    reads = (*learner.reads, "strategy_options", *(part for part in COMMON if getattr(method, part).is_on))
    parts = {**asdict(method), "strategy_options": {} if options is None else asdict(options)}
    flat = {f"{part}.{name}": value for part, values in parts.items() for name, value in values.items()}
    return {name: value for name, value in flat.items() if name in reads or name.partition(".")[0] in reads}


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def pack_answers(
    answers: Sequence[str], references: Sequence[str], labels: Sequence[str], log_probs_NL: Tensor
) -> dict[str, Any]:
    """Return JSON values. Log-probabilities are half-precision floats in base64, row by row: three digits are kept."""
    numbers = number_labels(labels)
    half_NL = log_probs_NL.clamp(min=-6e4).numpy().astype("<f2")
    return {
        "labels": list(labels),
        "targets": [numbers[plain_answer(reference)] for reference in references],
        "answers": [numbers.get(plain_answer(answer), answer) for answer in answers],
        "log_probs": base64.b64encode(half_NL.tobytes()).decode(),
    }


@dataclass(frozen=True, kw_only=True)
class LabelledAnswers:
    """The answers of one version to one labelled task."""

    labels: tuple[str, ...]
    targets_N: NDArray[np.int64]
    """Number of each row's right label."""
    answers: tuple[int | str, ...]
    """Each row's answer: the number of a label, or another text."""
    log_probs_NL: NDArray[np.float64]
    """log p(label | prompt)."""

    def texts(self) -> list[str]:
        """The answers as texts."""
        return [self.labels[answer] if isinstance(answer, int) else answer for answer in self.answers]


def unpack_answers(score: Mapping[str, Any]) -> LabelledAnswers | None:
    """Read back what `pack_answers` wrote; None: an open task or an old cell has no values."""
    if "log_probs" not in score:
        return None
    flat = np.frombuffer(base64.b64decode(score["log_probs"]), "<f2").astype(np.float64)
    return LabelledAnswers(
        labels=tuple(score["labels"]),
        targets_N=np.array(score["targets"], dtype=np.int64),
        answers=tuple(score["answers"]),
        log_probs_NL=flat.reshape(len(score["targets"]), len(score["labels"])),
    )
