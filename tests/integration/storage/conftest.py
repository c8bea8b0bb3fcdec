"""A lineage that has learned a landed file, and ways to look at its store."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from deal_core.evaluation.answering import InputRow
from deal_core.monitoring.feedback import read_entry
from deal_core.strategies.kept_rows import pack
from deal_core.strategies.rehearsal import RehearsedRow
from flows.adapt_result import AdaptResult
from flows.gc import GcResult, gc
from infra.serving.prediction_log import PredictionLog
from infra.store.opening import open_store
from tests.adapting import BANK, run
from tests.conftest import MakeOnce
from tests.served import Champion

SECRET = "Zanzibar-4711"


@pytest.fixture(scope="session")
def kept_home(tiny_base: Path, home_made_once: MakeOnce) -> Path:
    """A home whose lineage has learned a landed file, one bad row and one with a secret in it."""

    def make(folder: Path) -> None:
        result = run(tiny_base, land())
        (folder / "result.json").write_text(result.model_dump_json())

    return home_made_once("kept-home", make)


@pytest.fixture
def first(copy_to_home: Callable[[Path], Path], kept_home: Path) -> AdaptResult:
    """The first task's result, in a copy of its home."""
    result = copy_to_home(kept_home) / "result.json"
    return AdaptResult.model_validate_json(result.read_text())


def land() -> dict[str, Any]:
    """Put the bank's rows and its test rows into the inbox; return the task."""
    store = open_store()
    bad = json.dumps({"text": "", "label": f"lost card {SECRET}"}) + "\n"
    good = json.dumps({"text": f"My card {SECRET} was lost abroad.", "label": "lost card"}) + "\n"
    store.put_bytes("inbox/bank/may.jsonl", (Path(BANK["data"]).read_text() + good + bad).encode())
    store.put_bytes("inbox/bank/test.jsonl", Path(BANK["test_data"]).read_bytes())
    return {**BANK, "data": store.uri_of("inbox/bank/may.jsonl"), "test_data": store.uri_of("inbox/bank/test.jsonl")}


def collect(*arguments: Any, **options: Any) -> GcResult:
    return asyncio.run(gc(*arguments, **options))


def keys(prefix: str) -> list[str]:
    return [info.key for info in open_store().list(prefix)]


@contextmanager
def logging(texts: list[str]) -> Iterator[list[str]]:
    """Log an answer of lineage l to each text, with feedback; yield their ids. They are stored after the block."""
    log = PredictionLog(open_store(), "l", keeps_texts=True, retention_days=30)
    champion = Champion(log)
    log.start()
    ids = [*asyncio.run(champion.ask([InputRow(text, "bank") for text in texts])).ids]
    log.take_feedback([read_entry({"id": each, "label": "a"}, "", source="api", now=1.0).feedback for each in ids])
    yield ids
    log.close()


def logged(texts: list[str]) -> list[str]:
    """Log an answer of lineage l to each text, with feedback; return the ids of the answers."""
    with logging(texts) as ids:
        return ids


def holding(home: Path, text: str) -> list[str]:
    """Files in the home that contain a text, as plain text or in a Parquet file, without databases and logs."""
    found = []
    for path in (path for part in ("store", "mlflow-artifacts", "work") for path in home.joinpath(part).rglob("*")):
        if not path.is_file():
            continue
        content = path.read_bytes()
        if content[:4] == content[-4:] == b"PAR1":  # a Parquet file, also one without its name yet
            content = json.dumps(pq.read_table(path).to_pylist()).encode()
        if text.encode() in content:
            found.append(str(path))
    return found


def holding_row(home: Path, row: RehearsedRow) -> list[str]:
    """Files in the home that contain a row's tokens, as a version keeps them."""
    tokens = pack([row]).numpy().tobytes()
    return [str(path) for path in home.rglob("*") if path.is_file() and tokens in path.read_bytes()]
