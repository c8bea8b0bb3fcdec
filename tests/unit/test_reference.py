"""Every command has a schema of what it prints."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from typer.main import get_command

from deal_pipeline import Home, Lineage
from deal_pipeline.cli.app import app
from deal_pipeline.cli.session import CommandResult, Events, Session
from docs.site.printed import printed_by, schema_of
from docs.site.python_api import INNER, python_page
from docs.site.reference import spec_schema
from tasks.spec import SPEC_SCHEMA
from tests.printed import command_of, commands, require_described


def names_of(command: Any, path: str) -> Iterator[str]:
    parts = getattr(command, "commands", {})
    for name, part in parts.items():
        yield from names_of(part, f"{path} {name}")
    if not parts:
        yield path


def test_every_command_has_a_schema() -> None:
    names = sorted(names_of(get_command(app), "deal"))
    assert sorted(commands()) == names
    for printed in commands().values():
        Draft202012Validator.check_schema(schema_of(printed))


def test_the_schema_of_a_spec_is_that_of_the_settings() -> None:
    assert spec_schema() == SPEC_SCHEMA.read_text(encoding="utf-8"), "make schema"
    schema = json.loads(spec_schema())
    Draft202012Validator.check_schema(schema)
    strategy = Draft202012Validator(schema["properties"]["strategy"])
    assert strategy.is_valid("deal") and strategy.is_valid("one_of_another_package")
    assert "Passes over the training rows" in schema["$defs"]["TrainConfig"]["properties"]["num_epochs"]["description"]


def test_the_python_reference_has_every_public_method_and_the_fields_of_its_result() -> None:
    page = python_page()
    for kind in (Lineage, Home):
        names = [name for name, member in vars(kind).items() if not name.startswith("_") and callable(member)]
        assert [name for name in names if f"### {kind.__name__}.{name}\n" not in page and name not in INNER] == []
    assert "| `left_behind` |" in page, "a field of a result"
    assert "- `RegistryError`: There is no such version, or the gate has rejected it." in page


def silent(deal: Session) -> None: ...


def unnamed(deal: Session) -> CommandResult: ...  # type: ignore[type-arg]


def named(deal: Session) -> CommandResult[int]: ...


def told(deal: Session) -> Events[int]: ...


@pytest.mark.parametrize("function", [silent, unnamed])
def test_a_command_has_to_name_what_it_prints(function: Any) -> None:
    with pytest.raises(TypeError, match=f"{function.__name__} returns .*; name the type that --json prints"):
        printed_by(function)
    assert (printed_by(named).kind, printed_by(named).are_lines) == (int, False)
    assert (printed_by(told).kind, printed_by(told).are_lines) == (int, True)


@pytest.mark.parametrize("wrong", [{"ended": [1]}, {}, {"ended": [], "more": 1}, []])
def test_other_json_than_the_schemas_fails_a_test(wrong: Any) -> None:
    require_described(command_of(["server", "down", "--home", "x"]), {"ended": ["worker"]})
    with pytest.raises(pytest.fail.Exception, match="no schema describes"):
        require_described("deal server down", wrong)
