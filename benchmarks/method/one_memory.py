"""Candidates for one memory: labels and the parent's answers together, on a few rows of every old task.

The arms are written down before the first run, each with one line that says what it tests. `python -m
benchmarks.method.memory` runs them and compares pairs by the rule that stands there.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Any, Literal

from peft import PeftModel

from deal_core.adapter.method_state import MethodState
from deal_core.limits import Count, CountOrZero, Flag, Share, settings
from deal_core.method_config import MethodConfig, RehearsalConfig
from deal_core.strategies.answered import answered, recentred_questions
from deal_core.strategies.deal import Deal
from deal_core.strategies.rehearsal import Question, Rehearsal
from deal_core.strategies.strategy import SEED_STRIDE, OldRows, PlannedArrival, TaskContext
from deal_core.training.recentre import learn_rehearsal

RAMP = (0.5, 1.5)
"""Rows of the first and of the last step of a ramp, as shares of the mean."""


@settings("strategy_options")
class MemoryOptions:
    """Options of `one_memory`."""

    beta: Share = 0.0
    """β: weight of the right label in the target. 0: the parent's re-centred answer alone. 1: the label alone."""
    rows: Literal["unused", "learned"] = "unused"
    """unused: 50 further rows of each old task. learned: a quarter of the rows that it was trained on, at most 50."""
    per_step: Count = 4
    """Rehearsed rows of a step, on average."""
    late_per_step: CountOrZero = 0
    """Rehearsed rows of a step from the eighth task on; 0: as before."""
    ramp: Flag = False
    """Half as many rehearsed rows in the first step, one and a half times as many in the last."""
    root_weight: Flag = False
    """Weigh the rehearsal's loss by the square root of the number of old tasks."""
    closing_steps: CountOrZero = 0
    """Steps after the training, on a batch of which one half are rows of the new task and the other half rehearsed rows
    of the old ones, with the same targets. The rate falls linearly from that of the training to 0."""
    closing_layers: CountOrZero = 0
    """Only so many of the last layers are trained in the closing steps; 0: all."""


class StagedRehearsal(Rehearsal):
    """A rehearsal whose steps have different numbers of rows, given for every step."""

    def __init__(self, sets: Sequence[Sequence[Question]], collate: Any, counts: Sequence[int], **rest: Any) -> None:
        super().__init__([sets], collate, num_rows=max(counts), temperature=1.0, **rest)
        self._starts = [0, *accumulate(counts)]

    def draw(self, step: int) -> list[Question]:
        """Return the rows of a step, counted from 0."""
        if not self.kinds:
            return []
        return [self._at(place) for place in range(self._starts[step], self._starts[step + 1])]


def rows_of_steps(options: MemoryOptions, num_steps: int, num_olds: int) -> list[int]:
    """Return the number of rehearsed rows of every step; a ramp has as many in sum as equal steps.

    Example:
        >>> rows_of_steps(MemoryOptions(ramp=True), 5, 1)
        [2, 3, 4, 5, 6]
    """
    mean = options.late_per_step if options.late_per_step and num_olds >= 7 else options.per_step
    if not options.ramp or num_steps == 1:
        return [mean] * num_steps
    first, last = (share * mean for share in RAMP)
    sizes = [first + (last - first) * step / (num_steps - 1) for step in range(num_steps)]
    ends = [0, *(math.floor(total + 0.5) for total in accumulate(sizes))]
    return [end - start for start, end in pairwise(ends)]


class OneMemory(Deal):
    """DEAL whose rehearsal has rows of the old tasks, with labels and the parent's answers as targets."""

    name = "one_memory"
    reads = ("deal",)
    memories = ("none",)
    Options = MemoryOptions

    def __init__(self, config: MethodConfig, seed: int) -> None:
        super().__init__(replace(config, rehearsal=RehearsalConfig(texts="none")), seed)

    @classmethod
    def old_rows(cls, config: MethodConfig) -> OldRows:
        """Return which rows of old tasks are rehearsed."""
        rows: OldRows = cls.options_of(config).rows
        return rows

    @classmethod
    def questions_per_step(cls, config: MethodConfig, arrival: PlannedArrival) -> int:
        """Return the number of rehearsed rows in the step that has most of them."""
        if not arrival.old_texts:
            return 0
        return max(rows_of_steps(cls.options_of(config), arrival.num_steps, len(arrival.old_texts)))

    @classmethod
    def num_answered(cls, config: MethodConfig, arrival: PlannedArrival) -> int:
        """Return the number of rehearsed rows: the parent answers all of them."""
        del config
        return sum(len(old.rows) for old in arrival.old_texts)

    def prepare(self, model: PeftModel, state: MethodState | None, context: TaskContext) -> None:
        """Make the targets with the parent's answers, before its adapter is decomposed."""
        num_arrivals = 0 if state is None else state.num_arrivals
        olds = [old for old in context.old_texts if len(old.rows) and old.task.name != context.task.name]
        seed = self.seed + SEED_STRIDE * num_arrivals if olds else self.seed  # as `deal` with texts of its own
        generator = random.Random(seed)
        sets = []
        for old in olds:
            if old.task.labels:
                questions, _ = recentred_questions(
                    model, context.base.tokenizer, old, generator, label_weight=self.options.beta
                )
            else:
                questions = answered(
                    model,
                    context,
                    [(old.task, list(old.rows["input"]))],
                    max_prompt_tokens=old.max_prompt_tokens,
                    max_new_tokens=old.max_new_tokens,
                )
            sets.append(questions)
        super().prepare(model, state, context)
        self._old = sets
        if not sets:
            return
        counts = rows_of_steps(self.options, context.train.num_steps(len(context.encoded)), len(sets))
        weight = math.sqrt(len(sets)) if self.options.root_weight else 1.0
        self._rehearsal = StagedRehearsal(sets, context.collator(), counts, weight=weight, seed=seed)

    def finish(self) -> MethodState:
        """Take the closing steps on A and B."""
        state, context = super().finish(), self.context
        num_steps = self.options.closing_steps
        if not (num_steps and self._old):
            return state
        new = [Question(row["prompt_ids"], row["answer_ids"]) for row in context.encoded]
        collate, num_rows = context.collator(), context.train.batch_size
        rehearsal = Rehearsal(
            [self._old, [new]], collate, num_rows=num_rows, weight=1.0, temperature=1.0, seed=self.seed
        )
        closing = self.options.closing_layers
        first = num_layers(self.model) - closing if closing else 0
        factors = [
            factor for name, factor in self.model.named_parameters() if factor.requires_grad and layer_of(name) >= first
        ]
        learn_rehearsal(self.model, factors, rehearsal, context.train, num_steps)
        return state


def layer_of(name: str) -> int:
    """Return the number of the layer in a parameter's name, as in `model.layers.12.self_attn.q_proj.lora_A`."""
    return int(name.split(".layers.")[1].split(".")[0])


def num_layers(model: PeftModel) -> int:
    """Return the number of layers that carry an adapter."""
    return 1 + max(layer_of(name) for name, factor in model.named_parameters() if factor.requires_grad)
