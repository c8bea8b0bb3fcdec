"""Codes of errors: each class has one of its own, and it is a word that programs can compare."""

from __future__ import annotations

import importlib
import pickle
import pkgutil
import re

import pytest

import deal_core
import deal_pipeline
import flows
import infra
import tasks
from deal_core.errors import ConfigError, DealError

SKIPPED = {"infra.ray_worker", "deal_core.training.main"}
"""Programs: their import starts them."""


def all_errors() -> list[type[DealError]]:
    for package in (deal_core, infra, tasks, flows, deal_pipeline):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if module.name not in SKIPPED:
                importlib.import_module(module.name)
    classes, waiting = [], [DealError]
    while waiting:
        waiting += (cls := waiting.pop()).__subclasses__()
        classes.append(cls)
    return sorted({cls for cls in classes if not cls.__module__.startswith("tests")}, key=lambda cls: cls.__name__)


def test_every_class_of_errors_has_a_code_of_its_own() -> None:
    codes = [cls.__dict__.get("code") for cls in all_errors()]
    assert all(code and re.fullmatch(r"[a-z]+(-[a-z]+)*", code) for code in codes)
    assert len(codes) == len(set(codes)) > 20


def test_an_error_is_told_apart_by_its_own_code_also_in_another_process() -> None:
    assert ConfigError("x").code == "setting" and ConfigError("x", code="cron-fields").code == "cron-fields"
    error = pickle.loads(pickle.dumps(ConfigError("x", code="cron-fields")))  # noqa: S301
    assert error.code == "cron-fields" and str(error) == "x"
    with pytest.raises(TypeError):
        DealError("x", kode="y")  # type: ignore[call-arg]
