"""Patience: what may pass is asked again, what will not is not."""

from __future__ import annotations

import asyncio

import httpx
import pytest
import tenacity

from tasks.progress import patient

AT_ONCE = {"wait": tenacity.wait_none()}


@pytest.mark.parametrize("error", [httpx.ConnectError("refused"), httpx.ReadTimeout("slow")])
def test_a_server_that_comes_back_is_waited_for(error: Exception) -> None:
    answers = [error, error, None]

    def ask() -> str:
        if (answer := answers.pop(0)) is not None:
            raise answer
        return "here"

    assert patient(ask).retry_with(**AT_ONCE)() == "here"


def test_an_error_that_will_not_pass_is_raised_at_once() -> None:
    calls = []

    async def ask() -> None:
        calls.append(1)
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        asyncio.run(patient(ask).retry_with(**AT_ONCE)())
    assert len(calls) == 1


def test_patience_ends_with_the_servers_own_error() -> None:
    def ask() -> None:
        raise httpx.ConnectError("refused")

    with pytest.raises(httpx.ConnectError, match="refused"):
        patient(ask).retry_with(**AT_ONCE, stop=tenacity.stop_after_attempt(3))()
