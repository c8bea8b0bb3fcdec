"""The project's own errors. Every message says what was found, where, and what to do."""

from __future__ import annotations

import re

from deal_core.safe_text import printable, without_secrets

MAX_ERROR_CHARS = 2000
_LONG_WORD = re.compile(r"(\S{150})\S{150,}(\S{50})")
"""A path of thousands of characters would leave no room for what is wrong with it."""


class DealError(Exception):
    """Base of every error that this project raises on purpose. Secrets in its text are masked.

    Attributes:
        code: What is wrong, in a word that stays when the message is written anew. Programs and tests compare it. Each
            class has a code. An error that a caller has to tell apart from others of its class is raised with its own.
    """

    code = "error"

    def __init__(self, *args: object, code: str | None = None) -> None:
        super().__init__(*(without_secrets(arg) if isinstance(arg, str) else arg for arg in args))
        if code is not None:
            self.code = code


class ConfigError(DealError, ValueError):
    """A setting or an argument is not valid."""

    code = "setting"


class DataValidationError(DealError, ValueError):
    """A data file cannot be used as it is."""

    code = "data"


class ReaderDiedError(DataValidationError):
    """A file ended the process that read it. Want of memory can do that too, so one more try is worth while."""

    code = "reader-died"


class AdapterStateError(DealError):
    """Saved adapter or method state does not fit the model it is loaded into."""

    code = "adapter-state"


class IntegrityError(DealError):
    """Stored bytes differ from their recorded digest."""

    code = "digest"


class TrainingDivergedError(DealError):
    """A loss or gradient is not finite, so the training cannot continue."""

    code = "diverged"


class DeviceMemoryError(DealError):
    """A step of the training does not fit into the memory of its device."""

    code = "device-memory"


class RankError(DealError):
    """One of several training processes died."""

    code = "rank-died"


class RegistryError(DealError):
    """A lineage lacks a version, or has one that cannot do what is asked."""

    code = "version"


class StoreError(DealError):
    """A request to the object store failed."""

    code = "store"


class DiskFullError(DealError):
    """A disk that a run writes to is full."""

    code = "disk-full"


def in_one_line(error: Exception) -> str:
    """The error's message on one line, without secrets. The type comes first unless it is a DealError."""
    message = _LONG_WORD.sub(r"\1…\2", without_secrets(" ".join(printable(str(error)).split())))
    if len(message) > MAX_ERROR_CHARS:
        message = f"{message[: MAX_ERROR_CHARS - 1]}…"
    return message if isinstance(error, DealError) else f"{type(error).__name__}: {message}".rstrip(": ")
