"""The bound without training: features of the base model and a linear head per task."""

from __future__ import annotations

import pytest
import torch

from deal_core.base_model.load import BaseModel
from deal_core.benchmark.heads import HEADS, answer_by_head
from deal_core.data.schema import TaskSchema
from deal_core.selection.label_noise import features


@pytest.mark.parametrize("bound", HEADS)
def test_a_head_finds_a_linear_rule(bound: str):
    generator = torch.Generator().manual_seed(0)
    points_ND = torch.randn(200, 8, generator=generator)
    labels = ["up" if value > 0 else "down" for value in (points_ND[:, 0] - points_ND[:, 1]).tolist()]
    answers = answer_by_head(bound, points_ND[:150], labels[:150], points_ND[150:], ("up", "down"))
    assert sum(map(str.__eq__, answers, labels[150:])) >= (40 if bound == "knn" else 45)


def test_a_task_with_one_label_has_a_constant_answer():
    assert answer_by_head("knn", torch.zeros(3, 2), ["up"] * 3, torch.ones(2, 2), ("up", "down")) == ["up", "up"]


def test_two_near_rows_outvote_three_far_ones():
    rows_ND = torch.cat([torch.zeros(2, 3), torch.ones(3, 3)])
    assert answer_by_head("knn", rows_ND, ["near"] * 2 + ["far"] * 3, torch.full((1, 3), 0.01), ()) == ["near"]


def test_features_do_not_depend_on_the_batch(base: BaseModel):
    task = TaskSchema(name="t", labels=("a", "b"), instruction="Which?")
    texts = ["short", "a text that is a good deal longer than the other ones", "x"]

    def found(inputs: list[str]) -> torch.Tensor:
        return features(base.model, base.tokenizer, task, inputs, max_prompt_tokens=64, max_batch_tokens=4096)

    together_ND = found(texts)
    torch.testing.assert_close(together_ND, torch.cat([found([text]) for text in texts]))
    assert not torch.allclose(together_ND[0], together_ND[2]), "the features tell texts apart"
