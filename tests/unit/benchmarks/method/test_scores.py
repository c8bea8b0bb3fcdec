"""Scores after papers: each is the number that its paper means, and is chosen by like any other score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor

from benchmarks.method.scores import failure_rate
from deal_core.adapter.state import adapter_on
from deal_core.config import TrainConfig
from deal_core.data.collate import AnswerCollator, answer_logits, encode_rows
from deal_core.data.schema import TaskSchema
from deal_core.errors import ConfigError
from deal_core.evaluation.generation import answer_inputs
from deal_core.evaluation.likelihood import measure
from deal_core.method_config import SelectionConfig
from deal_core.selection import check_score, score_class
from deal_core.selection.score import Candidates
from tests.unit.deal_core.conftest import as_served

pytestmark = pytest.mark.nightly

TRAIN = TrainConfig(max_prompt_tokens=64)
LIMITS = {"max_prompt_tokens": TRAIN.max_prompt_tokens, "max_answer_tokens": 50}


def test_options_that_a_score_does_not_take_are_named() -> None:
    for score, options, message in (
        ("difficulty", {"aim": 0.5}, r"Score 'difficulty' has no option 'aim'; it takes .*target"),
        ("difficulty", {"target": 2.0}, r"selection\.score_options\.target is 2\.0; give at most 1"),
        ("loss", {"target": 0.5}, r"Score 'loss' has no option 'target'; it takes .*pick"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_score(SelectionConfig(keep=0.5, score=score, score_options=options))
    check_score(SelectionConfig(keep=0.5, score="difficulty", score_options={"target": 0.3}))
    with pytest.raises(ConfigError, match="give the smaller quantile first"):
        check_score(SelectionConfig(keep=0.5, score="loss", score_options={"pick": "band", "band": [0.5, 0.5]}))


def numbered(numbers: Sequence[int], options: Mapping[str, Any], seed: int = 0) -> Tensor:
    """The scores of answers of these lengths."""
    rows = Dataset.from_list([{"input": "a text", "output": "x" * number} for number in numbers])
    task = TaskSchema(name="texts", format="completion", metric="rouge_l")
    return score_class("length")(options).score(Candidates(rows=rows, task=task, measured=None, seed=seed))


def test_weighted_draws_follow_the_softmax_of_the_scores() -> None:
    options = {"pick": "weighted", "temperature": 2.0}
    firsts = torch.tensor([int(numbered([1, 2, 3], options, seed).argmax()) for seed in range(600)])
    shares = torch.bincount(firsts, minlength=3) / 600
    torch.testing.assert_close(shares, (torch.tensor([1.0, 2.0, 3.0]) / 2).softmax(0), atol=0.07, rtol=0)


def test_errors_are_the_rows_that_a_generated_answer_gets_wrong(base, half_learned, task, rows):
    data = rows(60)
    with adapter_on(base.model, half_learned) as model:
        measured = measure(model, base.tokenizer, task, data, **LIMITS)
        given = answer_inputs(model, base.tokenizer, as_served(task), data["input"])
    score = score_class("errors")().score(Candidates(rows=data, task=task, measured=measured, seed=0))
    is_wrong = [answer.text != label for answer, label in zip(given, data["output"], strict=True)]
    assert 0 < sum(is_wrong) < 60, "the parent answers some rows rightly and some wrongly"
    # a wrong row scores above 1, a right one at most 1
    disagreeing = [row for row, wrong in enumerate(is_wrong) if wrong != (float(score[row]) > 1)]
    assert len(disagreeing) <= 1


def test_difficulty_is_the_rate_of_wrong_sampled_answers(base, half_learned, task, rows):
    data, num_samples = rows(6), 2000
    encoded = encode_rows(data, base.tokenizer, task, max_prompt_tokens=64, max_answer_tokens=50)
    collate, generator = AnswerCollator(base.tokenizer, is_seq2seq=False), torch.Generator().manual_seed(0)
    with adapter_on(base.model, half_learned) as model:
        measured = measure(model, base.tokenizer, task, data, **LIMITS)
        for row in range(len(data)):
            batch = collate([encoded[row]])
            with torch.no_grad():
                shares_KV = answer_logits(model, batch)[0].softmax(-1)
            # an answer is right if every token, drawn after the right ones, is right
            drawn_KS = torch.multinomial(shares_KV, num_samples, replacement=True, generator=generator)
            wrong = 1 - (drawn_KS == batch["labels"][0][:, None]).all(0).float().mean()
            d = float(failure_rate(measured)[row])
            assert abs(float(wrong) - d) <= 4 * (d * (1 - d) / num_samples) ** 0.5 + 1e-3
    order = {}
    for target in (0.0, 1.0):
        candidates = Candidates(rows=data, task=task, measured=measured, seed=0)
        order[target] = (
            score_class("difficulty")({"target": target}).score(candidates).argsort(descending=True).tolist()
        )
    assert order[1.0] == measured.loss_N.argsort(descending=True).tolist() == order[0.0][::-1]
