"""Read stored cells of every release. Cells are evidence: they are read for ever, and what they say is never changed.

A cell of version 3 says all of its settings. A cell of version 2 left out what had its first default, and said settings
that exist no more; `in_full` writes it as a cell of version 3. The values here are facts about old cells. They do not
follow today's defaults.

Shapes: N test rows, L labels.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from benchmarks.continual.cell import SCHEMA_VERSION
from benchmarks.continual.summary import CellJson
from deal_core.errors import DataValidationError

LEFT_OUT: dict[str, Any] = {"prompt": "plain", "scoring": "generated", "scores_unused": False, "revision": 1}
LEFT_OUT_OF_TRAINING: dict[str, Any] = {
    "quantize": "none",
    "schedule": "constant",
    "min_steps": 0,
    "balance_labels": False,
    "preference_beta": 0.1,
    "preference_learning_rate": 3e-4,
    "recentre_steps": 0,
}
LEFT_OUT_OF_REHEARSAL = {
    "rehearsal.max_stored_rows": None,
    "rehearsal.balance_stored": False,
    "rehearsal.answers": "parent",
}
"""What a cell of version 2 did not say where it had this value."""
READ_BY_REPLAY = ("rehearsal.max_stored_rows", "rehearsal.balance_stored")
ALWAYS_THE_SAME: dict[str, Any] = {
    "deal.sides": "both",
    "deal.balanced": True,
    "deal.recycle": True,
    "deal.project": True,
    "deal.interpolation": 1.0,
    "rehearsal.parent_share": 0.0,
    "token_mask.max_perplexity": None,
    "token_mask.share": None,
    "token_mask.choose": "high",
    "token_mask.keep_end": True,
    "deal.seed_scale": 1.0,
    "deal.widths": [0.25, 0.5, 1.0],
    "deal.num_layers": 1,
    "deal.mixing": True,
    "deal.a": 5.0,
    "deal.b": 2.0,
    "deal.tolerance": 0.1,
    "selection.pick": "high",
    "selection.band": [0.25, 0.75],
    "selection.temperature": 1.0,
    "selection.strata": "label",
    "selection.max_scored": 20_000,
    "deal.form": "spectral",
    "deal.kernel": "heat",
    "selection.target": 0.5,
    "rivals.o_lora_weight": 0.01,
    "rivals.ella_weight": 10_000.0,
    "rivals.ewc_weight": 100.0,
    "rivals.lwf_weight": 1.0,
    "rivals.lwf_temperature": 2.0,
}
"""Settings of methods that exist no more or have another name, with the value that means today's method."""
GONE_FROM_TRAINING = {"prompt_loss_weight": 0.0}
FIXED: dict[str, Any] = {
    "min_steps": 0,
    "group_by_length": True,
    "recentre_steps": 0,
    "warmup_share": 0.0,
    "weight_decay": 0.0,
}
"""Settings of the training that exist no more, with what a training does since then: its cells do not say them."""
FIXED_ADAPTER: dict[str, Any] = {"dropout": 0.0, "rslora": False}
"""Settings of the adapter that cells of before they existed do not say, with what an adapter was then."""

Memory = Literal["none", "tests", "rows"]
MEMORIES: dict[Memory, dict[str, Any]] = {
    "none": {"rehearsal.texts": "arrival"},
    "tests": {"rehearsal.texts": "own"},
    "rows": {"rehearsal.texts": "both", "rehearsal.stored_share": 0.1},
}
"""The setting `memory` of `deal` before it kept rows by default → what it stood for."""
NUM_TEXTS = 50
"""Texts of a task that `memory: tests` asked about, at most."""
EARLIER_REHEARSAL: dict[str, Any] = {
    "rehearsal.texts": "arrival",
    "rehearsal.answers": "parent",
    "rehearsal.stored_share": 0.02,
    "rehearsal.max_stored_rows": None,
    "rehearsal.balance_stored": False,
    "rehearsal.num_texts": 256,
    "rehearsal.rows_per_step": 4,
    "rehearsal.weight": 1.0,
    "rehearsal.temperature": 1.0,
}
"""The rehearsal's settings of that time with their defaults. A cell is read without those that have their default."""


def name_of_memory(memory: Memory) -> str:
    """What `departures` says of a stored cell of `deal` with this memory, and defaults else."""
    return f"memory {memory}"


def read_stored_cells(folder: Path) -> list[CellJson]:
    """Return every cell of a folder in the form of version 3, with the settings FIXED and FIXED_ADAPTER.

    Raises:
        DataValidationError: A cell has another schema version.
    """
    cells = []
    for path in sorted(folder.glob("*-*.json")):
        cell = json.loads(path.read_text(encoding="utf-8"))
        version = cell["settings"]["schema_version"]
        if version not in (2, SCHEMA_VERSION):
            raise DataValidationError(f"{path} has schema version {version}; versions 2 and {SCHEMA_VERSION} are read.")
        settings = in_full(cell["settings"]) if version == 2 else cell["settings"]
        train = settings["train"] | {name: value for name, value in FIXED.items() if name not in settings["train"]}
        method = with_memory(settings["strategy"], without_the_same(settings["method"]))
        settings = {**settings, "train": train, "method": method, "adapter": FIXED_ADAPTER | settings["adapter"]}
        if settings["strategy"] in ("deal", "replay") and settings["revision"] == 2:
            settings["revision"] = 3  # what its rehearsal says tells that it is older
        cells.append({**cell, "settings": settings})
    return cells


def without_the_same(method: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a method without those of ALWAYS_THE_SAME that mean today's method."""
    return {name: value for name, value in method.items() if ALWAYS_THE_SAME.get(name, ...) != value}


def with_memory(strategy: str, method: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a method with its `memory` in place of what the memory stood for."""
    memory = next(
        (name for name, meant in MEMORIES.items() if strategy == "deal" and meant.items() <= method.items()), None
    )
    meant = MEMORIES[memory] if memory else {}
    rest = {
        name: value for name, value in method.items() if name not in meant and EARLIER_REHEARSAL.get(name, ...) != value
    }
    return {"memory": memory, **rest} if memory else rest


def in_full(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a cell of version 2 as version 3 says them."""
    method = without_the_same(settings["method"])
    train = {name: value for name, value in settings["train"].items() if GONE_FROM_TRAINING.get(name, ...) != value}
    reads_rehearsal = "rehearsal.texts" in method
    reads = LEFT_OUT_OF_REHEARSAL if reads_rehearsal else READ_BY_REPLAY if settings["strategy"] == "replay" else ()
    return {
        **LEFT_OUT,
        **settings,
        "schema_version": SCHEMA_VERSION,
        "method": {**{name: LEFT_OUT_OF_REHEARSAL[name] for name in reads}, **method},
        "train": {**LEFT_OUT_OF_TRAINING, **train},
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
    """Read back what `pack_answers` of a cell wrote; None: an open task or an old cell has no values."""
    if "log_probs" not in score:
        return None
    flat = np.frombuffer(base64.b64decode(score["log_probs"]), "<f2").astype(np.float64)
    return LabelledAnswers(
        labels=tuple(score["labels"]),
        targets_N=np.array(score["targets"], dtype=np.int64),
        answers=tuple(score["answers"]),
        log_probs_NL=flat.reshape(len(score["targets"]), len(score["labels"])),
    )
