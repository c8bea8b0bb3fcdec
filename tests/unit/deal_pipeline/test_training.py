"""A training names a flow, and its fields are arguments of that flow."""

from __future__ import annotations

import inspect
from pkgutil import resolve_name
from typing import Any, get_args

import pytest
from pydantic import TypeAdapter

from deal_pipeline.training import Consolidate, Training


@pytest.mark.parametrize("training", get_args(Training), ids=lambda training: training.__name__)
def test_a_training_has_the_arguments_of_its_flow_and_the_type_of_its_result(training: Any) -> None:
    flow = resolve_name(training.flow)
    asked = inspect.signature(flow.fn).parameters
    fields = training.model_fields.keys() - {"kind"}
    assert fields <= asked.keys()
    needed = {name for name, parameter in asked.items() if parameter.default is parameter.empty}
    assert needed <= {name for name in fields if training.model_fields[name].is_required()}
    TypeAdapter(training.model_construct().result_type())  # a type that a result can be read as


def test_the_flow_gets_the_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flows.consolidate.consolidate", lambda **arguments: arguments)
    training = Consolidate(lineage="l", start="base")
    assert training.coroutine() == {"lineage": "l", "start": "base"}
    assert Consolidate.model_validate_json(training.model_dump_json()) == training
