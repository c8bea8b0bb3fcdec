"""Warnings about rows that are good one by one and odd together: contradictions, labels in doubt."""

from __future__ import annotations

from collections.abc import Mapping

from deal_core.data.doubts import labels_alike
from deal_core.data.schema import (
    OPTIONS_SEPARATOR,
    Contradictions,
    DatasetManifest,
    Doubt,
    RowsInDoubt,
    TaskSchema,
)
from deal_core.safe_text import listed, shorten

MAX_SHOWN = 5
MAX_RATIO = 10
"""Rows of the commonest label per row of the rarest one."""


def balance_warning(counts: Mapping[str, int]) -> str | None:
    """Return a warning if labels have no rows, or far fewer than the commonest; None if no label is that rare."""
    most = max(counts.values(), default=0)
    rare = sorted((count, label) for label, count in counts.items() if count * MAX_RATIO <= most)
    if not rare or not most:
        return None
    few = listed([f"{label} {count:,}" for count, label in rare], most=MAX_SHOWN)
    return (
        f"{len(rare)} of {len(counts)} labels have few rows ({few}) against {most:,} of the commonest: the model will "
        "seldom answer with them; add rows of these labels"
    )


_DOUBTS: dict[Doubt, tuple[str, str]] = {
    "swallowed rows": (
        "Quoted cells whose lines read like rows of their own",
        "A quote probably stands where none belongs, and its cell has swallowed the rows after it. Close or remove it.",
    ),
    "repeated header": (
        "Lines with the names of the columns inside a file",
        "They are bad rows, and nothing learns them. Files that were put together each bring such a line; remove it.",
    ),
    "labels alike": (
        "Labels that differ from another one only by invisible characters",
        "The model learns them as different answers. Write them alike, or give task.labels {CELL: NAME}.",
    ),
}
"""Doubt → what its rows are, and what that means."""


def data_warnings(manifest: DatasetManifest, *, include_texts: bool) -> tuple[str, ...]:
    """Return the warnings that a dataset's manifest tells: contradictions, rows in doubt, and labels that cannot work.

    Each warning says what training does with such rows. Without `include_texts` it has no text and no label.
    """
    task, contradictions = manifest.task, manifest.contradictions
    warnings = [_contradictions_warning(task, contradictions, include_texts)] if contradictions else []
    warnings += [_doubt_warning(task, rows, include_texts) for rows in manifest.doubts]
    return (*warnings, *label_warnings(task, include_texts=include_texts))


def _doubt_warning(task: TaskSchema, doubted: RowsInDoubt, include_texts: bool) -> str:
    what, then = _DOUBTS[doubted.kind]
    files = {file: [str(row) for name, row in doubted.rows if name == file] for file, _ in doubted.rows}
    named = [
        f"{f'{shorten(file)} ' if len(files) > 1 else ''}{'row' if len(rows) == 1 else 'rows'} {', '.join(rows)}"
        for file, rows in files.items()
    ]
    more = doubted.num_rows - len(doubted.rows)
    where = "; ".join(named) + (f" and {more:,} more" if more else "")
    shown = ""
    if include_texts and doubted.kind == "labels alike":
        groups = [" and ".join(map(ascii, group)) for group in labels_alike(task.labels)]
        shown = f" For example {listed(groups, most=MAX_SHOWN, width=80)}."
    return f"{what}: {doubted.num_rows:,} ({where}). {then}{shown}"


def _contradictions_warning(task: TaskSchema, contradictions: Contradictions, include_texts: bool) -> str:
    num_train, num_test = contradictions.num_train, contradictions.num_test
    rows = f"{contradictions.num_texts:,} ({num_train:,} training rows, {num_test:,} test rows)"
    shown = ""
    if include_texts and contradictions.examples:
        several = " over " if task.learns_preferences else " and "
        examples = [
            ": ".join(filter(None, [repr(text), several.join(map(repr, answers))]))
            for text, *answers in contradictions.examples
        ]
        shown = f" For example {'; '.join(examples)}."
    if task.learns_preferences:
        return (
            f"Pairs of answers that are preferred in both directions: {rows}. Both directions are learned and cancel "
            "each other, and of two such test rows one always counts as wrong. Keep one row of each pair." + shown
        )
    if task.labels:
        return (
            f"Texts with several labels: {rows}. Each of these rows is learned, so the model learns to guess, and of "
            "the test rows of one text only those with one label can count as right. Give each text one label." + shown
        )
    return (
        f"Inputs with several answers in rows of their own: {rows}. Each of these answers is learned, and a test row "
        "compares with its own answer alone. If all of them are right, list them in one row: the first is learned, and "
        "each counts as right." + shown
    )


def label_warnings(task: TaskSchema, *, include_texts: bool) -> tuple[str, ...]:
    """Return the warnings about a task's labels: a single one, and those that contain the separator of the options."""
    warnings = []
    if len(task.labels) == 1:
        shown = f", {shorten(task.labels[0])!r}" if include_texts else ""
        warnings.append(
            f"The task has one label{shown}. Its rows are learned, but the model learns to give this answer to every "
            "text, and the test rows tell no good version from a bad one. Add rows with other labels."
        )
    split = [label for label in task.labels if OPTIONS_SEPARATOR in label]
    if split and task.shows_options:
        shown = f" ({listed([repr(label) for label in split], most=MAX_SHOWN)})" if include_texts else ""
        warnings.append(
            f"Labels that contain {OPTIONS_SEPARATOR!r}, which separates the options in the prompt: {len(split)} of "
            f"{len(task.labels)}{shown}. The model reads their parts as options, and an answer with a part counts as "
            "wrong. Rename them with task.labels {CELL: NAME}, or give a task.template without {options}."
        )
    return tuple(warnings)
