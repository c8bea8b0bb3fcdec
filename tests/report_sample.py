"""A made-up run's report with everything that a page can show, for the tests of the page."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from typing import Any

from deal_core.evaluation.accuracy_matrix import AccuracyMatrix
from deal_core.evaluation.metrics import LabelFigures
from deal_core.evaluation.report import EvaluationReport
from infra.report.run_report import Changed, Example, Quality, QuarantinedRow, RunReport, Training
from infra.versions import Version
from tests.stored_versions import version

TASKS = ("bank", "clinic", "a-task-with-quite-a-long-name.v2")
REASONS = (
    "bank: accuracy fell by 16.7 points, from 91.7 % to 75.0 %; the limit is 10.0 points.",
    "a-task-with-quite-a-long-name.v2: accuracy 25.0 % is below the floor of 31.0 %.",
)
DIGEST = "ab" * 32


def sample_evaluation() -> EvaluationReport:
    """Three versions; the third one's number in the registry is 4, as the gate rejected one in between."""
    matrix = AccuracyMatrix()
    matrix = matrix.with_row("bank", {"bank": 0.9}, base_accuracy=0.25, parent_accuracy=None)
    matrix = matrix.with_row("clinic", {"bank": 0.9, "clinic": 0.8}, base_accuracy=0.2, parent_accuracy=0.15)
    last = {"bank": 0.75, "clinic": 0.85, TASKS[2]: 0.25}
    matrix = matrix.with_row(TASKS[2], last, base_accuracy=0.21, parent_accuracy=0.22)
    return EvaluationReport(
        task=TASKS[2],
        accuracies=last,
        parent_accuracies={"bank": 0.9, "clinic": 0.8},
        base_accuracy=0.21,
        parent_accuracy_new_task=0.22,
        num_rows=dict.fromkeys(TASKS, 20),
        matrix=matrix,
        notes=("A note.",),
        labels={
            "bank": (
                LabelFigures(label="lost card", num_rows=12, recall=0.75, share=0.45),
                LabelFigures(label="fee <dispute>", num_rows=8, recall=None, share=0.5),
                LabelFigures(label=None, num_rows=0, recall=None, share=0.05),
            )
        },
    )


def sample_report(**changes: Any) -> RunReport:
    """The report that goes with `sample_evaluation`."""
    row = Example(
        row=DIGEST,
        text="Where is my card?",
        expected="lost card",
        before="lost card",
        now="fee dispute",
        scores=(1.0, 0.0),
    )
    values: dict[str, Any] = {
        "include_texts": True,
        "training": Training(
            num_rows=96,
            num_steps=120,
            seconds=812.2,
            rows_per_second=3.2,
            resumed_from_step=40,
            losses=tuple((step, 3 * math.exp(-step / 30)) for step in range(1, 121)),
        ),
        "quality": Quality(
            source="may.csv",
            format="labelled",
            split="hash",
            num_labels=6,
            num_read=130,
            num_train=96,
            num_test=20,
            num_rejected=14,
            problems={"empty text": 10, "label outside the task's set": 4},
            quarantine=f"quarantine/{TASKS[2]}/{DIGEST}/{DIGEST}.jsonl",
            bad_rows=(
                QuarantinedRow(file="may.csv", row=12, line=14, problems=("label outside the task's set: 'cardd'",)),
            ),
            warnings=("Texts with several labels: 3 (6 training rows, 0 test rows).",),
        ),
        "changed": (
            Changed(task="bank", num_rows=20, num_gained=0, num_lost=3, gained=(), lost=(row,) * 3),
            Changed(task="clinic", num_rows=20, num_gained=1, num_lost=0, gained=(row,), lost=()),
        ),
        "seconds": {"ingest": 0.4, "train": 812.2, "evaluate": 122.0},
        "base": "tiny",
        "libraries": {"Python": "3.12.1"},
    }
    return RunReport(**{**values, **changes})


def sample_versions(**changes: Any) -> tuple[Version, ...]:
    """The versions of the lineage; the last one goes with `sample_report`. `changes` are about that one."""
    last = {
        "task": TASKS[2],
        "reasons": REASONS,
        "created": datetime(2026, 5, 4, 12, 30, tzinfo=UTC),
        "dataset_sha256": DIGEST,
        "standing": "rejected by the gate",
    }
    return tuple(
        version(
            number,
            parent,
            **{"lineage": "support", "task": task, "average_accuracy": 0.8, "accepted": number < 3, **more},
        )
        for number, task, parent, more in (
            (1, "bank", None, {}),
            (2, "clinic", 1, {}),
            (3, "clinic", 2, {}),
            (4, TASKS[2], 2, {**last, **changes}),
        )
    )
