"""What the stages of an adaptation share as Prefect tasks."""

from __future__ import annotations

from typing import Any

from prefect.cache_policies import NO_CACHE

from deal_core.errors import DataValidationError
from tasks.progress import Interrupted

RETRY_SECONDS = [5, 30, 120]
"""Pauses before a stage is tried again."""
TRANSIENT = {
    "builtins": {"ConnectionError", "ConnectionResetError", "ConnectionRefusedError", "ConnectionAbortedError"}
    | {"BrokenPipeError", "TimeoutError"},
    "httpx": {"ConnectError", "ReadError", "WriteError", "RemoteProtocolError", "PoolTimeout"}
    | {"ConnectTimeout", "ReadTimeout", "WriteTimeout"},
    "requests": {"ConnectionError", "ConnectTimeout", "ReadTimeout", "Timeout", "ChunkedEncodingError"},
    "botocore": {"EndpointConnectionError", "ConnectionClosedError", "ConnectTimeoutError", "ReadTimeoutError"}
    | {"ConnectionError", "HTTPClientError"},
}
"""Errors of a connection by the package that raises them: Prefect, MLflow, the store and the Hub use these clients."""


def is_transient(error: BaseException | None) -> bool:
    """Return whether an error, or what caused it, is one of a connection. A mistake in the data never is one."""
    while error is not None:
        if isinstance(error, DataValidationError | Interrupted):
            return False
        kind = type(error)
        if kind.__name__ in TRANSIENT.get(kind.__module__.partition(".")[0], ()):
            return True
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return False


STAGE: dict[str, Any] = {
    "tags": ["deal"],
    "cache_policy": NO_CACHE,
    "retries": len(RETRY_SECONDS),
    "retry_delay_seconds": RETRY_SECONDS,
    # Prefect asks after a failure; the state has the error
    "retry_condition_fn": lambda task, run, state: isinstance(state.data, BaseException) and is_transient(state.data),
}
"""Options of every stage. Prefect's cache is not used: a run finds its own results by its key and goes on from them."""
