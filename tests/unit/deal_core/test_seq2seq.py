"""The T5 layout: the same method on "q" and "v" of an encoder-decoder."""

from __future__ import annotations

import copy
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration

import benchmarks  # noqa: F401  its strategies run on it too
from benchmarks.continual.cell import BOUNDS, make_cell
from benchmarks.continual.run import CellRun, run_cell
from benchmarks.continual.suites import SuiteTask
from deal_core.adapter.state import adapter_on
from deal_core.base_model.load import BaseModel, load_base
from deal_core.config import AdapterConfig, TrainConfig
from deal_core.data.collate import AnswerCollator, answer_loss
from deal_core.data.prompts import encode_answer, encode_prompt
from deal_core.data.schema import TaskSchema
from deal_core.evaluation.evaluate import evaluate_task
from deal_core.evaluation.generation import first_answer_logits
from deal_core.evaluation.label_scores import label_log_probs
from deal_core.method_config import MethodConfig
from deal_core.strategies import PLUGINS
from deal_core.strategies.old_tasks import with_targets
from deal_core.strategies.rehearsal import RehearsedRow
from deal_core.strategies.strategy import TaskContext
from tests.unit.deal_core.conftest import as_served, at_night, make_rows, train_into, weights

STEPS = TrainConfig(max_steps=6, batch_size=4, learning_rate=5e-3, max_prompt_tokens=64, checkpoint_steps=2)


@pytest.fixture(scope="module")
def loaded_base(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    """A T5 of two layers, with the words of the tiny base; `base` is a copy of it."""
    folder = tmp_path_factory.mktemp("t5")
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
    )
    T5ForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return load_base(str(folder), folder / "cache", precision="fp32")


@pytest.fixture(scope="module")
def parent(loaded_base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an adapter on the T5 that has learned one task."""
    first = TrainConfig(max_steps=12, batch_size=4, learning_rate=2e-2, max_prompt_tokens=64)
    base, folder = copy.deepcopy(loaded_base), tmp_path_factory.mktemp("t5-parent")
    return train_into(folder, base, "seq_lora", rows=make_rows(24, first=100), train=first).folder


def test_attention_with_a_position_bias_is_left_alone(base):
    assert base.model.config._attn_implementation == "sdpa"


def test_queries_and_values_of_all_attentions_carry_the_adapter(base, train):
    assert base.kind == "seq2seq"
    found = weights(train("deal", train=STEPS).folder)
    assert {name.split(".lora_")[0].rsplit(".", 1)[1] for name in found} == {"q", "v"}
    assert len(found) == 2 * 2 * 6  # A and B, q and v, six attentions


def test_deal_differs_from_plain_lora_and_resumes(base, parent, train, killed_and_resumed):
    whole = train("deal", parent, train=STEPS)
    plain = train("seq_lora", parent, train=STEPS)
    assert whole.losses != plain.losses
    resumed = killed_and_resumed("deal", parent, at=3, train=STEPS)
    assert resumed.result.resumed_from_step == 2 and resumed.losses == whole.losses


@pytest.mark.nightly
def test_answers_and_plain_peft_agree(base, task, rows, train):
    folder = train("deal", train=TrainConfig(max_steps=150, batch_size=8, learning_rate=3e-2)).folder
    with adapter_on(base.model, folder) as model:
        found = evaluate_task(model, base.tokenizer, as_served(task), rows(24))
        ours = first_answer_logits(model, base.tokenizer, task, "about the sea", max_prompt_tokens=64)
    assert found.accuracy == sum(a == r for a, r in zip(found.answers, rows(24)["output"], strict=True)) / 24 > 0
    loaded = PeftModel.from_pretrained(base.model, str(folder))
    again = first_answer_logits(loaded, base.tokenizer, task, "about the sea", max_prompt_tokens=64)
    torch.testing.assert_close(again, ours)


OF_ANOTHER_KIND = {"deal", "seq_lora", "replay", "base"}


@pytest.mark.parametrize(
    "strategy",
    [
        *sorted(OF_ANOTHER_KIND),
        *at_night(*(name for name in (*PLUGINS.find(), *BOUNDS) if name not in OF_ANOTHER_KIND)),
    ],
)
def test_a_benchmark_cell_runs_whatever_the_strategy(strategy, base, tmp_path):
    cell = make_cell(
        strategy,
        ("colours", "sizes"),
        method=MethodConfig(),
        seed=0,
        rows=8,
        part="reported",
        max_test_rows=4,
        scored="all",
        adapter=AdapterConfig(rank=4),
        train=replace(STEPS, checkpoint_steps=0),
        base="t5",
        data="d",
    )
    rows = tuple({"input": f"number {i}", "output": "ab"[i % 2]} for i in range(12))
    tasks = {
        name: SuiteTask(schema=TaskSchema(name=name, labels=("a", "b"), instruction=name), train=rows, test=rows)
        for name in cell.tasks
    }
    result = run_cell(
        CellRun(
            base=base,
            cell=cell,
            tasks=tasks,
            method=MethodConfig(),
            work=tmp_path / "work",
            shared=tmp_path / "shared",
            on_progress=lambda *_: None,
        )
    )
    assert all(len(score["correct"]) == 4 for score in result["versions"][-1]["scores"].values())
    assert set(result["perplexity"].values()) == {None}  # running text has no source to be conditioned on


@torch.no_grad()
def test_the_target_of_a_kept_row_is_that_of_the_row_read_alone(base, parent, rows):
    """Half of it are the tokens of the right answer. The answers differ in length."""
    story = TaskSchema(name="story", format="completion", instruction="Go on.")
    kept = [
        RehearsedRow(encode_prompt(base.tokenizer, story, text, 64), encode_answer(base.tokenizer, story, answer, 50))
        for text, answer in (("the sea", "red"), ("grass on a day without wind", "a very light blue"))
    ]
    context = TaskContext(
        base=base,
        task=story,
        rows=rows(2),
        encoded=rows(2),
        old_tasks=(story,),
        num_steps=1,
        adapter=AdapterConfig(),
        train=STEPS,
    )
    with adapter_on(base.model, parent) as model:
        made = with_targets(kept, story, model, context, random.Random(0), 0.5)
        for row in made:
            ids, answer = torch.tensor([row.prompt_ids]), torch.tensor([row.answer_ids])
            expected = 0.5 * model(input_ids=ids, labels=answer).logits[0].softmax(-1)
            expected[range(len(row.answer_ids)), answer[0]] += 0.5
            torch.testing.assert_close(row.shares_KN, expected.gather(-1, row.tokens_KN), atol=1e-5, rtol=1e-3)
            assert row.tokens_KN[:, 0].tolist() == list(row.answer_ids), "the largest share"


@torch.no_grad()
def test_log_probabilities_of_labels_are_those_of_single_rows(base):
    labelled = TaskSchema(name="shades", labels=("red", "a very light blue"), instruction="Which shade is it?")
    texts = ["rose", "the sea on a day without wind"]
    found = label_log_probs(base.model, base.tokenizer, labelled, texts, max_prompt_tokens=64)
    collate = AnswerCollator(base.tokenizer, is_seq2seq=True)
    for row, text in enumerate(texts):
        for column, label in enumerate(labelled.labels):
            prompt = encode_prompt(base.tokenizer, labelled, text, 64)
            answer = encode_answer(base.tokenizer, labelled, label, 64)
            loss = answer_loss(base.model, collate([{"prompt_ids": prompt, "answer_ids": answer}]))
            torch.testing.assert_close(found[row, column], -loss, atol=1e-3, rtol=1e-4)
