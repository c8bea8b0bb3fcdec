"""How a run's base model is loaded later."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from tasks.adaptation.run import identify_base
from tasks.base import cached_base


def test_a_base_model_is_lent_with_the_quantization_of_its_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gate, `predict` and `version evaluate` borrow it. To quantize a model takes a GPU."""
    loaded: list[str] = []

    def load(source: str, quantize: str) -> SimpleNamespace:
        loaded.append(quantize)
        return SimpleNamespace(name=source, sha256="0" * 64)

    monkeypatch.setattr("tasks.adaptation.run.load", load)
    monkeypatch.setattr("tasks.base.load", load)
    cached_base(identify_base("a model", "4bit"))
    assert loaded == ["4bit", "4bit"]
