"""Log files do not grow for ever."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import yaml

from infra import logs
from tests.in_process import put_back


def test_a_log_that_has_grown_makes_room_for_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "MAX_BYTES", 3)
    log = tmp_path / "logs" / "x.log"
    for text in ("one", "two", "three"):
        with logs.ready_log(log).open("a") as file:
            file.write(text)
    assert log.read_text() == "three"
    assert {path.name: path.read_text() for path in log.parent.iterdir()} == {"x.log": "three", "x.log.1": "onetwo"}


def test_a_log_holds_nothing_that_a_terminal_acts_on(tmp_path: Path) -> None:
    handler = logging.FileHandler(tmp_path / "x.log")
    handler.setFormatter(logs.PlainFormatter("%(message)s"))
    record = logging.makeLogRecord({"msg": "label %s", "args": ("\x1b]0;title\x07\u202e",), "levelno": 30})
    handler.handle(record)
    handler.close()
    assert (tmp_path / "x.log").read_text() == r"label \x1b]0;title\x07\u202e" + "\n"


def test_commands_log_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flows.embedded import FAILURES, enter_home

    with put_back():
        monkeypatch.delenv("DEAL_HOME", raising=False)
        enter_home(tmp_path)
        FAILURES.error("label \x1b[31m")
        text = (tmp_path / "logs" / "logging.yml").read_text()
    assert (tmp_path / "logs" / "deal.log").read_text().endswith(r"label \x1b[31m" + "\n")
    assert yaml.safe_load(text)["formatters"]["plain"]["class"] == "infra.logs.PlainFormatter"
