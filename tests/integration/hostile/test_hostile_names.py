"""Commands refuse invalid files, names and texts with one line."""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner, Result

from deal_core.data.schema import TaskSchema
from deal_core.errors import ConfigError
from tests.in_process import put_back

TEXTS = [f"The parcel number {number} is late" for number in range(40)]
LABELS = ["late", "lost"] * 20


@pytest.fixture
def files(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "files"
    folder.mkdir()
    rows = "".join(f"{text},{label}\n" for text, label in zip(TEXTS, LABELS, strict=True))
    for name in ("good.csv", os.fsdecode(b"caf\xe9.csv")):
        (folder / name).write_text(f"text,label\n{rows}")
    for name in ("loop.csv", "loop.yaml"):
        (folder / name).symlink_to(name)
    return folder


def run(*arguments: object) -> Result:
    from deal_pipeline.cli.app import app

    with put_back():
        return CliRunner().invoke(app, [str(argument) for argument in arguments])


def not_utf8(folder: Path) -> Path:
    return folder / os.fsdecode(b"caf\xe9.csv")


CASES: dict[str, tuple[Callable[[Path], list[object]], str]] = {
    "a symlink loop": (lambda files: ["check", files / "loop.csv"], "symbolic links"),
    "a symlink loop as test rows": (
        lambda files: ["check", files / "good.csv", "--test-data", files / "loop.csv"],
        "symbolic links",
    ),
    "a symlink loop as spec": (
        lambda files: ["check", files / "good.csv", "--spec", files / "loop.yaml"],
        "symbolic links",
    ),
    "a symlink loop as home": (
        lambda files: ["check", files / "good.csv", "--home", files / "loop.csv"],
        "symbolic links",
    ),
    "a name that is not UTF-8": (lambda files: ["check", not_utf8(files)], "not UTF-8"),
    "a name that is not UTF-8, as test rows": (
        lambda files: ["check", files / "good.csv", "--test-data", not_utf8(files)],
        "not UTF-8",
    ),
    "a name that is not UTF-8, to adapt": (
        lambda files: ["adapt", "--task", "t", "--data", not_utf8(files)],
        "not UTF-8",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_refused_in_one_line(case: str, files: Path, home: Path) -> None:
    arguments, said = CASES[case]
    for as_json in (False, True):
        result = run(*arguments(files), *["--json"] * as_json)
        assert result.exit_code in (1, 2), result.output
        assert isinstance(result.exception, SystemExit)
        message = json.loads(result.stderr)["error"] if as_json else result.stderr
        assert "not expected" not in message and said in message
        assert 30 < len(message) < 500
        assert message.strip().isprintable(), "the terminal can show it"


def test_no_text_of_a_task_holds_a_lone_surrogate() -> None:
    """This includes a command's options, where bytes that are not UTF-8 become surrogates."""
    fields: list[dict[str, Any]] = [
        {"labels": ("late", "\udcff")},
        {"instruction": "\udcff"},
        {"template": "\udcff {text}"},
        {"columns": {"text": "\udcff"}},
    ]
    for field in fields:
        with pytest.raises(ConfigError, match=rf"task\.{next(iter(field))} holds .*not UTF-8"):
            TaskSchema(name="t", **field)


def test_an_unknown_time_zone_costs_no_row(files: Path, home: Path) -> None:
    """A bad row that has one is listed; of the others nobody asks for it."""
    moments = pa.array([datetime.datetime(2026, 1, 1)] * 40, pa.timestamp("us"))
    zoned = moments.view(pa.timestamp("us", "Mars/Base"))
    table = pa.table({"text": [*TEXTS[:-1], ""], "label": LABELS, "when": zoned})
    pq.write_table(table, files / "rows.parquet")
    result = run("check", files / "rows.parquet", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)["data"]
    assert (found["num_read"], found["num_rejected"]) == (40, 1)
