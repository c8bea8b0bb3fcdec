"""Classifiers per task on features of the untouched base model."""

from __future__ import annotations

import pytest
import torch

from benchmarks.continual.suites import SuiteTask
from benchmarks.method.heads import HEADS, answer_by_head, score_heads
from deal_core.base_model.load import BaseModel
from deal_core.data.schema import TaskSchema


def task(name: str, labels: tuple[str, str]) -> SuiteTask:
    rows = [{"input": f"number {i} of {labels[i % 2]}", "output": labels[i % 2]} for i in range(25)]
    schema = TaskSchema(name=name, labels=labels, instruction="Which?")
    return SuiteTask(schema=schema, train=tuple(rows[:16]), test=tuple(rows[16:]))


def test_heads_on_the_base_model_are_scored_as_answers_are(base: BaseModel):
    tasks = {"colours": task("colours", ("red", "green")), "sizes": task("sizes", ("large", "small"))}
    scores = score_heads("frozen_head", base, tasks, 16, "reported")
    assert {name: len(score["correct"]) for name, score in scores.items()} == {"colours": 6, "sizes": 6}


@pytest.mark.parametrize("bound", HEADS)
def test_a_head_finds_a_linear_rule(bound: str):
    generator = torch.Generator().manual_seed(0)
    points_ND = torch.randn(200, 8, generator=generator)
    labels = ["up" if value > 0 else "down" for value in (points_ND[:, 0] - points_ND[:, 1]).tolist()]
    answers = answer_by_head(bound, points_ND[:150], labels[:150], points_ND[150:], ("up", "down"))
    assert sum(map(str.__eq__, answers, labels[150:])) >= (40 if bound == "knn" else 45)
