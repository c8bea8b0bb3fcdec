"""Rehearsal: which rows are drawn, what their loss is, and that old answers stay."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from deal_core.adapter.state import adapter_on
from deal_core.config import TrainConfig
from deal_core.data.collate import AnswerCollator
from deal_core.data.schema import TaskSchema
from deal_core.evaluation.generation import first_answer_logits
from deal_core.method_config import RehearsalConfig
from deal_core.strategies.rehearsal import Rehearsal, RehearsedRow, with_model_targets

OLD = TaskSchema(name="sizes", labels=("large", "small"), instruction="How big is it?")
LONG = TrainConfig(max_steps=20, batch_size=4, learning_rate=1e-2, max_prompt_tokens=64, checkpoint_steps=0)


def likely(logits_KV: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    """The model's own distribution."""
    return logits_KV.softmax(-1)


@pytest.fixture
def collate(base):
    return AnswerCollator(base.tokenizer, is_seq2seq=False)


def row(base, prompt: str, answer: str) -> RehearsedRow:
    return RehearsedRow(*(base.tokenizer(text)["input_ids"] for text in (prompt, answer)))


def rehearsal(sets, collate, **changes) -> Rehearsal:
    return Rehearsal(sets, collate, **{"num_rows": 4, "seed": 0, **changes})


def test_every_task_is_rehearsed_as_often_as_any_other_whatever_it_holds(collate):
    one, many = [RehearsedRow([1], [2])], [RehearsedRow([3], [4])] * 50
    drawn = [row for step in range(50) for row in rehearsal([one, many, []], collate, num_rows=3).draw(step)]
    assert sum(row.prompt_ids == [1] for row in drawn) == len(drawn) / 2


def test_a_row_comes_again_only_after_all_others_of_its_task(collate):
    made = rehearsal([[RehearsedRow([i], [i]) for i in range(10)], [RehearsedRow([100], [100])]], collate)
    drawn = [row.prompt_ids[0] for step in range(5) for row in made.draw(step)]
    assert sorted(drawn) == [*range(10), *[100] * 10]


def test_what_is_drawn_follows_from_seed_and_step_alone(collate):
    sets = [[RehearsedRow([i], [i]) for i in range(40)]]
    assert rehearsal(sets, collate).draw(7) == rehearsal(sets, collate).draw(7)
    assert rehearsal(sets, collate).draw(7) != rehearsal(sets, collate).draw(8)
    assert rehearsal(sets, collate).draw(7) != rehearsal(sets, collate, seed=1).draw(7)


def test_nothing_to_rehearse_is_no_loss(base, collate):
    assert rehearsal([[], []], collate).loss(base.model, 0) is None


def test_loss_is_the_divergence_from_the_kept_distribution(base, collate):
    """Compared with KL over the whole vocabulary, at both ends of a padded batch; the cut tail is small."""
    rows = [row(base, "a long prompt about the sea and more", "red"), row(base, "short", "blue sky")]
    with torch.no_grad():
        answered = with_model_targets(base.model, collate, rows, lambda logits_KV, _: (logits_KV / 2.0).softmax(-1))
        for parameter in base.model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))

    def exact(row: RehearsedRow) -> torch.Tensor:
        start, end = len(row.prompt_ids), len(row.prompt_ids) + len(row.answer_ids)
        ids = torch.tensor([[*row.prompt_ids, *row.answer_ids]])
        model = (base.model(input_ids=ids).logits[0, start - 1 : end - 1] / 2.0).log_softmax(-1)
        kept = model.gather(-1, row.tokens_KN)
        rest_p, rest_q = 1 - row.shares_KN.sum(-1), 1 - kept.exp().sum(-1)
        return (row.shares_KN * (row.shares_KN.log() - kept)).sum() + (rest_p * (rest_p.log() - rest_q.log())).sum()

    drawn = rehearsal([answered], collate, temperature=2.0, weight=3.0)
    batch = drawn.draw(0)
    expected = 3 * 4 * sum(exact(row) for row in batch) / sum(len(row.answer_ids) for row in batch)
    torch.testing.assert_close(drawn.loss(base.model, 0), expected, rtol=1e-3, atol=1e-5)
    assert expected > 0.01


def test_an_answer_without_distribution_is_learned_as_a_label(base, collate):
    right = row(base, "about grass", "green leaf")
    ids = torch.tensor([[*right.prompt_ids, *right.answer_ids]])
    logits = base.model(input_ids=ids).logits[0, len(right.prompt_ids) - 1 : -1]
    expected = cross_entropy(logits, torch.tensor(right.answer_ids))
    torch.testing.assert_close(rehearsal([[right]], collate).loss(base.model, 0), expected)


def test_old_answers_drift_less_when_they_are_rehearsed(base, train, parent, rows):
    """`parent` has some answers to OLD. With rehearsal, learning the colours again must change these answers less."""

    def drift(*olds: TaskSchema) -> float:
        given = {"train": LONG, "rehearsal": RehearsalConfig(per_step=12), "old_tasks": olds}
        folder = train("deal", parent, **given).folder
        shares = []
        for where in (parent, folder):
            with adapter_on(base.model, where) as model:
                logits = [
                    first_answer_logits(model, base.tokenizer, OLD, row["input"], max_prompt_tokens=64)
                    for row in rows(6, first=50)
                ]
            shares.append(torch.stack(logits).log_softmax(-1))
        return float((shares[0].exp() * (shares[0] - shares[1])).sum())

    assert drift(OLD) < 0.75 * drift()


def test_the_parent_is_asked_without_dropout(base, collate):
    base.model.train()
    try:
        with_model_targets(base.model, collate, [row(base, "about grass", "green")], likely)
        assert not base.model.training
    finally:
        base.model.eval()
