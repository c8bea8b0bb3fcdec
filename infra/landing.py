"""Notifications that something has landed in the bucket: S3 events through an SQS queue.

They only say when to look. What lies in the inbox is read from the store, so that a notification that comes twice,
late or never does no harm.
"""

from __future__ import annotations

import logging

from botocore.exceptions import BotoCoreError, ClientError

from deal_core.errors import ConfigError
from infra.settings import LandingSettings, without_password
from infra.store.s3 import make_client

logger = logging.getLogger(__name__)
MAX_WAIT_SECONDS = 20
MAX_MESSAGES = 10


class LandingQueue:
    """The queue that the bucket's events go to."""

    def __init__(self, settings: LandingSettings) -> None:
        assert settings.landing_queue_url is not None
        self._url = settings.landing_queue_url
        self._shown = without_password(self._url)
        self._client = make_client(settings, "sqs")
        self._received: list[str] = []

    def wait(self, seconds: float) -> bool:
        """Wait for a notification, at most so long (20 s); return whether one came.

        A queue that does not answer is logged and counts as one that stays silent: looks go on without it.
        """
        try:
            answer = self._client.receive_message(
                QueueUrl=self._url,
                MaxNumberOfMessages=MAX_MESSAGES,
                WaitTimeSeconds=max(0, min(MAX_WAIT_SECONDS, int(seconds))),
            )
        except (ClientError, BotoCoreError) as error:
            logger.warning("The queue %s does not answer: %s; the inbox is looked at without it.", self._shown, error)
            return False
        self._received += [message["ReceiptHandle"] for message in answer.get("Messages", ())]
        return bool(self._received)

    def done(self) -> None:
        """Forget the notifications that came: what they spoke of was looked at."""
        while self._received:
            handle = self._received.pop()
            try:
                self._client.delete_message(QueueUrl=self._url, ReceiptHandle=handle)
            except (ClientError, BotoCoreError) as error:
                logger.warning("The queue %s keeps a notification: %s; it will come again.", self._shown, error)


def open_landing_queue(settings: LandingSettings | None = None) -> LandingQueue | None:
    """The queue that DEAL_LANDING_QUEUE_URL names; None where there is none, or it cannot be used, which is logged."""
    settings = settings or LandingSettings()
    if not settings.landing_queue_url:
        return None
    try:
        return LandingQueue(settings)
    except ConfigError as error:  # no region, say
        logger.error("The queue cannot be used: %s; check DEAL_S3_REGION. The inbox is looked at without it.", error)
        return None
