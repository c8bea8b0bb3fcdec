"""Feedback on logged answers: which rows are worth a person's time, and the check of what was said about them."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from deal_core.data.schema import TaskSchema, label_key
from deal_core.errors import ConfigError
from deal_core.safe_text import brief, listed

if TYPE_CHECKING:
    import pandas as pd

Source = Literal["api", "command"]
JUDGEMENTS = ("label", "answer", "is_right")
"""An entry has exactly one of these."""
KEYS = ("id", *JUDGEMENTS, "is_random", "reviewer")
MAX_CHARS = 100_000
"""Longest answer; a reviewer's name is at most 200 characters long."""
RANDOM_SHARE = 0.25
"""Share of the chosen rows that are drawn at random."""
_ID = re.compile(r"(?:chatcmpl-|cmpl-)?([0-9a-f]{32})")
_TRUTH = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
"""Texts of a CSV file that mean yes or no."""


@dataclass(frozen=True, kw_only=True)
class Feedback:
    """What was said about one answer."""

    id: str
    """The answer's id in the prediction log."""
    time: float
    """When it was said, in seconds since 1970 (UTC)."""
    label: str | None
    """The right answer: a label, or a text for a task without labels; None: only `is_right` is known."""
    is_right: bool | None
    """Whether the answer was right; None: only the right answer is known."""
    source: Source
    """api: POST /feedback; command: `deal feedback add`."""
    is_random: bool
    """Whether the row was chosen at random, so that such rows together tell the accuracy."""
    reviewer: str | None
    """The person who gave the right answer; None: nobody is named."""


@dataclass(frozen=True)
class FeedbackEntry:
    """An entry whose form is right. Whether its label exists is checked by `check_against`."""

    feedback: Feedback
    is_answer: bool
    """Whether the right answer was given as `answer`, which is for tasks without labels."""

    def check_texts(self, keeps_texts: bool, place: str) -> None:
        """Refuse an answer in free text if the log keeps no texts.

        Raises:
            ConfigError: The log keeps no texts.
        """
        if self.is_answer and not keeps_texts:
            raise ConfigError(f"{place} has an answer, and the log keeps no texts; send is_right.")

    def check_against(self, tasks: Mapping[str, TaskSchema], task: str | None, place: str) -> Feedback:
        """Return the feedback with the label in the task's spelling.

        `tasks` are those of the lineage. If the answer's `task` is None, the answer is not known here, and any task may
        be its task. `place` says in the message where the entry stands.

        Raises:
            ConfigError: The task has no such label, or takes another kind of answer.
        """
        label = self.feedback.label
        if label is None:
            return self.feedback
        possible = [tasks[task]] if task is not None and task in tasks else [*tasks.values()]
        if self.is_answer:
            if any(not schema.labels for schema in possible):
                return self.feedback
            raise ConfigError(f"{place} gives an answer as free text, and the task has labels; send label.")
        labels = {label_key(spelled): spelled for schema in possible for spelled in schema.labels}
        if not labels:
            raise ConfigError(f"{place} gives a label, and the task has none; send answer.")
        if label_key(label) not in labels:
            raise ConfigError(
                f"{place} has the label {brief(label)}, which the task does not have. Its labels are: "
                f"{listed(tuple(labels.values()))}."
            )
        return replace(self.feedback, label=labels[label_key(label)])


def read_entry(values: Any, place: str, *, source: Source, now: float) -> FeedbackEntry:
    """Check the form of an entry: `id`, one of `label`, `answer` and `is_right`, maybe `is_random` and `reviewer`.

    `place` says in the message where the entry stands; `now` is the time in seconds since 1970.

    Raises:
        ConfigError: The form is wrong. The message quotes no answer.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f'{place} is no object; send {{"id": ID, "label": LABEL}}.')
    entry = {name: value for name, value in values.items() if not is_empty(value)}
    if source == "api" and (unknown := sorted(set(entry) - set(KEYS))):
        raise ConfigError(f"{place} has the keys {listed(unknown)}; the keys are {', '.join(KEYS)}.")
    answer_id = _ID.fullmatch(entry["id"].strip()) if isinstance(entry.get("id"), str) else None
    if answer_id is None:
        raise ConfigError(f"{place} has no id of an answer, which is 32 hexadecimal digits.")
    kinds = [name for name in JUDGEMENTS if name in entry]
    if len(kinds) != 1:
        raise ConfigError(f"{place} has {' and '.join(kinds) or 'no feedback'}; give one of {', '.join(JUDGEMENTS)}.")
    is_right = _truth(entry, "is_right", place)
    feedback = Feedback(
        id=answer_id[1],
        time=now,
        label=None if is_right is not None else _text(entry, kinds[0], MAX_CHARS, place),
        is_right=is_right,
        source=source,
        is_random=bool(_truth(entry, "is_random", place)),
        reviewer=_text(entry, "reviewer", 200, place),
    )
    return FeedbackEntry(feedback, is_answer=kinds == ["answer"])


def is_empty(value: Any) -> bool:
    """Return whether a cell is empty: null, NaN, or a text of blanks."""
    return (
        value is None
        or (isinstance(value, float) and math.isnan(value))
        or (isinstance(value, str) and not value.strip())
    )


def _text(entry: Mapping[str, Any], name: str, max_chars: int, place: str) -> str | None:
    value = entry.get(name)
    if value is None:
        return None
    if not isinstance(value, str) or len(value) > max_chars:
        raise ConfigError(f"{place}: {name} is no text of at most {max_chars} characters.")
    return value.strip()


def _truth(entry: Mapping[str, Any], name: str, place: str) -> bool | None:
    value = entry.get(name)
    if value is None or isinstance(value, bool):
        return value
    truth = _TRUTH.get(str(value).strip().casefold())
    if truth is None:
        raise ConfigError(f"{place}: {name} is neither true nor false.")
    return truth


def select_rows(
    rows: pd.DataFrame,
    number: int,
    *,
    random_share: float = RANDOM_SHARE,
    known: Collection[str] = frozenset(),
    seed: int = 0,
) -> pd.DataFrame:
    """Choose the answered rows of one task that are worth labelling. An input is chosen once, with its newest answer.

    A share is drawn at random; the other rows are the least certain ones. The log has the confidence of the given
    answer alone, so that number takes the place of the margin between the two likeliest answers (uncertainty sampling
    by least confidence, Lewis and Gale 1994, arXiv cmp-lg/9407020).

    The random rows are drawn first, from all rows that may be chosen. So they stand for all of them, and the accuracy
    on them is that of all. The result is shuffled: a person who stops in the middle has seen both kinds.

    `rows` have the columns `time`, `input_sha256` and `confidence`; other columns are kept. The result has at most
    `number` rows and one more column, `is_random`. The share of random rows is above 0 and is rounded up. Inputs that
    are `known`, by `input_sha256`, are never chosen. Draw and order depend on `seed`, not on the order of `rows`.

    Raises:
        ConfigError: `number` or `random_share` is not valid.
    """
    if number < 1:
        raise ConfigError(f"The number of rows to select is {number}; give at least 1.")
    if not 0 < random_share <= 1:
        raise ConfigError(f"The random share is {random_share}; give a number above 0 and at most 1.")
    newest = rows.sort_values("time", kind="stable").drop_duplicates("input_sha256", keep="last")
    pool = newest[~newest["input_sha256"].isin(known)].sort_values("input_sha256", ignore_index=True)
    number = min(number, len(pool))
    random = np.random.default_rng(seed)
    num_random = math.ceil(round(number * random_share, 9))
    drawn = random.choice(len(pool), num_random, replace=False) if num_random else np.zeros(0, dtype=np.int64)
    least_certain = pool.drop(drawn).sort_values("confidence", kind="stable").index[: number - num_random]
    chosen = random.permutation(np.concatenate([drawn, least_certain.to_numpy()]))
    return pool.assign(is_random=pool.index.isin(drawn)).loc[chosen].reset_index(drop=True)
