"""The engine that answers test rows, apart from its answers."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import pytest

from deal_core.base_model.load import BaseModel, load_base
from deal_core.base_model.turn_ends import stop_ids
from deal_core.data.schema import TaskSchema
from deal_core.errors import ConfigError
from deal_core.evaluation.answering import ServedTask
from deal_core.evaluation.generation import answer_inputs
from infra.serving.evaluation import evaluation_engine
from infra.serving.vllm import EngineAwayError
from infra.store.base import ObjectStore
from infra.store.local import FileStore
from tests.fake_vllm import FakeVllm, running
from tests.turn_bases import KINDS, build_turn_base

STORE = cast(ObjectStore, None)


def load() -> BaseModel:
    """Neither the store nor the base model is looked at before the engine answers."""
    return cast(BaseModel, None)


def test_without_the_setting_the_process_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DEAL_EVALUATE_ENGINE", raising=False)
    assert evaluation_engine(STORE, load) is None


def test_a_password_in_the_address_is_refused_and_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEAL_EVALUATE_ENGINE", "http://me:planted@127.0.0.1:9")
    with pytest.raises(ConfigError, match="give DEAL_ENGINE_API_KEY instead") as refused:
        evaluation_engine(STORE, load)
    assert "planted" not in str(refused.value)


def test_an_engine_that_is_away_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("infra.serving.evaluation.MAX_ATTEMPTS", 1)
    monkeypatch.setenv("DEAL_EVALUATE_ENGINE", "http://127.0.0.1:9")
    with pytest.raises(EngineAwayError, match=r"The engine at http://127\.0\.0\.1:9 does not answer"):
        evaluation_engine(STORE, load)


@pytest.mark.parametrize("kind", KINDS)
def test_an_engine_ends_an_answer_where_the_base_models_turn_ends(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_turn_base(tmp_path / "base", KINDS[kind])
    base = load_base(str(tmp_path / "base"), tmp_path / "cache", precision="fp32")
    schema = TaskSchema(name="asked", format="completion", prompt="chat")
    task, inputs = ServedTask(schema=schema, max_prompt_tokens=64, max_new_tokens=8), ["It barks.", "Which is it?"]
    fake = FakeVllm(tmp_path / "base")
    with running(fake):
        monkeypatch.setenv("DEAL_EVALUATE_ENGINE", fake.url)
        engine = evaluation_engine(FileStore(tmp_path / "store"), lambda: base)
        assert engine is not None
        with engine.answering(None) as answer:
            given = answer(task, inputs, None)
    assert {body["ignore_eos"] for body in fake.bodies if "allowed_token_ids" not in body} == {True}
    assert all(
        body["stop_token_ids"] == stop_ids(base.tokenizer) for body in fake.bodies if "allowed_token_ids" not in body
    )
    here = answer_inputs(base.model, base.tokenizer, task, inputs)
    assert [(row.text, row.is_cut) for row in given] == [(row.text, row.is_cut) for row in here] == [("yes", False)] * 2
