"""Log files do not grow for ever."""

from __future__ import annotations

from pathlib import Path

import pytest

from infra import logs


def test_a_log_that_has_grown_makes_room_for_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "MAX_BYTES", 3)
    log = tmp_path / "logs" / "x.log"
    for text in ("one", "two", "three"):
        with logs.ready_log(log).open("a") as file:
            file.write(text)
    assert log.read_text() == "three"
    assert {path.name: path.read_text() for path in log.parent.iterdir()} == {"x.log": "three", "x.log.1": "onetwo"}
