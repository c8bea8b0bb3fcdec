"""A version that answers: callers share its model without mixing up, and another version can take its place."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from deal_core.base_model.load import BaseModel, load_base
from deal_core.config import AdapterConfig
from deal_core.data.prompts import encode_prompt
from deal_core.errors import AdapterStateError, ConfigError
from deal_core.evaluation import answerer as answerer_module
from deal_core.evaluation import generation
from deal_core.evaluation.answerer import MAX_ROWS_CPU, Answerer, GivenUpError, load_answerer
from deal_core.evaluation.answering import SERVED_FILE, InputRow, ServedVersion
from deal_core.evaluation.generation import Confidence, GivenAnswer, answer_inputs, answer_prompts
from tests.unit.deal_core.conftest import SHORT

TEXTS = [f"message {number} about the sea {'and more ' * (number % 4)}" for number in range(MAX_ROWS_CPU)]
WAIT_SECONDS = 60


@pytest.fixture
def answerer(served_folder: Path, tmp_path: Path) -> Answerer:
    return load_answerer(served_folder, tmp_path / "cache", version="1")


NewVersion = Callable[..., Path]


@pytest.fixture
def new_version(train: Any, served_version: ServedVersion) -> NewVersion:
    """Train an adapter that gives other answers; return the folder of its version."""

    def make(**changes: Any) -> Path:
        settings = replace(SHORT, max_steps=12, learning_rate=3e-2, seed=5)
        folder: Path = train("seq_lora", train=settings, **changes).folder
        (folder / SERVED_FILE).write_text(json.dumps(served_version.to_json()))
        return folder

    return make


def answers_alone(folder: Path, tmp_path: Path) -> list[str]:
    alone = load_answerer(folder, tmp_path / "cache")
    return [alone.answer([InputRow(text)])[0] for text in TEXTS]


def test_a_folder_that_is_not_a_whole_version_is_refused(parent: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterStateError, match=r"no deal\.json, so it is not the whole folder"):
        load_answerer(parent, tmp_path / "cache")


def test_another_base_model_is_refused(
    served_folder: Path, served_version: ServedVersion, tiny_base: Path, tmp_path: Path
) -> None:
    moved = {**served_version.to_json(), "base_source": "/was/there/once"}
    (served_folder / SERVED_FILE).write_text(json.dumps(moved))
    with pytest.raises(ConfigError, match="/was/there/once"):
        load_answerer(served_folder, tmp_path / "cache")
    assert load_answerer(served_folder, tmp_path / "cache", str(tiny_base)).answer([InputRow("the sea")])
    (served_folder / SERVED_FILE).write_text(json.dumps({**moved, "base_sha256": "f" * 64}))
    with pytest.raises(ConfigError, match=r"ffffffffffff.*is another one.*DEAL_BASE_MODEL"):
        load_answerer(served_folder, tmp_path / "cache", str(tiny_base))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine can quantize")
def test_a_version_that_was_judged_in_4_bits_is_served_in_4_bits_or_not_at_all(
    answerer: Answerer, served_folder: Path, served_version: ServedVersion, tmp_path: Path
) -> None:
    (served_folder / SERVED_FILE).write_text(json.dumps(replace(served_version, quantize="4bit").to_json()))
    with pytest.raises(ConfigError, match=r"train\.quantize is 4bit") as refused:
        load_answerer(served_folder, tmp_path / "cache")
    assert refused.value.code == "quantize"
    for let_in in (answerer.swap, answerer.add_candidate):
        with pytest.raises(ConfigError) as refused:
            let_in(served_folder, "2")
        assert refused.value.code == "other-base"
    assert answerer.answer([InputRow("the sea")]) and answerer.version == "1"


def test_answers_are_those_of_the_task_that_a_row_names(
    answerer: Answerer, base: BaseModel, served_version: ServedVersion
) -> None:
    chat = json.dumps([{"role": "user", "content": "the sea"}])
    rows = [InputRow("the sea", "colours"), InputRow(chat, "help"), InputRow("the moss")]

    def alone(text: str, number: int) -> str:
        known = served_version.tasks[number]
        return answer_inputs(answerer._model, base.tokenizer, known, [text])[0].text

    assert answerer.answer(rows) == [alone("the sea", 1), alone(chat, 0), alone("the moss", 1)]
    assert answerer.answer([]) == []
    assert answerer.ask([]).version == "1"


class HeldModel:
    """`answer_prompts` that waits at its first call until the test lets it continue."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, answer: Callable[..., Any] = answer_prompts) -> None:
        self.batches: list[list[str]] = []
        self.is_inside, self.may_go_on, self._answer = threading.Event(), threading.Event(), answer
        monkeypatch.setattr(generation, "answer_prompts", self._generate)

    def _generate(self, model: Any, tokenizer: Any, task: Any, prompts: Any) -> Any:
        self.batches.append(tokenizer.batch_decode(prompts))
        self.is_inside.set()
        assert self.may_go_on.wait(WAIT_SECONDS)
        return self._answer(model, tokenizer, task, prompts)


def wait_until_waiting(answerer: Answerer, number: int) -> None:
    """Wait for so many callers whose first prompts are prepared."""
    deadline = time.monotonic() + WAIT_SECONDS
    while len(answerer._waiting) != number:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_callers_that_come_together_are_answered_in_one_batch(
    answerer: Answerer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first caller is held inside the model until all others wait; then one more pass answers them all."""
    alone = [answerer.answer([InputRow(text)])[0] for text in TEXTS]
    held = HeldModel(monkeypatch)
    asked = [answerer.submit([InputRow(TEXTS[0])])]
    assert held.is_inside.wait(WAIT_SECONDS)
    asked += [answerer.submit([InputRow(text)]) for text in TEXTS[1:]]
    wait_until_waiting(answerer, len(TEXTS))
    held.may_go_on.set()
    assert [each.result(WAIT_SECONDS).answers[0] for each in asked] == alone
    assert [len(batch) for batch in held.batches] == [1, len(TEXTS) - 1]
    assert len(set(alone)) > 1, "answers that are all the same cannot be mixed up"


def test_a_caller_with_many_rows_holds_nobody_up(answerer: Answerer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches are bounded, and a caller whose rows are not all answered waits behind the others."""
    held = HeldModel(monkeypatch)
    many = [InputRow(text) for text in TEXTS * 3]
    large = answerer.submit(many)
    assert held.is_inside.wait(WAIT_SECONDS)
    small = answerer.submit([InputRow("a short message")])
    wait_until_waiting(answerer, 2)
    held.may_go_on.set()
    assert large.result(WAIT_SECONDS).answers == answerer.answer(many[: len(TEXTS)]) * 3
    assert len(small.result(WAIT_SECONDS).answers) == 1
    assert [len(batch) for batch in held.batches[:4]] == [MAX_ROWS_CPU, MAX_ROWS_CPU, MAX_ROWS_CPU, 1]
    assert any("a short message" in prompt for prompt in held.batches[1])


def test_one_caller_that_breaks_the_model_fails_alone(answerer: Answerer, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(model: Any, tokenizer: Any, task: Any, prompts: Any) -> Any:
        texts = [prompt.split("\n")[-2] for prompt in tokenizer.batch_decode(prompts)]
        if any("poison" in text for text in texts):
            raise RuntimeError("the model broke")
        return [GivenAnswer(text.upper(), Confidence(1.0, None), False) for text in texts]

    held = HeldModel(monkeypatch, answer)
    first = answerer.submit([InputRow("first")])
    assert held.is_inside.wait(WAIT_SECONDS)
    good, bad = (answerer.submit([InputRow(text)]) for text in ("good", "poison"))
    wait_until_waiting(answerer, 3)
    held.may_go_on.set()
    assert [each.result(WAIT_SECONDS).answers for each in (first, good)] == [["FIRST"], ["GOOD"]]
    with pytest.raises(RuntimeError, match="the model broke"):
        bad.result(WAIT_SECONDS)
    assert answerer.answer([InputRow("fine")]) == ["FINE"]


@pytest.mark.parametrize(
    "changes", [{}, {"rank": 2}, {"rank": 7, "alpha": 3.0}, {"target_modules": ("q_proj", "o_proj")}]
)
def test_another_version_answers_as_if_it_were_loaded_alone(
    answerer: Answerer, served_folder: Path, new_version: NewVersion, tmp_path: Path, changes: dict[str, Any]
) -> None:
    folder = new_version(adapter=AdapterConfig(**{"rank": 4, **changes}))
    before, wanted = answers_alone(served_folder, tmp_path), answers_alone(folder, tmp_path)
    assert before != wanted
    num_parameters = sum(each.numel() for each in load_answerer(folder, tmp_path / "cache")._model.parameters())
    for source, version, answers in (
        (folder, "2", wanted),
        (served_folder, "1", before),
        (folder, "2", wanted),
        (folder, "3", wanted),
    ):
        answerer.swap(source, version)
        found = answerer.ask([InputRow(text) for text in TEXTS])
        assert (found.answers, found.version, answerer.version) == (answers, version, version)
        assert len(answerer._model.peft_config) == 1
    assert sum(each.numel() for each in answerer._model.parameters()) == num_parameters
    assert not any(each.requires_grad for each in answerer._model.parameters())


def test_a_version_that_does_not_fit_changes_nothing(
    answerer: Answerer, new_version: NewVersion, served_version: ServedVersion, served_folder: Path, tmp_path: Path
) -> None:
    before = answers_alone(served_folder, tmp_path)
    folder = new_version(adapter=AdapterConfig(rank=2))
    weights = folder / "adapter_model.safetensors"
    tensors = load_file(weights)
    save_file(
        {
            name: torch.zeros(3, 3) if number == 5 else tensor
            for number, (name, tensor) in enumerate(sorted(tensors.items()))
        },
        weights,
    )
    with pytest.raises(AdapterStateError, match=r"has shape \[3, 3\]"):
        answerer.swap(folder, "2")
    (served_folder / SERVED_FILE).write_text(json.dumps(replace(served_version, base_sha256="f" * 64).to_json()))
    with pytest.raises(ConfigError, match="ffffffffffff"):
        answerer.swap(served_folder, "2")
    assert (answerer.answer([InputRow(text) for text in TEXTS]), answerer.version) == (before, "1")
    assert len(answerer._model.peft_config) == 1


def test_another_base_model_takes_over_with_its_version(
    answerer: Answerer,
    served_folder: Path,
    served_version: ServedVersion,
    base: BaseModel,
    tiny_base: Path,
    tmp_path: Path,
) -> None:
    other = load_base(str(tiny_base), tmp_path / "cache", precision="fp32")
    with torch.no_grad():
        other.model.get_output_embeddings().weight.neg_()
    other = replace(other, sha256="e" * 64)
    (served_folder / SERVED_FILE).write_text(json.dumps(replace(served_version, base_sha256="e" * 64).to_json()))
    before = answerer.answer([InputRow(text) for text in TEXTS])
    answerer.swap(served_folder, "2", other)
    assert answerer.answer([InputRow(text) for text in TEXTS]) != before
    assert (answerer.held_base, answerer.version) == (("e" * 64, "none"), "2")
    assert not any(each is base.model for each in answerer._model.modules())


def test_a_swap_waits_for_no_batch_and_what_was_computed_is_answered_by_the_new_version(
    answerer: Answerer, new_version: NewVersion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = new_version()
    wanted = answers_alone(folder, tmp_path)
    held = HeldModel(monkeypatch)
    asking = [answerer.submit([InputRow(text) for text in TEXTS])]
    assert held.is_inside.wait(WAIT_SECONDS)
    asking.append(answerer.submit([InputRow(TEXTS[0])]))
    wait_until_waiting(answerer, 2)
    with ThreadPoolExecutor(1) as pool:
        swapping = pool.submit(answerer.swap, folder, "2")
        while not answerer._changes:
            assert not swapping.done()
        held.may_go_on.set()
    first, second = (each.result(WAIT_SECONDS) for each in asking)
    assert (first.version, first.answers) == ("2", wanted)
    assert (second.version, second.answers) == ("2", wanted[:1])


def test_what_nobody_waits_for_is_not_computed_and_a_stop_ends_the_rest(
    answerer: Answerer, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = HeldModel(monkeypatch)
    first = answerer.submit([InputRow(TEXTS[0])])
    assert held.is_inside.wait(WAIT_SECONDS)
    gone = answerer.submit([InputRow(TEXTS[1])])
    wait_until_waiting(answerer, 2)
    assert gone.cancel()
    held.may_go_on.set()
    first.result(WAIT_SECONDS)
    assert len(held.batches) == 1
    held.may_go_on.clear()
    held.is_inside.clear()
    last = answerer.submit([InputRow(TEXTS[0])])
    assert held.is_inside.wait(WAIT_SECONDS)
    answerer.stop()
    held.may_go_on.set()
    with pytest.raises(GivenUpError, match="stopping"):
        last.result(WAIT_SECONDS)


def test_a_batch_whose_callers_have_all_gone_ends_before_the_next_layer(
    answerer: Answerer, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = HeldModel(monkeypatch)
    asked = [answerer.submit([InputRow(text)]) for text in TEXTS[:2]]
    assert held.is_inside.wait(WAIT_SECONDS)
    wait_until_waiting(answerer, 2)
    layers: list[int] = []
    for module in answerer._model.modules():
        if isinstance(module, torch.nn.ModuleList):
            for layer in module:
                layer.register_forward_hook(lambda *_: layers.append(1))
    assert all(result.cancel() for result in asked)
    held.may_go_on.set()
    wait_until_waiting(answerer, 0)
    assert layers == []
    assert answerer.answer([InputRow(TEXTS[0])]), "the next caller is answered"


class HeldPrompt:
    """`encode_prompt` that waits at each text with "long" until the test lets it continue."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.num_prepared = 0
        self.is_inside, self.may_go_on = threading.Event(), threading.Event()
        monkeypatch.setattr(answerer_module, "encode_prompt", self._encode)

    def _encode(self, tokenizer: Any, task: Any, text: str, max_prompt_tokens: int) -> list[int]:
        if "long" in text:
            self.is_inside.set()
            assert self.may_go_on.wait(WAIT_SECONDS)
        self.num_prepared += 1
        return encode_prompt(tokenizer, task, text, max_prompt_tokens)


def test_a_prompt_that_takes_long_to_prepare_holds_nobody_up(
    answerer: Answerer, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = HeldPrompt(monkeypatch)
    long = answerer.submit([InputRow("a long text")])
    assert held.is_inside.wait(WAIT_SECONDS)
    assert answerer.answer([InputRow(text) for text in TEXTS * 3])
    assert not long.done()
    held.may_go_on.set()
    assert long.result(WAIT_SECONDS).answers == answerer.answer([InputRow("a long text")])


@pytest.mark.parametrize("end", ["gone", "drain", "stop"])
def test_between_two_prompts_it_is_looked_whether_they_are_still_wanted(
    answerer: Answerer, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    """The client has left, or the server ends. The model answers nothing of it."""
    prompts, model = HeldPrompt(monkeypatch), HeldModel(monkeypatch)
    asked = answerer.submit([InputRow("a long text")] * 5)
    assert prompts.is_inside.wait(WAIT_SECONDS)
    {"gone": asked.cancel, "drain": answerer.drain, "stop": answerer.stop}[end]()
    prompts.may_go_on.set()
    with pytest.raises(CancelledError if end == "gone" else GivenUpError):
        asked.result(WAIT_SECONDS)
    answerer._preparing.shutdown()
    assert (prompts.num_prepared, model.batches, answerer._waiting) == (1, [], [])


def test_what_waits_for_the_model_is_answered_though_the_server_ends(
    answerer: Answerer, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = HeldModel(monkeypatch)
    rows = [InputRow(text) for text in TEXTS * 4]
    asked = answerer.submit(rows)
    assert held.is_inside.wait(WAIT_SECONDS)
    answerer.drain()
    held.may_go_on.set()
    assert len(asked.result(WAIT_SECONDS).answers) == len(rows)
    with pytest.raises(GivenUpError):
        answerer.answer(rows)


def test_prompts_are_prepared_for_the_next_batches_only(answerer: Answerer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request of a million rows does not fill the memory with prompts."""
    prompts, model = HeldPrompt(monkeypatch), HeldModel(monkeypatch)
    asked = answerer.submit([InputRow(text) for text in TEXTS * 9])
    assert model.is_inside.wait(WAIT_SECONDS)
    assert prompts.num_prepared <= 3 * MAX_ROWS_CPU
    model.may_go_on.set()
    assert asked.result(WAIT_SECONDS).answers == answerer.answer([InputRow(text) for text in TEXTS]) * 9
    assert all(len(batch) == MAX_ROWS_CPU for batch in model.batches)


def test_a_version_that_takes_over_while_prompts_are_prepared_asks_in_its_own_way(
    answerer: Answerer, new_version: NewVersion, served_version: ServedVersion, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts of the version before are dropped, also those after the first batch."""
    folder = new_version()
    other = replace(served_version.tasks[1].schema, instruction="Another question")
    tasks = (served_version.tasks[0], replace(served_version.tasks[1], schema=other))
    (folder / SERVED_FILE).write_text(json.dumps(replace(served_version, tasks=tasks).to_json()))
    prompts, model = HeldPrompt(monkeypatch), HeldModel(monkeypatch)
    rows = [InputRow(text) for text in (*TEXTS, "a long text", *TEXTS, *TEXTS)]
    asked = answerer.submit(rows)
    assert prompts.is_inside.wait(WAIT_SECONDS)
    answerer.swap(folder, "2")
    prompts.may_go_on.set()
    model.may_go_on.set()
    found = asked.result(WAIT_SECONDS)
    assert (found.version, len(found.answers)) == ("2", len(rows))
    assert all("Another question" in prompt for batch in model.batches for prompt in batch)
    assert found.answers == answerer.answer(rows)


def test_a_candidate_answers_next_to_the_version_and_changes_none_of_its_answers(
    answerer: Answerer, new_version: NewVersion, served_folder: Path, tmp_path: Path
) -> None:
    rows = [InputRow(text) for text in TEXTS]
    with pytest.raises(GivenUpError):
        answerer.submit(rows, by_candidate=True).result()
    folder, other = new_version(adapter=AdapterConfig(rank=2)), new_version()
    first, second, third = (answers_alone(each, tmp_path) for each in (served_folder, folder, other))
    assert len({*map(tuple, (first, second, third))}) == 3

    def both() -> list[tuple[list[str], str]]:
        found = [answerer.submit(rows, by_candidate=each).result() for each in (False, True)]
        return [(each.answers, each.version) for each in found]

    answerer.add_candidate(folder, "2")
    assert both() == [(first, "1"), (second, "2")]
    answerer.swap(other, "3")
    assert both() == [(third, "3"), (second, "2")], "the champion may move while a candidate is tried"
    answerer.add_candidate(served_folder, "4")
    assert both() == [(third, "3"), (first, "4")]
    (served_folder / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterStateError):
        answerer.add_candidate(served_folder, "5")
    answerer.drop_candidate()
    with pytest.raises(GivenUpError):
        answerer.submit(rows, by_candidate=True).result()
    assert answerer.ask(rows).answers == third and len(answerer._model.peft_config) == 1
    assert not any(each.requires_grad for each in answerer._model.parameters())


def test_rows_in_the_background_give_way_to_all_others(
    answerer: Answerer, new_version: NewVersion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = new_version()
    wanted = answers_alone(folder, tmp_path)
    answerer.add_candidate(folder, "2")
    held = HeldModel(monkeypatch)
    copy = answerer.submit([InputRow(text) for text in TEXTS], by_candidate=True, in_background=True)
    assert held.is_inside.wait(WAIT_SECONDS)
    asked = answerer.submit([InputRow(TEXTS[0])])
    wait_until_waiting(answerer, 2)
    held.may_go_on.set()
    assert asked.result(WAIT_SECONDS).version == "1"
    assert (copy.result(WAIT_SECONDS).answers, copy.result().version) == (wanted, "2")
    assert [len(batch) for batch in held.batches] == [len(TEXTS), 1, len(TEXTS)], "it was interrupted, and began again"


def test_the_tokens_of_prompts_and_answers_are_counted(
    answerer: Answerer, base: BaseModel, served_version: ServedVersion
) -> None:
    task = served_version.tasks[1]
    texts = [text.strip() for text in TEXTS]
    prompts = [encode_prompt(base.tokenizer, task.schema, text, task.max_prompt_tokens) for text in texts]
    found = answerer.ask([InputRow(text, "colours") for text in texts])
    given = answer_prompts(answerer._model, base.tokenizer, task, prompts)
    assert found.usage == {
        "prompt_tokens": sum(map(len, prompts)),
        "completion_tokens": sum(answer.num_tokens for answer in given),
    }
    assert found.is_cut == [answer.is_cut for answer in given]
    longest = generation.answer_limit(base.tokenizer, task.schema, task.max_new_tokens)
    assert all(0 < answer.num_tokens <= longest for answer in given)
    assert all(answer.num_tokens == longest for answer in given if answer.is_cut)
