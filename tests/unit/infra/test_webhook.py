"""The webhook with a real HTTP server: signed, repeated, sent to no other receiver, and no error stops a run."""

from __future__ import annotations

import base64
import json
import logging
import socket
import time
import uuid
from collections.abc import Iterator

import pytest
import standardwebhooks
import tenacity

from deal_core.errors import ConfigError
from infra.settings import NoticeSettings
from infra.webhook import MAX_ATTEMPTS, Webhook, open_webhook, read_secret, sign
from tests.receiver import Receiver

SECRET = b"a-planted-secret"
BODY = '{"id": "ünï"}'.encode()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver() as found:
        yield found


def send(url: str, delivery: uuid.UUID | None = None) -> bool:
    webhook = Webhook(url, SECRET)
    webhook._wait = tenacity.wait_none()
    return webhook.send("deal.version.promoted", BODY, delivery or uuid.uuid4())


def test_a_notice_is_signed_and_told_again_after_a_503(receiver: Receiver) -> None:
    receiver.answers = [503, 429, 200]
    delivery = uuid.uuid4()
    assert send(receiver.url, delivery)
    assert len(receiver.requests) == 3
    for headers, body in receiver.requests:
        assert body == BODY and headers["Content-Type"] == "application/json"
        assert standardwebhooks.Webhook(SECRET).verify(body, headers) == json.loads(BODY)
        assert headers["webhook-id"] == str(delivery), "the same at every attempt"
        for changed in ({"webhook-id": str(uuid.uuid4())}, {"webhook-timestamp": "1700000000"}):
            with pytest.raises(standardwebhooks.WebhookVerificationError):
                standardwebhooks.Webhook(SECRET).verify(body, {**headers, **changed})


def test_a_secret_of_the_standard_is_read_as_its_library_reads_it() -> None:
    key = "whsec_" + base64.b64encode(b"32 random bytes, say; or others.").decode()
    now = str(int(time.time()))
    headers = {"webhook-id": "1", "webhook-timestamp": now, "webhook-signature": sign(read_secret(key), "1", now, BODY)}
    assert standardwebhooks.Webhook(key).verify(BODY, headers) == json.loads(BODY)
    assert read_secret("plain text") == b"plain text"
    for wrong in ("whsec_not base64!", "whsec_"):
        with pytest.raises(ConfigError, match="no base64 after whsec_"):
            read_secret(wrong)


def test_a_receiver_that_stays_away_is_given_up_and_only_logged(
    receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    receiver.answers = [500] * MAX_ATTEMPTS
    assert not send(f"{receiver.url}path-with-a-token")
    assert len(receiver.requests) == MAX_ATTEMPTS
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://user:hidden@127.0.0.1:{free.getsockname()[1]}/token"
        assert not send(url), "no server listens"
    assert "it answers 500" in caplog.text and "ConnectError" in caplog.text
    for hidden in ("token", "hidden", SECRET.decode()):
        assert hidden not in caplog.text


def test_a_refusal_is_not_repeated_and_a_redirect_not_followed(
    receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    for status in (400, 302):
        receiver.answers, receiver.requests = [status, 200], []
        assert not send(receiver.url)
        assert len(receiver.requests) == 1, status
    assert "redirects are not followed" in caplog.text


def test_nothing_goes_where_it_could_be_read_on_the_way() -> None:
    for url in (
        "http://example.org/hook",
        "ftp://127.0.0.1/",
        "https://",
        "http://127.0.0.1.example.org",
        "hook",
        "",
        "http://0.0.0.0:80/",
        "http://[::2]/",
        "https://[abc/hook",
    ):
        with pytest.raises(ConfigError, match=r"neither https|no address with a host"):
            Webhook(url, SECRET)
    for url in ("https://example.org/hook", "http://localhost:8080/", "http://127.0.0.1/", "http://[::1]:9/"):
        Webhook(url, SECRET)


def test_the_environment_names_the_webhook(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("DEAL_WEBHOOK_URL", "DEAL_WEBHOOK_SECRET"):
        monkeypatch.delenv(name, raising=False)
    assert open_webhook() is None
    monkeypatch.setenv("DEAL_WEBHOOK_URL", "https://example.org/token")
    with pytest.raises(ConfigError, match="without DEAL_WEBHOOK_SECRET"):
        open_webhook()
    monkeypatch.setenv("DEAL_WEBHOOK_SECRET", SECRET.decode())
    assert isinstance(open_webhook(), Webhook)
    caplog.set_level(logging.DEBUG)
    assert SECRET.decode() not in repr(NoticeSettings()) and "token" not in repr(NoticeSettings())
