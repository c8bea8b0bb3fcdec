"""A command that only reads or answers imports no library that it does not need: the imports are most of its start."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from infra.settings import TrackingSettings
from infra.tracking.database import open_reader
from infra.tracking.registry import Registry

ROOT = Path(__file__).parents[2]
RUN = """
import json, sys
from flows.cli.app import main
code = 0
try:
    main()
except SystemExit as ended:
    code = ended.code
print(json.dumps({"code": code, "modules": [name for name in sys.modules if "." not in name]}))
"""
SERVICES = {"prefect", "mlflow", "sqlalchemy", "fastapi"}
LEARNING = {"torch", "transformers", "peft", "accelerate", "sklearn", "scipy"}
TABLES = {"pandas", "datasets"}


@pytest.mark.parametrize(
    ("arguments", "unneeded"),
    [
        (["history"], SERVICES | LEARNING | TABLES),
        (["history", "--matrix"], SERVICES | LEARNING | TABLES),
        (["history", "--moves"], SERVICES | LEARNING | TABLES),
        (["history", "--at", "2030-01-01"], SERVICES | LEARNING | TABLES),
        (["status"], SERVICES | LEARNING | TABLES),
        (["validate", str(ROOT / "examples" / "bank" / "train.jsonl"), "--task", "bank"], SERVICES | LEARNING),
        (["predict", "I lost my card."], SERVICES | TABLES | {"sklearn"}),
        (["predict", "--data", str(ROOT / "examples" / "bank" / "test.jsonl"), "--out"], SERVICES | TABLES),
    ],
    ids=lambda value: " ".join(value[:2])[:16] if isinstance(value, list) else "",
)  # fmt: skip
def test_a_command_that_reads_imports_only_what_it_needs(
    copied_home: Path, tmp_path: Path, arguments: list[str], unneeded: set[str]
) -> None:
    if arguments[0] in ("history", "predict", "validate"):
        arguments = [*arguments, *([str(tmp_path / "out.jsonl")] if arguments[-1] == "--out" else []), "--lineage", "l"]
    if isinstance(open_reader(TrackingSettings(tracking_uri=f"sqlite:///{copied_home / 'mlflow.db'}")), Registry):
        unneeded = unneeded - {"mlflow", "sqlalchemy", "fastapi", "pandas"}  # a new MLflow, whose file is not read
    command = [sys.executable, "-c", RUN, *arguments, "--home", str(copied_home)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["code"] in (0, None), done.stderr
    assert sorted(unneeded.intersection(found["modules"])) == []
