"""A run that masks answer tokens: the notes say how many, and a resumed run takes the same mask."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

import tasks.adaptation.train as train_stage
from deal_core.data.collate import LOSS_MASK
from deal_core.errors import ConfigError
from deal_core.training.token_mask import MASK_FILE
from tasks.adaptation.report import read_page
from tests.adapting import BANK, run

pytestmark = pytest.mark.usefixtures("prefect_api", "home")


class _DiedError(Exception):
    pass


def test_a_resumed_run_trains_on_the_tokens_that_it_masked_first(
    tiny_base: Path, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "notes.jsonl"
    things = ("lost card", "late parcel", "low iron", "broken bone", "customs hold")
    rows = [{"prompt": f"Message {i} about a {thing}.", "completion": f"A {thing}, number {i}, is reported.",
             "split": "test" if i % 3 == 0 else "train"} for i, thing in enumerate(things * 6)]  # fmt: skip
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings: dict[str, Any] = {"selection": {"keep": 10}, "token_mask": {"share": 0.3}}
    trained_on: list[list[list[bool]]] = []
    learn = train_stage._in_this_process

    def die_once(base: Any, setup: Any, rows_file: Path, *rest: Any) -> Any:
        trained_on.append(pq.read_table(rows_file).column(LOSS_MASK).to_pylist())
        if len(trained_on) == 1:
            assert (rows_file.parents[1] / MASK_FILE).is_file()
            raise _DiedError
        return learn(base, setup, rows_file, *rest)

    monkeypatch.setattr(train_stage, "_in_this_process", die_once)
    with pytest.raises(_DiedError):
        run(tiny_base, {"name": "notes", "data": str(file)}, **settings)
    monkeypatch.setattr("deal_core.training.token_mask._make", None)  # a second reading would fail
    found = run(tiny_base, {"name": "notes", "data": str(file)}, **settings)
    assert trained_on[1] == trained_on[0] and len(trained_on[0]) == 10
    tokens = [counts for row in trained_on[0] for counts in row]
    _, page = read_page(str(found.tracking_id))
    assert f"{tokens.count(False)} of {len(tokens)} answer tokens" in page and tokens.count(False) > 10
    assert not list(home.rglob(MASK_FILE)), "the mask is of no use after the run"
    with pytest.raises(ConfigError, match="are what it would mask"):
        run(tiny_base, BANK, **settings)
