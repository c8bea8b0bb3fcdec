"""Contradictions among good rows: one text with several right answers, and preferences in both directions."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from itertools import compress

import numpy as np
import pyarrow as pa

from deal_core.data.arrow_rows import chosen, digests_in, rows_in
from deal_core.data.digest_set import DigestSet
from deal_core.data.rows import Row, input_parts, preference_digest, row_digests
from deal_core.data.schema import Contradictions, Split, TaskSchema, label_key
from deal_core.safe_text import shorten

MAX_EXAMPLES = 3


class ContradictionFinder:
    """Finds the contradictions while the rows of an arrival stream by.

    A text has several right answers if a row with it is new and its text is not. Two preferences contradict each other
    if the kept rows have the row with the answers exchanged. So a row costs one more digest in memory, and a preference
    none. Earlier turns of chats do not count: people begin many chats alike.
    """

    def __init__(self, task: TaskSchema, kept: Mapping[Split, DigestSet], *, include_texts: bool) -> None:
        assert task.format != "auto", "the format is known when rows are checked"
        self._task, self._format, self._kept = task, task.format, kept
        self._include_texts = include_texts
        self._inputs = DigestSet()
        self._contrary: dict[Split, DigestSet] = {"train": DigestSet(), "test": DigestSet()}
        self._num_later: Counter[Split] = Counter()
        """Rows with a text that an earlier row has."""
        self._examples: list[tuple[Row, Split]] = []

    def add(self, good: pa.RecordBatch, split: Split) -> None:
        """Look at good rows, after their digests were added to `kept`. None of them is a duplicate."""
        if self._task.learns_preferences:
            rows = rows_in(good)
            exchanged = [self._exchanged(row) for row in rows]
            is_contrary = self._kept[split].contains(exchanged)
            # both rows of a pair have one key, because both may be among these rows
            keys = [min(row.digest, other) for row, other in compress(zip(rows, exchanged, strict=True), is_contrary)]
            is_first = self._contrary[split].add(keys)
        else:
            inputs = digests_in(good, "input_digest")
            is_contrary = ~self._inputs.add(inputs)
            is_first = self._contrary[split].add(inputs[is_contrary])
        self._num_later[split] += int(is_contrary.sum())
        num_wanted = MAX_EXAMPLES - len(self._examples) if self._include_texts else 0
        if num_wanted and is_first.any():
            is_contrary[np.flatnonzero(is_contrary)[~is_first]] = False
            self._examples += [(row, split) for row in rows_in(chosen(good, is_contrary))[:num_wanted]]

    def found(self) -> Contradictions | None:
        """The contradictions; None: there are none. It is asked before the kept digests are put in order."""
        train, test = (len(self._contrary[split]) for split in ("train", "test"))
        if not train + test:
            return None
        rows = (
            (2 * train, 2 * test)
            if self._task.learns_preferences
            else (train + self._num_later["train"], test + self._num_later["test"])
        )
        examples = tuple(self._example(row, split) for row, split in self._examples)
        return Contradictions(num_texts=train + test, num_train=rows[0], num_test=rows[1], examples=examples)

    def _exchanged(self, row: Row) -> bytes:
        """Digest of the row that prefers the worse answer."""
        assert row.rejected is not None, "every row of the task is a preference"
        digest, _ = row_digests(input_parts(self._format, row.input), [row.rejected])
        return preference_digest(digest, row.output)

    def _example(self, row: Row, split: Split) -> tuple[str, ...]:
        """A text and its answers, as far as they are known: the answers of earlier rows are not in memory."""
        text = json.loads(row.input)[-1]["content"] if self._format == "chat" else row.input
        if row.rejected is not None:
            answers = [row.output, row.rejected]
        elif self._task.labels:  # each label is asked for: whether the text has it is known by the row's digest
            digests = [row_digests([row.input], [label_key(label)])[0] for label in self._task.labels]
            answers = list(compress(self._task.labels, self._kept[split].contains(digests)))
        else:
            answers = []
        return tuple(shorten(part) for part in (text, *answers))
