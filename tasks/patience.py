"""Patience with a Prefect server that is away for a while: what asks it something asks again."""

from __future__ import annotations

import logging

import httpx
import tenacity

MAX_SECONDS = 180.0

patient = tenacity.retry(
    retry=tenacity.retry_if_exception_type(httpx.TransportError),
    wait=tenacity.wait_exponential(multiplier=0.5, max=10.0) + tenacity.wait_random(0.0, 1.0),
    stop=tenacity.stop_after_delay(MAX_SECONDS),
    before_sleep=tenacity.before_sleep_log(logging.getLogger(__name__), logging.WARNING),
    reraise=True,
)
"""Decorates a function, plain or async, that may be called again: three minutes without an answer are bridged."""
