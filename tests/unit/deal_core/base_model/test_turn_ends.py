"""An answer ends where the base model's own turn ends, and is trained to end there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset

from deal_core.base_model.load import BaseModel, load_base, read_tokenizer
from deal_core.base_model.turn_ends import end_id, stop_ids
from deal_core.data.collate import encode_rows
from deal_core.data.prompts import encode_answer, encode_prompt
from deal_core.data.schema import TaskSchema
from deal_core.errors import ConfigError
from deal_core.evaluation.answering import ServedTask
from deal_core.evaluation.evaluate import evaluate_task
from deal_core.evaluation.generation import answer_inputs
from deal_core.evaluation.label_scores import label_log_probs
from tests.conftest import MakeOnce
from tests.turn_bases import KINDS, Kind, build_turn_base, make_tokenizer

CHAT = TaskSchema(name="talk", format="chat")
ASKED = TaskSchema(name="asked", labels=("yes", "no"), instruction="Which animal is it?", prompt="chat")
PLAIN = TaskSchema(name="plain", labels=("yes", "no"), instruction="Which animal is it?")
TASKS = (CHAT, ASKED, PLAIN)


@pytest.fixture(params=list(KINDS))
def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]


@pytest.fixture
def folder(kind: Kind, made_once: MakeOnce) -> Path:
    return made_once(f"turns-{kind.bos.strip('<>')}", lambda folder: build_turn_base(folder, kind))


@pytest.fixture
def base(folder: Path, tmp_path: Path) -> BaseModel:
    return load_base(str(folder), tmp_path / "cache", precision="fp32")


def input_of(task: TaskSchema) -> str:
    return json.dumps([{"role": "user", "content": "It barks."}]) if task.format == "chat" else "It barks."


def ids_of(base: BaseModel, *tokens: str) -> list[int]:
    return sorted(base.tokenizer.convert_tokens_to_ids(token) for token in tokens)


def test_answers_stop_at_every_end_of_the_generation_config_and_the_tokenizer(base: BaseModel, kind: Kind) -> None:
    assert stop_ids(base.tokenizer) == ids_of(base, *kind.stops)


def test_without_a_generation_config_the_config_and_the_template_say_where_a_turn_ends(
    base: BaseModel, folder: Path, kind: Kind, tmp_path: Path
) -> None:
    for file in folder.iterdir():
        if file.name != "generation_config.json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    wanted = ids_of(base, kind.eos, kind.turn_end)
    assert stop_ids(read_tokenizer(tmp_path, "turns")) == wanted
    loaded = load_base(str(tmp_path), tmp_path / "cache", precision="fp32")
    assert loaded.model.generation_config.eos_token_id == wanted, "what is exported ends as it did here"


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_the_untouched_model_ends_at_its_own_turns_end(base: BaseModel, task: TaskSchema) -> None:
    served = ServedTask(schema=task, max_prompt_tokens=64, max_new_tokens=8)
    inputs = [input_of(task)] * 3
    for answer in answer_inputs(base.model, base.tokenizer, served, inputs):
        assert (answer.text, answer.is_cut) == ("yes", False)
        assert answer.confidence.confidence > 0.9
    rows = Dataset.from_list([{"input": text, "output": "yes"} for text in inputs])
    assert evaluate_task(base.model, base.tokenizer, served, rows).accuracy == 1.0


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_an_answer_is_trained_to_end_as_the_template_ends_a_turn(base: BaseModel, kind: Kind, task: TaskSchema) -> None:
    rows = Dataset.from_list([{"input": input_of(task), "output": "yes"}])
    (row,) = encode_rows(rows, base.tokenizer, task, max_prompt_tokens=64, max_answer_tokens=8)
    text = base.tokenizer.decode(row["prompt_ids"] + row["answer_ids"])
    if not task.uses_chat_template:
        assert text.endswith("Answer: yes" + kind.eos)
        return
    asked = "Which animal is it?\nOption: yes, no\nIt barks." if task.labels else "It barks."
    chat = [{"role": "user", "content": asked}, {"role": "assistant", "content": "yes"}]
    whole = base.tokenizer.apply_chat_template(chat, tokenize=False)
    assert whole.startswith(text) and text.endswith("yes" + kind.turn_end)


def test_a_labels_score_counts_the_end_of_its_turn(base: BaseModel) -> None:
    scores = label_log_probs(base.model, base.tokenizer, ASKED, ["It barks."], max_prompt_tokens=64)
    prompt = encode_prompt(base.tokenizer, ASKED, "It barks.", 64)
    for label, score in zip(ASKED.labels, scores[0].tolist(), strict=True):
        answer = encode_answer(base.tokenizer, ASKED, label, 8)
        with torch.inference_mode():
            shares = base.model(input_ids=torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        places = range(len(prompt) - 1, len(prompt) + len(answer) - 1)
        assert score == pytest.approx(
            sum(shares[place, token].item() for place, token in zip(places, answer, strict=True)), abs=1e-4
        )
    assert scores[0].exp().tolist() == pytest.approx([1.0, 0.0], abs=0.05), "its own answer is all that it would say"


def test_a_template_without_an_end_leaves_the_tokenizers_own(kind: Kind) -> None:
    tokenizer = make_tokenizer(kind)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    assert end_id(tokenizer, in_chat=True) == tokenizer.eos_token_id and stop_ids(tokenizer) == [tokenizer.eos_token_id]
    tokenizer.chat_template = "{{ raise_exception('no such chat') }}"
    assert end_id(tokenizer, in_chat=True) == tokenizer.eos_token_id
    tokenizer.eos_token = None
    assert stop_ids(tokenizer) == []
    with pytest.raises(ConfigError) as refused:
        end_id(tokenizer, in_chat=True)
    assert refused.value.code == "no-end"
