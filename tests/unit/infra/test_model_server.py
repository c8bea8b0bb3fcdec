"""What a model server loads: the project's own loader reads the folder, and no other code."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import mlflow.pyfunc
import pytest

from infra.model_server import ServerError, _load
from infra.served_folder import PEFT_FILES, write_served_folder


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A version's folder, beside a module and code that must not be imported."""
    folder = tmp_path / "version"
    (folder / "code").mkdir(parents=True)
    (tmp_path / "evil_loader.py").write_text("def _load_pyfunc(path): return None\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return folder


def write_mlmodel(folder: Path, **flavors: dict[str, Any]) -> None:
    text = json.dumps({"flavors": flavors, "model_uuid": "m", "utc_time_created": "2026-11-01 00:00:00.000000"})
    (folder / "MLmodel").write_text(text)  # JSON is YAML


@pytest.mark.parametrize(
    ("flavors", "message"),
    [
        ({"python_function": {"loader_module": "evil_loader"}}, "names the loader evil_loader, and nothing but infra"),
        ({"python_function": {"loader_module": "infra.served_model", "code": "code"}}, r"code of its own \(code\)"),
        ({"python_function": {}}, "the loader None"),
        ({"sklearn": {"loader_module": "infra.served_model"}}, "the loader None"),
    ],
)
def test_code_that_a_folder_names_is_not_run(folder: Path, flavors: dict[str, Any], message: str) -> None:
    write_mlmodel(folder, **flavors)
    with pytest.raises(ServerError, match=message):
        _load(folder)
    assert "evil_loader" not in sys.modules
    assert str(folder / "code") not in sys.path


def test_a_folder_as_this_project_writes_it_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter, folder = tmp_path / "adapter", tmp_path / "registered"
    adapter.mkdir()
    for name in PEFT_FILES:
        (adapter / name).write_text("{}")
    write_served_folder(
        adapter, folder, card="", served={"base_name": "b", "base_sha256": "0"}, served_file="deal.json",
        example=[{"input": "x", "task": "bank"}], run_id="r",
    )  # fmt: skip
    monkeypatch.setattr(mlflow.pyfunc, "load_model", lambda path: f"loaded {path}")
    assert _load(folder) == f"loaded {folder}"
