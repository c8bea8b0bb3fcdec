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
from typing import Any

from peft import PeftModel

from benchmarks.method.asked import KindsRehearsal, asked
from benchmarks.method.recentre import learn_rehearsal
from deal_core.adapter.files import MethodState
from deal_core.limits import Count, CountOrZero, Flag, Positive, Share, settings
from deal_core.method_config import MethodConfig, RehearsalConfig
from deal_core.strategies.deal import Deal
from deal_core.strategies.kept_rows import rows_name, unpack, with_targets
from deal_core.strategies.rehearsal import Rehearsal, RehearsedRow
from deal_core.strategies.replay import Replay
from deal_core.strategies.strategy import SEED_STRIDE, PlannedArrival

RAMP = (0.5, 1.5)
"""Rows of the first and of the last step of a ramp, as shares of the mean."""


@settings("strategy_options")
class MemoryOptions:
    """Options of `one_memory`."""

    beta: Share = 0.0
    """β: weight of the right label in the target. 0: the parent's re-centred answer alone. 1: the label alone."""
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

    def __init__(
        self, sets: Sequence[Sequence[RehearsedRow]], collate: Any, counts: Sequence[int], **rest: Any
    ) -> None:
        super().__init__(sets, collate, num_rows=max(counts), **rest)
        self._starts = [0, *accumulate(counts)]

    def draw(self, step: int) -> list[RehearsedRow]:
        """Return the rows of a step, counted from 0."""
        if not self.sets:
            return []
        return [self.at(place) for place in range(self._starts[step], self._starts[step + 1])]


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
    """DEAL with other weights, numbers and times of its kept rows, or with closing steps."""

    name = "one_memory"
    reads = ("deal", "rehearsal.rows")
    Options = MemoryOptions
    revision = 2  # rows that were learned come from the adapter's folder

    @classmethod
    def rehearsed_per_step(cls, config: MethodConfig, arrival: PlannedArrival) -> int:
        """Return the number of rehearsed rows in the step that has most of them."""
        if not arrival.old_tasks:
            return 0
        return max(rows_of_steps(cls.options_of(config), arrival.num_steps, len(arrival.old_tasks)))

    def make_rehearsal(self) -> Rehearsal | None:
        """Make the targets with the parent's answers."""
        options, context = self.options, self.context
        self._old: list[list[RehearsedRow]] = []
        seed = self.seed + SEED_STRIDE * self.num_arrivals if context.old_tasks else self.seed
        generator = random.Random(seed)
        if self.asks_further_rows:
            olds = [old for old in context.old_texts if len(old.rows) and old.task.name != context.task.name]
            self._old = [asked(self.model, context, old, generator, answer_weight=options.beta) for old in olds]
        else:
            for old in context.old_tasks:
                name = rows_name(old.name)
                if name in self._kept and (rows := unpack(self._kept[name])):
                    self._old.append(with_targets(rows, old, self.model, context, generator, options.beta))
        if not self._old:
            return None
        counts = rows_of_steps(options, context.train.num_steps(len(context.encoded)), len(self._old))
        weight = math.sqrt(len(self._old)) if options.root_weight else 1.0
        return StagedRehearsal(self._old, context.collator(), counts, weight=weight, seed=seed)

    def finish(self) -> MethodState:
        """Take the closing steps on A and B."""
        state, context = super().finish(), self.context
        num_steps = self.options.closing_steps
        if not (num_steps and self._old):
            return state
        new = [RehearsedRow(row["prompt_ids"], row["answer_ids"]) for row in context.encoded]
        collate, num_rows = context.collator(), context.train.batch_size
        rehearsal = KindsRehearsal([self._old, [new]], collate, num_rows=num_rows, seed=self.seed)
        closing = self.options.closing_layers
        first = num_layers(self.model) - closing if closing else 0
        factors = [
            factor for name, factor in self.model.named_parameters() if factor.requires_grad and layer_of(name) >= first
        ]
        learn_rehearsal(self.model, factors, rehearsal, context.train, num_steps)
        return state


class OneMemoryUnused(OneMemory):
    """The same with 50 further rows of each old task, which it was not trained on."""

    name = "one_memory_unused"
    reads = ("deal",)
    asks_further_rows = True

    def __init__(self, config: MethodConfig, seed: int) -> None:
        super().__init__(replace(config, rehearsal=RehearsalConfig(rows=0)), seed)


@settings("strategy_options")
class ReplayOptions:
    """Options of `weighted_replay`."""

    weight: Positive = 1.0
    """Weight of the kept rows' loss relative to the new task's."""


class WeightedReplay(Replay):
    """Replay whose kept rows have another weight."""

    name = "weighted_replay"
    Options = ReplayOptions

    def __init__(self, config: MethodConfig, seed: int) -> None:
        super().__init__(config, seed)
        self.weight = self.options.weight


def layer_of(name: str) -> int:
    """Return the number of the layer in a parameter's name, as in `model.layers.12.self_attn.q_proj.lora_A`."""
    return int(name.split(".layers.")[1].split(".")[0])


def num_layers(model: PeftModel) -> int:
    """Return the number of layers that carry an adapter."""
    return 1 + max(layer_of(name) for name, factor in model.named_parameters() if factor.requires_grad)
