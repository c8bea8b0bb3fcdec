"""The project's own errors. Every message says what was found, where, and what to do."""

from __future__ import annotations

import re

from deal_core.safe_text import printable, without_secrets

MAX_ERROR_CHARS = 2000
_LONG_WORD = re.compile(r"(\S{150})\S{150,}(\S{50})")
"""A path of thousands of characters would leave no room for what is wrong with it."""


class DealError(Exception):
    """Base of every error that this project raises on purpose. Secrets in its text are masked."""

    def __init__(self, *args: object) -> None:
        super().__init__(*(without_secrets(arg) if isinstance(arg, str) else arg for arg in args))


class ConfigError(DealError, ValueError):
    """A setting or an argument is not valid."""


class DataValidationError(DealError, ValueError):
    """A data file cannot be used as it is."""


class ReaderDiedError(DataValidationError):
    """A file ended the process that read it. Want of memory can do that too, so one more try is worth while."""


class AdapterStateError(DealError):
    """Saved adapter or method state does not fit the model it is loaded into."""


class IntegrityError(DealError):
    """Stored bytes differ from their recorded digest."""


class TrainingDivergedError(DealError):
    """A loss or gradient is not finite, so the training cannot continue."""


class RankError(DealError):
    """One of several training processes died."""


class RegistryError(DealError):
    """A lineage lacks a version, or has one that cannot do what is asked."""


class StoreError(DealError):
    """A request to the object store failed."""


class DiskFullError(DealError):
    """A disk that a run writes to is full."""


def in_one_line(error: Exception) -> str:
    """The error's message on one line, without secrets. The type comes first unless it is a DealError."""
    message = _LONG_WORD.sub(r"\1…\2", without_secrets(" ".join(printable(str(error)).split())))
    if len(message) > MAX_ERROR_CHARS:
        message = f"{message[: MAX_ERROR_CHARS - 1]}…"
    return message if isinstance(error, DealError) else f"{type(error).__name__}: {message}".rstrip(": ")
