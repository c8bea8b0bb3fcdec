"""Errors a user of the pipeline can meet. Every message says what was found, where, and what to do."""

from __future__ import annotations

from deal_core.masking import without_secrets
from deal_core.printable import printable

MAX_ERROR_CHARS = 2000


class DealError(Exception):
    """Base of every error this project raises on purpose. Its text holds no secret: it masks what it is given."""

    def __init__(self, *args: object) -> None:
        super().__init__(*(without_secrets(each) if isinstance(each, str) else each for each in args))


class ConfigError(DealError, ValueError):
    """A setting or an argument does not fit."""


class DataValidationError(DealError, ValueError):
    """An arrival cannot be used as it is."""


class AdapterStateError(DealError):
    """Saved adapter or method state does not fit the model it is loaded into."""


class IntegrityError(DealError):
    """Stored bytes are not those that were recorded of them."""


class TrainingDivergedError(DealError):
    """A loss or gradient is not finite: nothing that follows could be learned."""


class RankError(DealError):
    """One of the processes that trained an adapter together died."""


class RegistryError(DealError):
    """The model registry refused or contradicts what was asked."""


class StoreError(DealError):
    """The object store could not do what was asked."""


class DiskFullError(DealError):
    """No room is left on a disk that a run writes to."""


def in_one_line(error: Exception) -> str:
    """What an error says, on one line and without secrets; one that is not ours with its kind."""
    message = without_secrets(" ".join(printable(str(error)).split()))
    if len(message) > MAX_ERROR_CHARS:
        message = f"{message[: MAX_ERROR_CHARS - 1]}…"
    return message if isinstance(error, DealError) else f"{type(error).__name__}: {message}".rstrip(": ")
