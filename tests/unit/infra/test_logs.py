"""Logs contain no secrets, and log files have a limited size."""

from __future__ import annotations

import io
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from infra import logs
from infra.logs import mask_logs
from tests.in_process import put_back


def test_a_log_that_has_grown_makes_room_for_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "MAX_BYTES", 3)
    log = tmp_path / "logs" / "x.log"
    for text in ("one", "two", "three"):
        with logs.ready_log(log).open("a") as file:
            file.write(text)
    assert log.read_text() == "three"
    assert {path.name: path.read_text() for path in log.parent.iterdir()} == {"x.log": "three", "x.log.1": "onetwo"}


def test_commands_log_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from deal_pipeline.server.embedded import FAILURES, enter_home

    with put_back():
        monkeypatch.delenv("DEAL_HOME", raising=False)
        enter_home(tmp_path)
        FAILURES.error("label \x1b[31m")
        text = (tmp_path / "logs" / "logging.yml").read_text()
        log = tmp_path / "logs" / "deal.log"
        monkeypatch.setattr("infra.logs.MAX_BYTES", 3)
        logs.ready_log(log)  # as the next command does; this one, such as a watch, goes on
        FAILURES.error("label \x1b[31m")
        assert "LogFile" in yaml.safe_load(text)["handlers"]["file"]["class"]
        assert (tmp_path / "logs" / "deal.log").read_text().endswith(r"label \x1b[31m" + "\n")
        shutil.rmtree(tmp_path / "logs")
        FAILURES.error("the folder is gone")  # the caller goes on
    assert yaml.safe_load(text)["formatters"]["plain"]["()"] == "infra.logs.PlainFormatter"


def test_errors_of_prefects_api_go_to_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefect starts the API with uvicorn's command, which finds no such application here."""
    from deal_pipeline.server.embedded import enter_home, start_api

    with put_back():
        monkeypatch.delenv("DEAL_HOME", raising=False)
        monkeypatch.setattr("prefect.client.orchestration.get_client", lambda **_: None)
        enter_home(tmp_path)
        start_api().result()
        command = [sys.executable, "-m", "uvicorn", "no_such_application:app", "--log-level", "error"]
        assert subprocess.run(command, capture_output=True, check=False).stderr == b""
    assert "no_such_application" in (tmp_path / "logs" / "deal.log").read_text()


@pytest.fixture
def logged() -> Iterator[Callable[[], str]]:
    """The output of a handler, of a logger with masked records."""
    before, stream = logging.getLogRecordFactory(), io.StringIO()
    handler, logger = logging.StreamHandler(stream), logging.getLogger("a library")
    logger.addHandler(handler)
    mask_logs()
    yield stream.getvalue
    logger.removeHandler(handler)
    logging.setLogRecordFactory(before)


def test_a_record_holds_no_secret_in_message_arguments_or_traceback(logged: Callable[[], str]) -> None:
    logger = logging.getLogger("a library")
    logger.error("Cannot reach http://me:first-swordfish@host")
    logger.error("Cannot reach %s after %d tries", "http://me:second-swordfish@host", 3)
    try:
        try:
            raise OSError("no http://me:third-swordfish@host")
        except OSError as error:
            raise ValueError("no http://me:fourth-swordfish@host") from error
    except ValueError:
        logger.exception("It failed")
    assert "swordfish" not in logged()
    assert "http://***@host after 3 tries" in logged() and "OSError: no http://***@host" in logged()


@pytest.mark.usefixtures("logged")
def test_arguments_without_a_secret_stay_for_formatters_that_read_them(caplog: pytest.LogCaptureFixture) -> None:
    mask_logs()
    logging.getLogger("a library").warning("%s %d", "GET", 200)
    assert caplog.records[-1].args == ("GET", 200)
