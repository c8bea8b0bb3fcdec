"""Logs: no secret in what is logged, and files that many processes append to, one after another."""

from __future__ import annotations

import logging
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from deal_core.masking import without_secrets
from deal_core.printable import printable

MAX_BYTES = 10 << 20


class PlainFormatter(logging.Formatter):
    """Lines in which nothing is left that a terminal acts on: people look at logs with `cat`."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as text."""
        return printable(super().format(record))


def mask_logs() -> None:
    """Mask secrets in every record that this process logs, whichever library logs it and wherever it goes.

    A handler's filter would not do: Prefect has handlers of its own, which a worker sets up. Can be repeated.
    """
    make_record = logging.getLogRecordFactory()
    if isinstance(make_record, _Masked):
        return
    logging.setLogRecordFactory(_Masked(make_record))


class _Masked:
    """A factory of log records whose message, arguments and traceback hold no secret."""

    def __init__(self, make_record: Any) -> None:
        self._make_record = make_record
        self._formatter = logging.Formatter()

    def __call__(self, *args: Any, **kwargs: Any) -> logging.LogRecord:
        record: logging.LogRecord = self._make_record(*args, **kwargs)
        with suppress(TypeError, ValueError, KeyError):  # arguments that do not fit are logging's own to complain of
            message = record.getMessage()
            masked = without_secrets(message)
            if masked != message:  # else the arguments stay, which some formatters read
                record.msg, record.args = masked, ()
        if record.exc_info and record.exc_info[0]:
            record.exc_text = without_secrets(self._formatter.formatException(record.exc_info))
        return record


def ready_log(log: Path) -> Path:
    """Make a log's folder, and give one that has grown past 10 MB the name LOG.1, in place of the one before.

    Call it before the log is opened. Whoever has it open writes on into the old one.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    if is_full(log):
        os.replace(log, _old(log))
    return log


def is_full(log: Path) -> bool:
    """Whether a log has grown past 10 MB."""
    with suppress(FileNotFoundError):
        return log.stat().st_size > MAX_BYTES
    return False


def cut_log(log: Path) -> None:
    """Copy a log to LOG.1, in place of the one before, and empty it.

    Processes may have it open, if they opened it to append: they go on at its new end. A line that is written just then
    may be lost.

    Raises:
        OSError: there is no room for the copy; the log is left as it is.
    """
    shutil.copyfile(log, _old(log))
    os.truncate(log, 0)


def _old(log: Path) -> Path:
    return log.with_name(f"{log.name}.1")
