"""Make old_home.tar.xz with the code of an earlier commit; README.md in this folder says how.

The base model and the rows are named by relative paths, so that no file of the store names the machine's folders.
MLflow keeps absolute addresses in its database; the test that unpacks the archive replaces them.
"""

from __future__ import annotations

import asyncio
import csv
import json
import os
import shutil
import sys
import tarfile
from itertools import islice
from pathlib import Path
from typing import Any

PLACE = Path("/tmp/deal-home-0.2")
LINEAGE = "desk"
NUM_TRAIN, NUM_TEST = 24, 6


def main(archive: Path) -> None:
    """Learn three versions in PLACE and pack that folder."""
    shutil.rmtree(PLACE, ignore_errors=True)
    (PLACE / "data").mkdir(parents=True)
    os.chdir(PLACE)
    os.environ |= {
        "DEAL_HOME": "home",
        "DEAL_CACHE_DIR": "/tmp/deal-home-0.2-cache",
        "PREFECT_HOME": "/tmp/deal-home-0.2-prefect",
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "300",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "MLFLOW_TRACKING_URI": f"sqlite:///{PLACE}/home/mlflow.db",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DEAL_SERVING_PRECISION": "fp32",
    }
    from benchmarks.tiny_base import build_tiny_base

    build_tiny_base(PLACE / "base")
    _write_rows()
    _learn()
    _answer()
    with tarfile.open(archive, "w:xz", preset=9) as packed:
        for name in ("answers.json", "base", "data", "home"):
            packed.add(name, filter=_anonymous)


def _write_rows() -> None:
    from benchmarks.tiny_base import EXAMPLES

    for name in ("train", "test"):
        shutil.copy(EXAMPLES / "bank" / f"{name}.jsonl", f"data/bank-{name}.jsonl")
        with (EXAMPLES / "clinic" / f"{name}.csv").open(newline="") as file:
            rows = [{"text": row["note"], "label": row["finding"]} for row in csv.DictReader(file)]
        Path(f"data/clinic-{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    parcels = [json.loads(line) for line in (EXAMPLES / "parcels" / "messages.jsonl").read_text().splitlines()]
    for name in ("train", "test"):
        own = [{"text": row["text"], "label": row["label"]} for row in parcels if row["split"] == name]
        Path(f"data/parcels-{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))
    for path in Path("data").iterdir():
        with path.open() as file:
            kept = list(islice(file, NUM_TRAIN if "train" in path.name else NUM_TEST))
        path.write_text("".join(kept))


def _learn() -> None:
    """Bank is promoted, clinic is rejected, parcels is promoted; a person goes back to bank and forth to parcels."""
    from benchmarks.tiny_base import NO_LIMITS
    from tasks.lineage.decisions import promote_to, roll_back

    passed: dict[str, Any] = dict(NO_LIMITS)
    found = [_adapt("bank", passed), _adapt("clinic", {**passed, "min_accuracy": 1.0}), _adapt("parcels", passed)]
    assert found == ["promoted", "rejected", "promoted"], found
    roll_back(LINEAGE, "1", who="operator", why="too early")
    promote_to(LINEAGE, "3", who="operator", why="approved")


def _adapt(task: str, gate: dict[str, Any]) -> str:
    from flows.adapt import adapt

    values: Any = {
        "lineage": LINEAGE,
        "base_model": "base",
        "gate": gate,
        "task": {"name": task, "data": f"data/{task}-train.jsonl", "test_data": f"data/{task}-test.jsonl"},
        "train": {"max_steps": 3, "max_prompt_tokens": 128, "max_answer_tokens": 12, "checkpoint_steps": 0},
        "data": {"retain_training_rows": True},
    }
    return str(asyncio.run(adapt(values)).status)  # Prefect reads the spec from a mapping


def _answer() -> None:
    """Note what MLflow's models answer to the bank's test rows: what later code must answer too."""
    import mlflow
    import pandas as pd

    texts = [json.loads(line)["text"] for line in Path("data/bank-test.jsonl").read_text().splitlines()]
    table = pd.DataFrame({"input": texts, "task": "bank"})
    found = {}
    for version in ("1", "2", "3"):
        answers = mlflow.pyfunc.load_model(f"models:/{LINEAGE}/{version}").predict(table)
        assert set(answers["version"]) == {version}
        found[version] = answers["output"].tolist()
    Path("answers.json").write_text(json.dumps({"inputs": texts, "outputs": found}, indent=1) + "\n")


def _anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = member.mtime = 0
    member.uname = member.gname = ""
    return member


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
