"""A webhook: signed JSON to one address, told again until it is taken or patience ends.

The receiver can tell who sent it, when, and whether it has it already; docs/notifications.md shows how.

Example:
    >>> open_webhook().send("deal.version.promoted", body, delivery)  # doctest: +SKIP
    True
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import logging
import time
import uuid
from urllib.parse import urlsplit

import httpx
import tenacity

from deal_core.errors import ConfigError
from infra.settings import NoticeSettings

logger = logging.getLogger(__name__)

TIMEOUT_SECONDS = 5.0
"""To connect, and between two signs of life."""
MAX_ATTEMPTS = 6
MAX_PAUSE_SECONDS = 20.0
"""Pauses are random, up to a length that doubles from a second: six attempts are spread over half a minute at most."""


class _NotNowError(Exception):
    """The receiver may take it later."""


class Webhook:
    """One receiver of notices.

    Raises:
        ConfigError: the address is neither https nor on loopback.
    """

    def __init__(self, url: str, secret: bytes) -> None:
        if not _is_safe(url):
            raise ConfigError("DEAL_WEBHOOK_URL is neither https:// nor http:// on the loopback address; give one.")
        self._url = url
        self._secret = secret
        parts = urlsplit(url)
        self._shown = f"{parts.scheme}://{parts.hostname}"  # a path may hold a token
        self._wait = tenacity.wait_random_exponential(multiplier=1, max=MAX_PAUSE_SECONDS)

    def send(self, event: str, body: bytes, delivery: uuid.UUID) -> bool:
        """Post a body; return whether it was taken. A failure is logged and nothing else.

        Network errors, 429 and 5xx are tried again; every attempt is signed afresh and carries the same delivery.

        Args:
            event: name of the event.
            body: JSON.
            delivery: identity of the notice, by which a receiver knows one that it has.
        """
        attempts = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type((httpx.TransportError, _NotNowError)),
            wait=self._wait, stop=tenacity.stop_after_attempt(MAX_ATTEMPTS), reraise=True,
        )  # fmt: skip
        try:
            with httpx.Client(timeout=TIMEOUT_SECONDS, follow_redirects=False) as client:
                status = attempts(self._post, client, event, body, delivery)
        except (httpx.HTTPError, httpx.InvalidURL, _NotNowError) as error:
            reason = str(error) if isinstance(error, _NotNowError) else type(error).__name__
            logger.error("The webhook at %s did not take %s %s: %s.", self._shown, event, delivery, reason)
            return False
        if not 200 <= status < 300:
            redirected = "; redirects are not followed" if 300 <= status < 400 else ""
            logger.error("The webhook at %s refuses %s %s: %d%s.", self._shown, event, delivery, status, redirected)
            return False
        return True

    def _post(self, client: httpx.Client, event: str, body: bytes, delivery: uuid.UUID) -> int:
        timestamp = str(int(time.time()))
        headers = {
            "Content-Type": "application/json", "User-Agent": "deal-pipeline", "X-Deal-Event": event,
            "X-Deal-Delivery": str(delivery), "X-Deal-Timestamp": timestamp,
            "X-Deal-Signature": sign(self._secret, timestamp, body),
        }  # fmt: skip
        with client.stream("POST", self._url, content=body, headers=headers) as response:  # nobody reads the answer
            if response.status_code == 429 or response.status_code >= 500:
                raise _NotNowError(f"it answers {response.status_code}")
            return response.status_code


def open_webhook(settings: NoticeSettings | None = None) -> Webhook | None:
    """The webhook that the environment, or `settings`, names; None where there is none.

    Raises:
        ConfigError: it has no secret, or its address is not safe.
    """
    settings = settings or NoticeSettings()
    if settings.webhook_url is None:
        return None
    if settings.webhook_secret is None:
        raise ConfigError("DEAL_WEBHOOK_URL is set without DEAL_WEBHOOK_SECRET; set both, as notices are signed.")
    return Webhook(settings.webhook_url.get_secret_value(), settings.webhook_secret.get_secret_value().encode())


def _is_safe(url: str) -> bool:
    """Whether nobody on the way can read what is sent there."""
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
        is_loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # a host by name
        is_loopback = False
    return bool(host) and (parts.scheme == "https" or (parts.scheme == "http" and is_loopback))


def sign(secret: bytes, timestamp: str, body: bytes) -> str:
    """The value of X-Deal-Signature: HMAC-SHA256 of `timestamp.body`, so that an old body cannot be sent as a new one.

    Example:
        >>> sign(b"secret", "1700000000", b"{}")[:15]
        'sha256=b8569b78'
    """
    return "sha256=" + hmac.new(secret, timestamp.encode() + b"." + body, hashlib.sha256).hexdigest()
