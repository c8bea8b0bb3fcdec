"""A webhook: signed JSON to one address, sent again until the receiver accepts it or the attempts end.

Headers and signature are those of Standard Webhooks (https://www.standardwebhooks.com). A receiver can check the sender
and the time, and can recognise a repeated notice; see docs/retrain.md.
"""

from __future__ import annotations

import base64
import binascii
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
from infra.settings import NoticeSettings, host_of

logger = logging.getLogger(__name__)

TIMEOUT_SECONDS = 5.0
"""For the connection, and between two parts of the answer."""
PREFIX = "whsec_"
MAX_ATTEMPTS = 6
MAX_PAUSE_SECONDS = 20.0
"""Pauses are random; their limit starts at a second and doubles. Six attempts take at most about half a minute."""


class Webhook:
    """A receiver of notices.

    Raises:
        ConfigError: The address has no host, or is neither https nor on loopback.
    """

    def __init__(self, url: str, secret: bytes) -> None:
        host, scheme = host_of(url, "DEAL_WEBHOOK_URL"), urlsplit(url).scheme
        try:
            is_loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
        except ValueError:  # a host by name
            is_loopback = False
        # third parties must not read the notices
        if not (scheme == "https" or (scheme == "http" and is_loopback)):
            raise ConfigError("DEAL_WEBHOOK_URL is neither https:// nor http:// on the loopback address; give one.")
        self._url = url
        self._secret = secret
        self._shown = f"{scheme}://{host}"  # a path may contain a token
        self._wait = tenacity.wait_random_exponential(multiplier=1, max=MAX_PAUSE_SECONDS)

    def send(self, event: str, body: bytes, delivery: uuid.UUID) -> bool:
        """Post a body; return whether the receiver accepted it. A failure is logged, not raised.

        Network errors, 429 and 5xx are tried again. Every attempt has a new signature and the same `delivery`, with
        which a receiver recognises a repeated notice.
        """
        attempts = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(httpx.TransportError)
            | tenacity.retry_if_result(lambda status: status == 429 or status >= 500),
            wait=self._wait,
            stop=tenacity.stop_after_attempt(MAX_ATTEMPTS),
            retry_error_callback=lambda state: state.outcome and state.outcome.result(),  # the last status, or error
        )
        try:
            with httpx.Client(timeout=TIMEOUT_SECONDS, follow_redirects=False) as client:
                status: int = attempts(self._post, client, body, delivery)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            reason = type(error).__name__
        else:
            if 200 <= status < 300:
                return True
            reason = f"it answers {status}" + ("; redirects are not followed" if 300 <= status < 400 else "")
        logger.error("The webhook at %s did not take %s %s: %s.", self._shown, event, delivery, reason)
        return False

    def _post(self, client: httpx.Client, body: bytes, delivery: uuid.UUID) -> int:
        """Post the body once; return the status of the answer."""
        timestamp = str(int(time.time()))
        headers = {
            "Content-Type": "application/json",
            "User-Agent": "deal-pipeline",
            "webhook-id": str(delivery),
            "webhook-timestamp": timestamp,
            "webhook-signature": sign(self._secret, str(delivery), timestamp, body),
        }
        with client.stream("POST", self._url, content=body, headers=headers) as response:
            return response.status_code


def open_webhook() -> Webhook | None:
    """Return the webhook of the environment; None: there is no address.

    Raises:
        ConfigError: The secret is missing or not valid, or the address is not safe.
    """
    settings = NoticeSettings()
    if settings.webhook_url is None:
        return None
    if settings.webhook_secret is None:
        raise ConfigError("DEAL_WEBHOOK_URL is set without DEAL_WEBHOOK_SECRET; set both, as notices are signed.")
    return Webhook(settings.webhook_url.get_secret_value(), read_secret(settings.webhook_secret.get_secret_value()))


def read_secret(text: str) -> bytes:
    """Return the key of the signature: the base64 after whsec_, or else the bytes of the text.

    Raises:
        ConfigError: There is no base64 after whsec_.
    """
    if not text.startswith(PREFIX):
        return text.encode()
    try:
        key = base64.b64decode(text.removeprefix(PREFIX), validate=True)
    except binascii.Error:
        key = b""
    if not key:
        raise ConfigError(f"DEAL_WEBHOOK_SECRET has no base64 after {PREFIX}; give the key that was made.")
    return key


def sign(secret: bytes, delivery: str, timestamp: str, body: bytes) -> str:
    """Return the webhook-signature: HMAC-SHA256 of `delivery.timestamp.body`, so none of them can be replaced."""
    digest = hmac.new(secret, f"{delivery}.{timestamp}.".encode() + body, hashlib.sha256).digest()
    return "v1," + base64.b64encode(digest).decode()
