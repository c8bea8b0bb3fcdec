"""Which version `deal predict` asks."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

import tasks.predict
from deal_core.errors import RegistryError
from tasks.predict import choose_version


def test_a_champion_that_was_rejected_is_asked_by_its_number_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = {"accepted": True, "reasons": (), "approval": None, "promoted": None}
    found = SimpleNamespace(lineage="l", version="2", **facts)
    monkeypatch.setattr(tasks.predict, "open_reader", lambda: None)
    monkeypatch.setattr(tasks.predict, "_settled_champion", lambda *_: None)
    monkeypatch.setattr(tasks.predict, "find_version", lambda registry, lineage, number: found)
    assert choose_version("l", None) is found
    found.approval = "refused"
    with pytest.raises(RegistryError, match="Version 2 of 'l' is champion in MLflow but was rejected by a person"):
        choose_version("l", None)
    assert choose_version("l", "2") is found, "to look at what it answers is no serving"
