"""A request that `deal serve` does not answer."""

from __future__ import annotations

from collections.abc import Mapping


class RefusalError(Exception):
    """A request that is not answered.

    Args:
        status: HTTP status.
        message: What is wrong and what to send, for the client.
        headers: More headers of the answer.
        code: OpenAI's name of the error, if it has one.
    """

    def __init__(
        self, status: int, message: str, headers: Mapping[str, str] | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers or {}
        self.code = code
