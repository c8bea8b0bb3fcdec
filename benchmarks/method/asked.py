"""DEAL with the rehearsal that it had before `rehearsal.rows`: the old tasks are asked about texts.

The stored cells of `deal` of revision 2 are of this strategy, with the same settings as options: `memory none` is
`texts: arrival`, `memory tests` is `own`, `memory rows` is `both` with `stored_share: 0.1`.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from deal_core.adapter.files import KEPT_ROWS, MethodState, Stores
from deal_core.data.order import stratified_sample
from deal_core.data.prompts import encode_answer, encode_prompt
from deal_core.data.schema import TaskSchema
from deal_core.evaluation.metrics import number_labels, plain_answer
from deal_core.limits import Count, Flag, Positive, ShareAboveZero, settings
from deal_core.method_config import MethodConfig, RehearsalConfig
from deal_core.strategies.deal import Deal
from deal_core.strategies.kept_rows import pack, unpack
from deal_core.strategies.old_tasks import about_arrival, answered, labelled_rows, tasks_to_ask
from deal_core.strategies.rehearsal import Rehearsal, RehearsedRow, shuffled
from deal_core.strategies.strategy import SEED_STRIDE, PlannedArrival, TaskContext


@dataclass(frozen=True, kw_only=True)
class TaskTexts:
    """Further rows of an old task, which it was not trained on and which do not judge the version."""

    task: TaskSchema
    rows: Dataset
    """Columns input and output."""
    max_prompt_tokens: int
    max_new_tokens: int
    """Longest answer of the task. It is that of its first arrival, whatever later arrivals of other tasks have."""


_FURTHER_ROWS: ContextVar[tuple[TaskTexts, ...]] = ContextVar("further rows", default=())


@contextmanager
def further_rows(texts: Iterable[TaskTexts]) -> Iterator[None]:
    """Give `deal_asked` further rows of old tasks until the end of the block: only a benchmark has such rows."""
    token = _FURTHER_ROWS.set(tuple(texts))
    try:
        yield
    finally:
        _FURTHER_ROWS.reset(token)


@settings("strategy_options")
class AskedOptions:
    """Options of `deal_asked`."""

    texts: Literal["none", "arrival", "own", "stored", "both"] = "arrival"
    """Texts that the old tasks are asked about. arrival: texts of the new task, under the old tasks' instructions. own:
    further rows of the old tasks, and the new task's texts for a task that has none. stored: rows of the old tasks,
    kept with the adapter. both: half of each."""
    answers: Literal["parent", "first"] = "parent"
    """Whose answers to their own texts the old tasks are held to. parent: the parent's, asked for with every arrival.
    first: those right after the task was learned, asked for once and kept with the adapter."""
    stored_share: ShareAboveZero = 0.02
    """Share of an arrival's training rows that `stored` and `both` keep."""
    max_stored_rows: Count | None = None
    """Most rows that are kept of one arrival; None: the share alone decides."""
    balance_stored: Flag = False
    """Keep rows of every label, in the shares that the labels have; False keeps a plain random sample."""
    num_texts: Count = 256
    """Texts of the arrival that are asked about, divided among the old tasks. Fewer if the steps use fewer."""
    rows_per_step: Count = 4
    """Rows added to every optimiser step's batch."""
    weight: Positive = 1.0
    """Weight of the rows' loss relative to the new task's loss."""

    @property
    def keeps_rows(self) -> bool:
        """Whether rows of old tasks are stored."""
        return self.texts in ("stored", "both")

    def places_kept(self, answers: Sequence[Hashable], seed: int) -> list[int]:
        """Return the places of the rows of an arrival that are kept, given the answers of all of its rows."""
        num_kept = min(max(1, round(self.stored_share * len(answers))), self.max_stored_rows or len(answers))
        if self.balance_stored:
            return stratified_sample(answers, num_kept, seed)
        return random.Random(seed).sample(range(len(answers)), num_kept)


class KindsRehearsal(Rehearsal):
    """A rehearsal of several kinds of sets, which take turns, so that each kind has an equal share of a step."""

    def __init__(
        self, kinds: Sequence[Sequence[Sequence[RehearsedRow]]], collate: Any, *, seed: int, **rest: Any
    ) -> None:
        generator = random.Random(seed)
        self.kinds = [sets for kind in kinds if (sets := shuffled(kind, generator))]
        super().__init__([], collate, seed=seed, **rest)
        self.sets = [rows for sets in self.kinds for rows in sets]

    def at(self, place: int) -> RehearsedRow:
        """Return the row at a place of the order that the steps go through."""
        turn, kind = divmod(place, len(self.kinds))
        again, task = divmod(turn, len(self.kinds[kind]))
        return self.kinds[kind][task][again % len(self.kinds[kind][task])]


class DealAsked(Deal):
    """DEAL that asks the old tasks about texts; see `AskedOptions`."""

    name = "deal_asked"
    reads = ("deal",)
    Options = AskedOptions
    first_is_plain = False  # with texts stored or both, it keeps rows, which a shared first version lacks
    revision = 1

    def __init__(self, config: MethodConfig, seed: int) -> None:
        super().__init__(replace(config, rehearsal=RehearsalConfig(rows=0)), seed)

    @property
    def stores(self) -> Stores:
        """Return "data" if rows or answers to texts of old tasks are kept; else "nothing"."""
        keeps_answers = self.options.texts == "own" and self.options.answers == "first"
        return "data" if self.options.keeps_rows or keeps_answers else "nothing"

    @classmethod
    def rehearsed_per_step(cls, config: MethodConfig, arrival: PlannedArrival) -> int:
        """Return how many rows of old tasks a step has."""
        options = cls.options_of(config)
        is_asked = options.keeps_rows or any(old.name != arrival.task.name for old in arrival.old_tasks)
        return int(options.rows_per_step) if arrival.old_tasks and is_asked and options.texts != "none" else 0

    def make_rehearsal(self) -> Rehearsal | None:
        """Ask the parent about the texts."""
        options, context = self.options, self.context
        stored = [unpack(self._kept[name]) for name in sorted(self._kept)] if options.keeps_rows else []
        stored = [rows for rows in stored if rows]
        own = [texts for texts in _FURTHER_ROWS.get() if options.texts == "own" and len(texts.rows)]
        own = [texts for texts in own if texts.task.name != context.task.name]
        asks_arrival = options.texts in ("arrival", "own", "both")
        names = {texts.task.name for texts in own}
        others = [old for old in context.old_tasks if old.name not in names]
        olds: list[TaskSchema] = tasks_to_ask(others, context.task) if asks_arrival else []
        # every arrival asks in a new order; otherwise, with few steps, only the same few rows are asked
        seed = self.seed + SEED_STRIDE * (self.num_arrivals if own else len(stored))
        num_put = options.rows_per_step * context.num_steps
        num_put //= 2 if stored and asks_arrival else 1

        def num_each(tasks: Sequence[object]) -> int:
            return math.ceil(min(options.num_texts, num_put) / max(1, len(tasks)))

        about_own = self._about_own(own, num_each(own), seed)
        about_new = about_arrival(self.model, context, olds, seed, num_each(olds))
        rehearsal = KindsRehearsal(
            [stored, [*about_own, *about_new]],
            context.collator(),
            num_rows=options.rows_per_step,
            weight=options.weight,
            seed=seed,
        )
        return rehearsal if rehearsal.kinds else None

    def prepare(self, model: Any, state: MethodState | None, context: TaskContext) -> None:
        """Take the parent's kept answers too."""
        self._before: Mapping[str, Tensor] = {} if state is None else state.tensors
        self._answers: dict[str, Tensor] = {}
        super().prepare(model, state, context)

    def _about_own(self, own: Sequence[TaskTexts], num_each: int, seed: int) -> list[list[RehearsedRow]]:
        """Return the rows of each old task with further rows. `answers: first` keeps the answers with the version."""
        generator = random.Random(seed)
        sets = []
        for texts in own:
            if self.options.answers == "parent":
                sets.append(asked(self.model, self.context, texts, generator, num_each=num_each))
                continue
            tokenizer, name = self.context.base.tokenizer, answers_name(texts.task.name)
            prompts = [
                encode_prompt(tokenizer, texts.task, text, texts.max_prompt_tokens) for text in texts.rows["input"]
            ]
            packed = {part: tensor for part, tensor in self._before.items() if part.startswith(name)}
            rows = unpack_answers(packed, name, prompts)
            if rows is None:
                rows = asked(self.model, self.context, texts, generator)
                packed = pack_answers(rows, name)
            self._answers |= packed
            sets.append(rows)
        return sets

    def finish(self) -> MethodState:
        """Keep rows and answers."""
        tensors = dict(self._answers)
        if self.options.keeps_rows:
            encoded = self.context.encoded
            kept = self.options.places_kept([tuple(ids) for ids in encoded["answer_ids"]], self.seed)
            new = [RehearsedRow(row["prompt_ids"], row["answer_ids"]) for row in encoded.select(kept)]
            tensors |= {**self._kept, f"{KEPT_ROWS}{len(self._kept):04d}": pack(new)}
        return MethodState(strategy=self.name, stores=self.stores, tensors=tensors)


def asked(
    model: Any,
    context: TaskContext,
    texts: TaskTexts,
    generator: random.Random,
    *,
    num_each: int | None = None,
    answer_weight: float = 0.0,
) -> list[RehearsedRow]:
    """Return all further rows of a task with the model's answers; without labels, a sample of `num_each` of them."""
    if texts.task.labels:
        return labelled_texts(model, context.base.tokenizer, texts, generator, answer_weight)
    inputs = list(texts.rows["input"])
    if num_each is not None:
        inputs = generator.sample(inputs, min(num_each, len(inputs)))
    limits = {"max_prompt_tokens": texts.max_prompt_tokens, "max_new_tokens": texts.max_new_tokens}
    return answered(model, context, [(texts.task, inputs)], **limits)


def labelled_texts(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    texts: TaskTexts,
    generator: random.Random,
    answer_weight: float = 0.0,
) -> list[RehearsedRow]:
    """Return the texts of a task with labels, with the model's calibrated answers as targets."""
    task, limit, numbers = texts.task, texts.max_prompt_tokens, number_labels(texts.task.labels)
    targets_N = np.array([numbers[plain_answer(output)] for output in texts.rows["output"]])
    prompts = [encode_prompt(tokenizer, task, text, limit) for text in texts.rows["input"]]
    labels = [encode_answer(tokenizer, task, label, limit) for label in task.labels]
    return labelled_rows(model, tokenizer, task.name, prompts, labels, targets_N, generator, answer_weight)


def answers_name(task: str) -> str:
    """Name prefix of the tensors that hold the answers to a task's texts."""
    return f"answers.{hashlib.sha256(task.encode()).hexdigest()[:16]}."


def pack_answers(rows: Sequence[RehearsedRow], name: str) -> dict[str, Tensor]:
    """Write answers and targets as tensors. Of the prompts only a digest is kept."""
    tokens = [row.tokens_KN for row in rows if row.tokens_KN is not None]
    shares = [row.shares_KN for row in rows if row.shares_KN is not None]
    return {
        f"{name}prompts": _digest(row.prompt_ids for row in rows),
        f"{name}lengths_N": torch.tensor([len(row.answer_ids) for row in rows], dtype=torch.int32),
        f"{name}ids_M": torch.tensor([token for row in rows for token in row.answer_ids], dtype=torch.int32),
        f"{name}tokens_MW": _padded(tokens).to(torch.int32),
        f"{name}shares_MW": _padded(shares),
    }


def unpack_answers(
    tensors: Mapping[str, Tensor], name: str, prompts: Sequence[Sequence[int]]
) -> list[RehearsedRow] | None:
    """Read the rows that `pack_answers` wrote; None if there are none, or if they are about other prompts."""
    digest = tensors.get(f"{name}prompts")
    if digest is None or not torch.equal(digest, _digest(prompts)):
        return None
    lengths = tensors[f"{name}lengths_N"].tolist()
    parts = [tensors[f"{name}{part}"] for part in ("ids_M", "tokens_MW", "shares_MW")]
    ids, tokens, shares = (torch.split(part, lengths) for part in parts)
    return [
        RehearsedRow(prompt, answer.tolist(), tokens_KN.long(), shares_KN)
        for prompt, answer, tokens_KN, shares_KN in zip(prompts, ids, tokens, shares, strict=True)
    ]


def _padded(matrices: Sequence[Tensor]) -> Tensor:
    """The rows of all matrices, padded with zeros to one width. A token of share 0 adds nothing to a loss."""
    return pad_sequence([row for matrix in matrices for row in matrix], batch_first=True)


def _digest(prompts: Iterable[Sequence[int]]) -> Tensor:
    text = json.dumps([list(map(int, prompt)) for prompt in prompts])
    return torch.frombuffer(bytearray(hashlib.sha256(text.encode()).digest()), dtype=torch.uint8)
