"""Confidence is what the model's probabilities say, and recording it changes no answer."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from deal_core.base_model.load import BaseModel
from deal_core.data.prompts import encode_answer, encode_prompt
from deal_core.data.schema import TaskSchema
from deal_core.evaluation import batches
from deal_core.evaluation.generation import (
    ConfidenceRecorder,
    answer_inputs,
    answer_limit,
    confidence_of,
    first_answer_logits,
    first_tokens,
    generate,
)
from tests.unit.deal_core.conftest import as_served

LABELS = TaskSchema(name="t", labels=("sea", "moss", "tree"), instruction="Which?")
TEXT = TaskSchema(name="t", format="completion")
INPUTS = ["the sea", "the moss and the tree " * 3, "a word"]


@pytest.mark.parametrize("task", [LABELS, TEXT])
def test_recording_changes_no_token(base: BaseModel, task: TaskSchema, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [encode_prompt(base.tokenizer, task, text, 64) for text in INPUTS]
    limit = answer_limit(base.tokenizer, task, 6)
    for tokens, num_batches in ((1, 3), (10_000, 1)):
        monkeypatch.setattr(batches, "MAX_BATCH_TOKENS", tokens)
        plain, recorded = (
            list(generate(base.model, base.tokenizer, prompts, limit, recorder=recorder))
            for recorder in (None, ConfidenceRecorder(base.tokenizer, task))
        )
        assert plain == recorded and plain[0].tokens and len(plain) == num_batches


def test_a_labels_confidence_is_its_share_at_the_first_token(base: BaseModel) -> None:
    found = answer_inputs(base.model, base.tokenizer, as_served(LABELS, 6), INPUTS)
    first = [encode_answer(base.tokenizer, LABELS, label, 8)[0] for label in LABELS.labels]
    assert len(set(first)) == 3
    for text, given in zip(INPUTS, found, strict=True):
        probabilities = first_answer_logits(base.model, base.tokenizer, LABELS, text, max_prompt_tokens=64).softmax(-1)[
            first
        ]
        assert given.confidence.label_mass == pytest.approx(float(probabilities.sum()), rel=1e-4)
        assert given.text not in LABELS.labels, "the likeliest label counts then"
        assert given.confidence.confidence == pytest.approx(float(probabilities.max() / probabilities.sum()), rel=1e-4)


def test_the_answers_label_counts_also_if_another_is_likelier(base: BaseModel) -> None:
    recorder = ConfidenceRecorder(base.tokenizer, LABELS)
    first = [encode_answer(base.tokenizer, LABELS, label, 8)[0] for label in LABELS.labels]
    scores = torch.full((2, len(base.tokenizer)), -100.0)
    scores[:, first] = torch.tensor([0.2, 0.3, 0.5]).log()
    assert recorder(torch.zeros(2, 1), scores) is scores
    recorder(torch.zeros(2, 1), torch.zeros_like(scores))  # the second token does not count
    found = recorder.confidences([[1], [2]], ["Moss", "no label"])
    assert [each.confidence for each in found] == pytest.approx([0.3, 0.5])
    assert [each.label_mass for each in found] == pytest.approx([1.0, 1.0])


def test_labels_with_one_first_token_share_a_number_and_nan_is_zero(base: BaseModel) -> None:
    recorder = ConfidenceRecorder(base.tokenizer, replace(LABELS, labels=("sea", "sea moss")))
    scores = torch.randn(1, len(base.tokenizer))
    recorder(torch.zeros(1, 1), scores)
    (found,) = recorder.confidences([[1]], ["sea moss"])
    assert found.confidence == 1.0 and found.label_mass is not None and 0 < found.label_mass < 1
    recorder.begin()
    recorder(torch.zeros(1, 1), scores * float("nan"))
    assert recorder.confidences([[1]], ["sea"])[0] == (0.0, 0.0)


@pytest.mark.parametrize("labels", [LABELS.labels, ("sea", "sea moss", "tree")])
def test_what_an_engine_says_of_tokens_gives_the_same_confidence(base: BaseModel, labels: tuple[str, ...]) -> None:
    task, texts = replace(LABELS, labels=labels), ["Moss", "no label", "sea", " TREE", "sea moss"]
    first, recorder = first_tokens(base.tokenizer, task), ConfidenceRecorder(base.tokenizer, task)
    assert first == {label: encode_answer(base.tokenizer, task, label, 8)[0] for label in labels}
    scores = 3 * torch.randn(len(texts), len(base.tokenizer), generator=torch.Generator().manual_seed(0))
    recorder(torch.zeros(len(texts), 1), scores)
    wanted = recorder.confidences([[1]] * len(texts), texts)
    tops = [dict(enumerate(row)) for row in scores.log_softmax(-1).tolist()]
    found = [confidence_of(first, text, [], top) for text, top in zip(texts, tops, strict=True)]
    assert found == [pytest.approx(each) for each in wanted]
    assert confidence_of(first, "tree", [], {first["sea"]: -1.0}) == (0.0, pytest.approx(0.3679, rel=1e-3))
    assert confidence_of(first, "tree", [], {}) == (0.0, 0.0)

    recorder = ConfidenceRecorder(base.tokenizer, TEXT)
    recorder(torch.zeros(1, 1), scores[:1])
    recorder(torch.zeros(1, 1), scores[1:2])
    ((confidence, no_mass),) = recorder.confidences([[5, 5]], ["x"])
    top_two = scores[:2].log_softmax(-1).amax(-1).tolist()
    assert first_tokens(base.tokenizer, TEXT) == {} and no_mass is None
    assert confidence_of({}, "x", top_two, {}) == (pytest.approx(confidence), None)


def test_a_texts_confidence_is_the_mean_over_its_own_tokens(base: BaseModel) -> None:
    """A row that has ended is padded until the longest row of its batch ends."""
    recorder, end = ConfidenceRecorder(base.tokenizer, TEXT), int(base.tokenizer.eos_token_id)
    for shares in ([0.5, 0.25], [0.9, 0.75], [0.1, 1.0]):
        scores = torch.full((2, len(base.tokenizer)), -100.0)
        scores[0, 5], scores[0, 6] = torch.tensor([shares[0], 1 - shares[0]]).log()
        scores[1, 5], scores[1, 6] = torch.tensor([shares[1], 1 - shares[1]]).log()
        recorder(torch.zeros(2, 1), scores)
    found = recorder.confidences([[5, end, end], [5, 5, 5]], ["x", "y"])
    assert [each.confidence for each in found] == pytest.approx([(0.5 + 0.9) / 2, (0.75 + 0.75 + 1.0) / 3])
    assert [each.label_mass for each in found] == [None, None]
    answers = answer_inputs(base.model, base.tokenizer, as_served(TEXT, 6), INPUTS)
    alone = [answer_inputs(base.model, base.tokenizer, as_served(TEXT, 6), [text])[0] for text in INPUTS]
    assert [each.text for each in answers] == [each.text for each in alone]
    assert [each.confidence.confidence for each in answers] == pytest.approx(
        [each.confidence.confidence for each in alone], rel=1e-3
    )
