"""Answers: what is generated, how it is batched, how it is scored."""

from __future__ import annotations

import copy

import pytest
import torch
from datasets import Dataset

from deal_core.adapter.state import adapter_on
from deal_core.config import TrainConfig
from deal_core.data.collate import MIN_PREFIX
from deal_core.data.prompts import encode_answer, encode_prompt
from deal_core.data.schema import TaskSchema
from deal_core.evaluation import batches
from deal_core.evaluation.evaluate import count_too_long, evaluate_task
from deal_core.evaluation.generation import answer_inputs, generate, read_prefix
from deal_core.evaluation.likelihood import DIVERGENCE_ROWS, divergence_from_base, token_probabilities
from tests.unit.deal_core.conftest import as_served, small_model, train_into

WELL = TrainConfig(max_steps=80, batch_size=8, learning_rate=3e-2, max_prompt_tokens=64)


@pytest.fixture(scope="module")
def folder(loaded_base, tmp_path_factory):
    """Folder of an adapter that has learned the task well enough to answer some rows."""
    return train_into(tmp_path_factory.mktemp("learned"), copy.deepcopy(loaded_base), "seq_lora", train=WELL).folder


def one_by_one(model, tokenizer, task, text, max_new_tokens) -> tuple[str, bool]:
    """Greedy decoding spelled out: no batch, no padding, no cache. True: the answer came to its end."""
    ids = encode_prompt(tokenizer, task, text, 64)
    start = len(ids)
    for _ in range(max_new_tokens):
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(ids[start:], skip_special_tokens=True).strip(), ids[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize(
    ("max_batch_tokens", "max_new_tokens"), [(64, 10), (300, 10), (4096, 10), (300, 1), (300, 2), (300, 3)]
)
def test_batches_give_the_answers_of_single_rows_in_order_and_tell_which_have_no_room_for_their_end(
    max_batch_tokens, max_new_tokens, base, task, rows, folder, monkeypatch
):
    monkeypatch.setattr(batches, "MAX_BATCH_TOKENS", max_batch_tokens)
    inputs = rows(12)["input"]
    open_task = TaskSchema(name="open", instruction=task.instruction)
    seen: list[int] = []
    with adapter_on(base.model, folder) as model:
        alone = [one_by_one(model, base.tokenizer, open_task, text, max_new_tokens) for text in inputs]
        found = answer_inputs(model, base.tokenizer, as_served(open_task, max_new_tokens), inputs, seen.append)
    assert [(answer.text, not answer.is_cut) for answer in found] == alone
    assert len({text for text, _ in alone}) > 1 or max_new_tokens < 10
    assert any(answer.is_cut for answer in found) or max_new_tokens > 1
    assert sum(seen) == 12 and (len(seen) > 1) == (max_batch_tokens < 4096)


def test_references_that_no_answer_can_reach_are_counted(base, task):
    open_task = TaskSchema(name="open", format="completion")
    outputs = ["x", "x " * 40, "x"]
    num_tokens = len(base.tokenizer(" x")["input_ids"])
    for limit, wanted in ((num_tokens, 1), (num_tokens - 1, 3)):
        assert count_too_long(base.tokenizer, as_served(open_task, limit), outputs) == wanted
    several = [["x " * 40, "x"], ["x " * 40] * 2]
    assert count_too_long(base.tokenizer, as_served(open_task, num_tokens), several) == 1


def test_logits_of_long_answers_stay_within_their_bytes(base, monkeypatch):
    prompts, vocabulary = [[1, 2]] * 7, base.model.config.vocab_size
    monkeypatch.setattr(batches, "MAX_LOGIT_BYTES", 3 * 8 * 5 * vocabulary)
    sizes = [
        [len(found.batch) for found in generate(base.model, base.tokenizer, prompts, 5, **asked)]
        for asked in ({"with_logits": True}, {})
    ]
    assert sizes == [[3, 3, 1], [7]]


def test_what_all_prompts_begin_with_is_read_once(base, task, rows, monkeypatch):
    inputs, seen = rows(12)["input"], []
    prompts = [encode_prompt(base.tokenizer, task, text, 64) for text in inputs]
    shared = next(i for i, ids in enumerate(zip(*prompts, strict=False)) if len(set(ids)) > 1)
    assert shared >= MIN_PREFIX
    hook = base.model.register_forward_pre_hook(
        lambda _, args, given: seen.append(given["input_ids"].numel()), with_kwargs=True
    )
    answers = answer_inputs(base.model, base.tokenizer, as_served(task, 1), inputs)
    hook.remove()
    longest = max(map(len, prompts))
    assert seen == [shared, 12 * (longest - shared)] and len(answers) == 12


def test_a_model_that_looks_back_a_few_tokens_only_reads_every_prompt_whole(base, task, rows):
    # padding between the shared part and the rest would stand in its window
    model = small_model("mistral", len(base.tokenizer), sliding_window=16)
    prompts = [encode_prompt(base.tokenizer, task, text, 64) for text in rows(12)["input"]]
    assert read_prefix(model, prompts).length == 0
    assert read_prefix(base.model, prompts).length > 0


def test_scores_are_those_of_the_answers(base, task, rows, folder):
    with adapter_on(base.model, folder) as model:
        found = evaluate_task(model, base.tokenizer, as_served(task), rows(24))
    right = [a.casefold() == r for a, r in zip(found.answers, rows(24)["output"], strict=True)]
    assert sum(right) > 0 and found.accuracy == sum(right) / 24
    assert (found.task, found.num_rows, found.majority_rate) == ("colours", 24, 8 / 24)
    assert found.rouge1 >= found.accuracy


def test_the_probability_of_a_reference_is_that_of_its_tokens_one_by_one(base, task, rows, folder, monkeypatch):
    """Whatever the batch; a metric "loss" has these numbers as scores and generates nothing."""
    monkeypatch.setattr(batches, "MAX_BATCH_TOKENS", 128)
    some = rows(7)
    open_task = TaskSchema(name="open", instruction=task.instruction, metric="loss", format="completion")
    references = [text * (1 + number % 3) for number, text in enumerate(some["output"])]
    with adapter_on(base.model, folder) as model:
        given = (model, base.tokenizer, as_served(open_task))
        found = token_probabilities(*given, some["input"], references)
        measured = evaluate_task(*given, Dataset.from_dict({"input": some["input"], "output": references}))
        for text, reference, share in zip(some["input"], references, found, strict=True):
            prompt = encode_prompt(base.tokenizer, open_task, text, 64)
            answer = encode_answer(base.tokenizer, open_task, reference, 50)
            logits = model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
            chosen = logits.log_softmax(-1)[range(len(answer)), answer]
            assert share == pytest.approx(float(chosen.mean().exp()), rel=1e-3)
    assert measured.outcomes == pytest.approx(found, abs=1e-6) and measured.majority_rate is None


def test_an_answer_has_the_score_of_its_best_reference(base, task, rows, folder):
    """Of a row with one reference, that one; "loss" measures each reference."""
    some = rows(4)

    def evaluate(metric, found):
        open_task = TaskSchema(name="open", instruction=task.instruction, format="completion", metric=metric)
        return evaluate_task(model, base.tokenizer, as_served(open_task, 4), found)

    with adapter_on(base.model, folder) as model:
        said = evaluate("rouge_l", some).answers
        references = [None, ["teal", said[1]], [f"nothing like {said[2]}", said[2], "x"], None]
        several = Dataset.from_dict({**some.to_dict(), "references": references})
        scored = evaluate("rouge_l", several)
        assert scored.outcomes[1:3] == (1.0, 1.0) and scored.rouge1 >= 0.5
        assert (scored.outcomes[0], scored.outcomes[3]) == tuple(evaluate("rouge_l", some).outcomes[i] for i in (0, 3))
        measured = evaluate("loss", several).outcomes
        for text, output, known, share in zip(some["input"], some["output"], references, measured, strict=True):
            each = known or [output]
            alone = evaluate("loss", Dataset.from_dict({"input": [text] * len(each), "output": each})).outcomes
            assert share == pytest.approx(max(alone), abs=1e-5)


def test_the_distance_from_the_base_model_is_kl_at_the_answers_tokens(base, task, rows, folder):
    def log_probs_at(model, prompt, answer):
        ids = torch.tensor([[*prompt, *answer[:-1]]])
        return model(input_ids=ids).logits[0, len(prompt) - 1 :].double().log_softmax(-1)

    asked, found, served = rows(DIVERGENCE_ROWS + 5), [], as_served(task)
    with adapter_on(base.model, folder) as model, torch.no_grad():
        for row in asked.select(range(DIVERGENCE_ROWS)):
            prompt = encode_prompt(base.tokenizer, task, row["input"], 64)
            answer = encode_answer(base.tokenizer, task, row["output"], 51)
            own = log_probs_at(model, prompt, answer)
            with model.disable_adapter():
                of_base = log_probs_at(model, prompt, answer)
            found += (of_base.exp() * (of_base - own)).sum(-1).tolist()
        distance = divergence_from_base(model, base.tokenizer, served, asked)
        assert distance == pytest.approx(sum(found) / len(found), rel=1e-3) and distance > 0.1
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.fill_(float("nan"))
        assert divergence_from_base(model, base.tokenizer, served, asked) is None
    assert divergence_from_base(base.model, base.tokenizer, served, asked) == 0.0
