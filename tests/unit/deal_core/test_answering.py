"""A version that answers: what it is made of, what it refuses, and that callers share its model without mixing up."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from deal_core import answering
from deal_core.answering import SERVED_FILE, Answerer, Row, ServedTask, ServedVersion, load_answerer, read_served
from deal_core.config import EvaluateConfig
from deal_core.data.schema import TaskSchema
from deal_core.errors import AdapterStateError, ConfigError
from deal_core.evaluate import generate_answers
from deal_core.models import BaseModel

CHAT = TaskSchema(name="help", format="chat")
TEXTS = [f"message {number} about the sea {'and more ' * (number % 4)}" for number in range(8)]


@pytest.fixture
def version(base: BaseModel, tiny_base: Path, task: TaskSchema) -> ServedVersion:
    return ServedVersion(
        lineage="l", base_source=str(tiny_base), base_name=base.name, base_sha256=base.sha256, newest_task="colours",
        tasks=(ServedTask(schema=CHAT, max_prompt_tokens=64, max_new_tokens=3),
               ServedTask(schema=task, max_prompt_tokens=64, max_new_tokens=5)),
    )  # fmt: skip


@pytest.fixture
def folder(parent: Path, version: ServedVersion) -> Path:
    (parent / SERVED_FILE).write_text(json.dumps(version.to_json()))
    return parent


@pytest.fixture
def answerer(folder: Path, tmp_path: Path) -> Answerer:
    return load_answerer(folder, tmp_path / "cache")


def test_what_lies_beside_the_adapter_is_read_back(folder: Path, version: ServedVersion) -> None:
    assert read_served(folder) == version
    of_a_file = replace(version.tasks[1], schema=replace(version.tasks[1].schema, columns={"text": "t"}))
    assert replace(version, tasks=(version.tasks[0], of_a_file)).to_json() == version.to_json(), "columns are of no use"
    later = {**version.to_json(), "schema_version": 2}
    with pytest.raises(AdapterStateError, match="schema version 2"):
        ServedVersion.from_json(later)


def test_a_folder_from_before_versions_could_be_served_is_told_apart(parent: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterStateError, match=r"no deal\.json.*registered before"):
        load_answerer(parent, tmp_path / "cache")


def test_another_base_model_is_refused(folder: Path, version: ServedVersion, tiny_base: Path, tmp_path: Path) -> None:
    moved = {**version.to_json(), "base_source": "/was/there/once"}
    (folder / SERVED_FILE).write_text(json.dumps(moved))
    with pytest.raises(ConfigError, match="/was/there/once"):
        load_answerer(folder, tmp_path / "cache")
    assert load_answerer(folder, tmp_path / "cache", str(tiny_base)).answer([Row("the sea")])
    (folder / SERVED_FILE).write_text(json.dumps({**moved, "base_sha256": "f" * 64}))
    with pytest.raises(ConfigError, match=r"ffffffffffff.*is another one.*DEAL_BASE_MODEL"):
        load_answerer(folder, tmp_path / "cache", str(tiny_base))


def test_answers_are_those_of_the_task_that_a_row_names(
    answerer: Answerer, base: BaseModel, version: ServedVersion
) -> None:
    chat = json.dumps([{"role": "user", "content": "the sea"}])
    rows = [Row("the sea", "colours"), Row(chat, "help"), Row("the moss")]

    def alone(text: str, number: int) -> str:
        known = version.tasks[number]
        return generate_answers(
            answerer._model, base.tokenizer, known.schema, [text],
            EvaluateConfig(max_new_tokens=known.max_new_tokens), max_prompt_tokens=known.max_prompt_tokens,
        )[0]  # fmt: skip

    assert answerer.answer(rows) == [alone("the sea", 1), alone(chat, 0), alone("the moss", 1)]
    assert answerer.answer([]) == []


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (Row("x", "nope"), "Row 2 names the task 'nope'; this version knows help, colours"),
        (Row(" \n"), "Row 2 has an empty input"),
        (Row("hello", "help"), "Row 2 is of the chat task help, whose input is a JSON list"),
        (Row('{"role": "user"}', "help"), "Row 2 is of the chat task"),
        (Row("[]", "help"), "Row 2 is of the chat task"),
        (Row('[{"role": "user"}]', "help"), "Row 2 is of the chat task"),
        (Row('[{"role": "user", "content": null}]', "help"), "Row 2 is of the chat task"),
    ],
)
def test_a_row_that_cannot_be_asked_is_named(version: ServedVersion, row: Row, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        version.asked(row, 2)


def test_what_is_asked_is_normalised_as_learned_rows_are(version: ServedVersion) -> None:
    asked = [version.asked(row, 1)[1] for row in (
        Row(" the sea\r\nis green\n"), Row(json.dumps([{"role": "user", "content": "a\r\nb "}]), "help")
    )]  # fmt: skip
    assert asked == ["the sea\nis green", json.dumps([{"role": "user", "content": "a\nb "}])]


def test_callers_that_come_together_are_answered_in_one_batch(
    answerer: Answerer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first caller is held inside the model until all others wait; then one more pass answers them all."""
    alone = {text: answerer.answer([Row(text)])[0] for text in TEXTS}
    sizes, inside, may_go_on = [], threading.Event(), threading.Event()

    def generate(model, tokenizer, task, inputs, config, **limits):
        sizes.append(len(inputs))
        inside.set()
        assert may_go_on.wait(30)
        return generate_answers(model, tokenizer, task, inputs, config, **limits)

    monkeypatch.setattr(answering, "generate_answers", generate)
    with ThreadPoolExecutor(len(TEXTS)) as pool:
        futures = [pool.submit(answerer.answer, [Row(TEXTS[0])])]
        assert inside.wait(30)
        futures += [pool.submit(answerer.answer, [Row(text)]) for text in TEXTS[1:]]
        while len(answerer._waiting) < len(TEXTS) - 1:
            pass
        may_go_on.set()
        assert [future.result()[0] for future in futures] == list(alone.values())
    assert sizes == [1, len(TEXTS) - 1]
    assert len(set(alone.values())) > 1, "answers that are all the same cannot be mixed up"


def test_one_caller_that_breaks_the_model_fails_alone(answerer: Answerer, monkeypatch: pytest.MonkeyPatch) -> None:
    def generate(model, tokenizer, task, inputs, config, **limits):
        if any("poison" in text for text in inputs):
            raise RuntimeError("the model broke")
        return [text.upper() for text in inputs]

    monkeypatch.setattr(answering, "generate_answers", generate)
    good, bad = (answering._Request([(answerer.served.tasks[1], text)]) for text in ("good", "poison"))
    answerer._answer_together([good, bad])
    assert (good.answers, good.error, good.is_done) == (["GOOD"], None, True)
    assert isinstance(bad.error, RuntimeError) and bad.is_done
    with pytest.raises(RuntimeError, match="the model broke"):
        answerer.answer([Row("poison")])
    assert answerer.answer([Row("fine")]) == ["FINE"]
