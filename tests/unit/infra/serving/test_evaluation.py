"""The engine that answers test rows, apart from its answers."""

from __future__ import annotations

from typing import cast

import pytest

from deal_core.base_model.load import BaseModel
from deal_core.errors import ConfigError
from infra.serving.evaluation import evaluation_engine
from infra.serving.vllm import EngineAwayError
from infra.store.base import ObjectStore

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
