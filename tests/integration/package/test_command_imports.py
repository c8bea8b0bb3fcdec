"""A command that only reads or answers imports no library that it does not need: the imports are most of its start."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.tiny_base import EXAMPLES

ROOT = Path(__file__).parents[3]
BANK = EXAMPLES / "bank"
RUN = """
import contextlib, io, json, sys
from deal_pipeline.cli.app import main
for words in json.loads(sys.argv[1]):
    sys.argv[1:] = words
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            code = main()
        except SystemExit as ended:
            code = ended.code
    print(json.dumps({"code": code, "modules": [name for name in sys.modules if "." not in name]}))
"""
SERVICES = {"prefect", "mlflow", "sqlalchemy", "fastapi"}
LEARNING = {"torch", "transformers", "peft", "accelerate", "sklearn", "scipy"}
TABLES = {"pandas", "datasets"}


LIGHT = SERVICES | LEARNING | TABLES
READING = [
    (["version", "list", "--lineage", "l"], LIGHT),
    (["version", "list", "--matrix", "--lineage", "l"], LIGHT),
    (["version", "list", "--moves", "--lineage", "l"], LIGHT),
    (["version", "list", "--at", "2030-01-01", "--lineage", "l"], LIGHT),
    (["status"], LIGHT),
    (["check", str(BANK / "train.jsonl")], SERVICES | LEARNING),
    # the champion knows the task, but it has learned these rows, so none is to be answered
    (["check", str(BANK / "train.jsonl"), "--task", "bank"], SERVICES | LEARNING),
    (["rollout", "status", "--lineage", "l"], {"prefect", "sklearn"}),
]
ANSWERING = [
    (["predict", "I lost my card.", "--lineage", "l"], SERVICES | TABLES | {"sklearn"}),
    (["predict", "--data", "FEW", "--out", "OUT", "--lineage", "l"], SERVICES | TABLES),
    (["check", "NEW", "--task", "bank"], SERVICES),  # the champion answers the rows
]


@pytest.mark.parametrize("commands", [READING, ANSWERING], ids=["reading", "answering"])
def test_a_command_imports_only_what_it_needs(
    copied_home: Path, tmp_path: Path, commands: list[tuple[list[str], set[str]]]
) -> None:
    """The commands run one after another in one process; what one imports counts for the next ones too."""
    paths = {name: tmp_path / f"{name.lower()}.jsonl" for name in ("OUT", "NEW", "FEW")}
    rows = [json.loads(line) for line in (BANK / "train.jsonl").read_text().splitlines()[:20]]
    paths["NEW"].write_text("\n".join(json.dumps({**row, "text": f"{row['text']} Please."}) for row in rows))
    paths["FEW"].write_text("\n".join(map(json.dumps, rows[:3])))
    home = ["--home", str(copied_home)]
    words = [[str(paths.get(word, word)) for word in arguments] + home for arguments, _ in commands]
    done = subprocess.run(
        [sys.executable, "-c", RUN, json.dumps(words)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == len(commands), done.stderr
    for (arguments, unneeded), each in zip(commands, found, strict=True):
        assert each["code"] in (0, None), (arguments, done.stderr)
        assert not unneeded.intersection(each["modules"]), arguments
