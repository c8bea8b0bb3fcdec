"""Logs without secrets, and log files that several processes append to."""

from __future__ import annotations

import logging
import os
import shutil
from contextlib import suppress
from logging.handlers import WatchedFileHandler
from pathlib import Path
from typing import Any

from deal_core.safe_text import printable, without_secrets

MAX_BYTES = 10 << 20


class PlainFormatter(logging.Formatter):
    """Writes lines without terminal control characters, because people read logs with `cat`."""

    def __init__(self, format: str = "%(asctime)s %(levelname)s %(name)s: %(message)s") -> None:
        super().__init__(format)

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as text."""
        return printable(super().format(record))


def mask_logs() -> None:
    """Mask secrets in every log record of this process, for all libraries and all handlers. Can be repeated.

    A filter on handlers would not reach the handlers that a Prefect worker adds.
    """
    make_record = logging.getLogRecordFactory()
    if isinstance(make_record, _Masked):
        return
    logging.setLogRecordFactory(_Masked(make_record))


class _Masked:
    """A factory of log records without secrets in message, arguments and traceback."""

    def __init__(self, make_record: Any) -> None:
        self._make_record = make_record
        self._formatter = logging.Formatter()

    def __call__(self, *args: Any, **kwargs: Any) -> logging.LogRecord:
        record: logging.LogRecord = self._make_record(*args, **kwargs)
        with suppress(TypeError, ValueError, KeyError):  # logging itself reports arguments that do not fit
            message = record.getMessage()
            masked = without_secrets(message)
            if masked != message:  # otherwise the arguments are kept for formatters that read them
                record.msg, record.args = masked, ()
        if record.exc_info and record.exc_info[0]:
            record.exc_text = without_secrets(self._formatter.formatException(record.exc_info))
        return record


class LogFile(WatchedFileHandler):
    """A log file that goes on as a new file if another command renames it.

    A message that cannot be written is lost, and its caller goes on: Prefect's server would not end if its last message
    failed because the home folder is gone.
    """

    def emit(self, record: logging.LogRecord) -> None:
        """Write a message, if that is possible."""
        with suppress(OSError):
            super().emit(record)


def ready_log(log: Path) -> Path:
    """Make a log's folder; rename a log of more than 10 MB to LOG.1, which is replaced. Return the log's path.

    Call this function before the log is opened. A process that has the log open still writes to the renamed log, unless
    it writes by a `LogFile`.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    if is_full(log):
        os.replace(log, _old(log))
    return log


def is_full(log: Path) -> bool:
    """Return whether a log has more than 10 MB."""
    with suppress(FileNotFoundError):
        return log.stat().st_size > MAX_BYTES
    return False


def cut_log(log: Path) -> None:
    """Copy a log to LOG.1, which is replaced, and empty the log. Without space for the copy, OSError is raised first.

    Processes that have opened the log to append continue at its new end. A line that is written during the copy may be
    lost.
    """
    shutil.copyfile(log, _old(log))
    os.truncate(log, 0)


def _old(log: Path) -> Path:
    return log.with_name(f"{log.name}.1")
