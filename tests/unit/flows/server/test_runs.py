"""Where a Prefect server may be named, so that Prefect must be asked."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from flows.server.runs import may_name_a_server


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """An environment in which nothing names a server, and a folder without Prefect's files as the working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "prefect", raising=False)
    return {"PREFECT_HOME": str(tmp_path / "prefect"), "PREFECT_LOGGING_SETTINGS_PATH": "logging.yml"}


def test_without_a_variable_and_a_file_there_is_no_server(bare: dict[str, str]) -> None:
    assert not may_name_a_server(bare)
    Path("pyproject.toml").write_text('[project]\nname = "mine"\ndependencies = ["prefect"]\n')
    assert not may_name_a_server(bare)


@pytest.mark.parametrize("name", ["PREFECT_API_URL", "PREFECT_PROFILE", "PREFECT_PROFILES_PATH"])
def test_a_variable_may_name_a_server(bare: dict[str, str], name: str) -> None:
    assert may_name_a_server({**bare, name: "something"})
    assert not may_name_a_server({**bare, name: ""})


@pytest.mark.parametrize(
    ("file", "text"),
    [
        (".env", "PREFECT_API_URL=http://127.0.0.1:4200/api"),
        ("prefect.toml", ""),
        ("pyproject.toml", '[tool.prefect]\napi.url = "http://127.0.0.1:4200/api"\n'),
        ("prefect/profiles.toml", 'active = "mine"\n'),
    ],
)
def test_a_file_that_prefect_reads_may_name_a_server(bare: dict[str, str], file: str, text: str) -> None:
    Path(file).parent.mkdir(exist_ok=True)
    Path(file).write_text(text)
    assert may_name_a_server(bare)


def test_prefects_own_home_is_not_looked_into(bare: dict[str, str]) -> None:
    del bare["PREFECT_HOME"]
    assert may_name_a_server(bare)


def test_prefect_is_asked_where_it_is_imported_anyway(bare: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prefect", sys)
    assert may_name_a_server(bare)
