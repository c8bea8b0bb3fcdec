"""Notifications through SQS: they say when to read the inbox, and a queue that fails stops no flow."""

from __future__ import annotations

from typing import Any

import boto3
import pytest

from infra.settings import LandingSettings
from infra.store.s3 import LandingQueue, open_landing_queue


def settings(s3_server: str, queue: str | None, **changes: Any) -> LandingSettings:
    values = {
        "s3_endpoint_url": s3_server,
        "s3_region": "us-east-1",
        "s3_access_key_id": "somebody",
        "s3_secret_access_key": "secret",
        "landing_queue_url": queue,
        **changes,
    }
    return LandingSettings.model_validate(values)


def test_a_notification_comes_again_until_what_it_spoke_of_was_looked_at(s3_server: str) -> None:
    keys = {"aws_access_key_id": "somebody", "aws_secret_access_key": "secret", "region_name": "us-east-1"}
    sqs = boto3.client("sqs", endpoint_url=s3_server, **keys)
    url = sqs.create_queue(QueueName="landed", Attributes={"VisibilityTimeout": "0"})["QueueUrl"]
    queue = open_landing_queue(settings(s3_server, url))
    assert queue is not None and not queue.wait(0)
    sqs.send_message(QueueUrl=url, MessageBody="{}")
    assert queue.wait(5)
    assert LandingQueue(settings(s3_server, url)).wait(5), "the next process gets it if this process dies now"
    queue.done()
    assert not LandingQueue(settings(s3_server, url)).wait(0)


def test_a_queue_that_fails_is_silent(s3_server: str, caplog: pytest.LogCaptureFixture) -> None:
    queue = open_landing_queue(settings(s3_server, f"{s3_server}/000000000000/none"))
    assert queue is not None and not queue.wait(0)
    assert "does not answer" in caplog.text


def test_without_a_queue_or_a_region_looks_go_on_alone(
    s3_server: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert open_landing_queue(settings(s3_server, None)) is None
    for name in ("AWS_DEFAULT_REGION", "AWS_REGION"):
        monkeypatch.delenv(name, raising=False)
    assert open_landing_queue(settings(s3_server, "http://q", s3_region=None)) is None
    assert "DEAL_S3_REGION" in caplog.text
