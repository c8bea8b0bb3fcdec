"""Texts are shown without secrets and without characters that control a terminal, and no longer than a screen."""

from __future__ import annotations

import json
import time

import pytest

from deal_core.errors import ConfigError, DataValidationError, StoreError, in_one_line
from deal_core.safe_text import (
    brief,
    holds_secret,
    listed,
    printable,
    printable_json,
    without_known_secrets,
    without_known_secrets_inside,
    without_secrets,
)

UNSAFE = ["\x1b[31m", "\x9b31m", "\x07", "\r", "\x08", "\x7f", "\x00", "\u202e", "\u2066", "\u2029", "\ud800", "\u061c"]


@pytest.mark.parametrize("text", UNSAFE, ids=ascii)
def test_what_a_terminal_acts_on_is_escaped(text: str) -> None:
    shown = printable(f"a{text}b")
    assert shown.startswith("a\\") and shown.endswith("b") and text[0] not in shown
    assert shown.encode()
    dumped = printable_json(json.dumps([f"a{text}b"], ensure_ascii=False))
    assert text[0] not in dumped and json.loads(dumped) == [f"a{text}b"]


@pytest.mark.parametrize("text", ["a\nb\tc", "Straße, naïve, 東京, क्‍ष, می‌خواهم, 👩‍🚀", "[red]x[/]"])
def test_text_of_any_language_stays(text: str) -> None:
    assert printable(text) == text


def test_long_lists_and_long_names_are_cut() -> None:
    assert listed([f"l{n}" for n in range(1000)], most=3) == "l0, l1, l2 and 997 more"
    assert listed(["x" * 1000, "\x1b"]) == f"{'x' * 39}…, \\x1b"
    assert listed([]) == ""


def test_a_value_is_written_briefly_whatever_its_size() -> None:
    laughs: list[object] = ["x"]
    for _ in range(200):
        laughs = [laughs] * 9
    for value in (laughs, "x" * 10**6, 10**5000, {n: n for n in range(10**5)}, b"x" * 10**6):
        assert len(brief(value)) < 1000
    assert brief(True) == "True" and brief("3") == "'3'" and brief((1.5,)) == "(1.5,)"


PASSWORDS = ["secret", "se/cret", "se@cret", "se:cret/5", "s@/cret", ""]


@pytest.mark.parametrize("password", PASSWORDS)
def test_an_address_is_shown_without_its_password(password: str) -> None:
    shown = without_secrets(f"Cannot open postgresql://me:{password}@host:5432/mlflow; is it up?")
    assert shown == "Cannot open postgresql://***@host:5432/mlflow; is it up?"


@pytest.mark.parametrize(
    "address", ["https://host/a@b", "sqlite:////srv/a@b/mlflow.db", "http://host:5000: a@b", "https://host/x?page=2"]
)
def test_what_is_no_secret_stays(address: str) -> None:
    assert without_secrets(address) == address and not holds_secret(address)


@pytest.mark.parametrize("name", ["token", "access_token", "X-Amz-Signature", "sig", "password", "api_key"])
def test_a_secret_parameter_of_an_address_is_masked(name: str) -> None:
    address = f"https://host/x?page=2&{name}=abc%2Fdef&last=1"
    assert without_secrets(f"GET '{address}'") == f"GET 'https://host/x?page=2&{name}=***&last=1'"
    assert holds_secret(address)


def test_each_of_several_addresses_is_masked() -> None:
    text = "s3://a:first@b, then http://token@h/x and postgresql+asyncpg://u:second@h:1/d"
    assert without_secrets(text) == "s3://***@b, then http://***@h/x and postgresql+asyncpg://***@h:1/d"
    assert "first" not in without_secrets("s3://a:first@b,http://c:first@d")


def test_secrets_of_the_environment_are_masked_in_every_spelling() -> None:
    environment = {
        "DEAL_S3_SECRET_ACCESS_KEY": "a/secret+key",
        "PREFECT_API_AUTH_STRING": "admin:auth-secret",
        "DEAL_WEBHOOK_URL": "https://hooks.example/services/T0123456/abcdef",
        "DEAL_ENGINE_API_KEY": "short",
        "HTTPS_PROXY": "http://me:proxy%20secret@proxy:3128",
        "HF_TOKEN_PATH": "/home/me/token-file",
        "TOKENIZERS_PARALLELISM": "disabled",
    }
    text = (
        "a/secret+key a%2Fsecret%2Bkey auth-secret services/T0123456/abcdef "
        "proxy secret proxy%20secret short /home/me/token-file disabled"
    )
    assert without_known_secrets(text, environment) == "*** *** *** *** *** *** short /home/me/token-file disabled"


def test_known_secrets_inside_a_value_are_masked_and_its_shape_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEAL_WEBHOOK_SECRET", "the-secret")
    value = {"a": ["x the-secret", {"b": "the-secret"}], "n": 1, "none": None, "url": "http://u:p@h"}
    assert without_known_secrets_inside(value) == {
        "a": ["x ***", {"b": "***"}],
        "n": 1,
        "none": None,
        "url": "http://u:p@h",
    }


@pytest.mark.parametrize("kind", [ConfigError, StoreError, DataValidationError])
def test_an_error_of_ours_holds_no_secret(kind: type[Exception]) -> None:
    error = kind("Cannot reach http://me:the-secret@host: down")
    assert str(error) == "Cannot reach http://***@host: down" and "the-secret" not in repr(error)


@pytest.mark.parametrize("text", ["://" * 100_000, "://:" * 100_000 + "@", "a@" * 100_000 + "://", "?key" * 100_000])
def test_a_hostile_text_is_masked_in_linear_time(text: str) -> None:
    began = time.process_time()
    without_secrets(text)
    assert time.process_time() - began < 5


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("hf://datasets/u:PASSWORD@owner/name", "hf://datasets/***@owner/name"),
        ("hf://datasets/u:PASS/W@RD@owner/name:test", "hf://datasets/***@owner/name:test"),
        ("hf://datasets/hf_abcdefgh@owner/name", "hf://datasets/***@owner/name"),
        ("hf://datasets/owner/name@main:train", "hf://datasets/owner/name@main:train"),
        ("hf://datasets/owner/name@refs/pr/1:test", "hf://datasets/owner/name@refs/pr/1:test"),
    ],
    ids=["password", "odd password", "token", "revision", "pull request"],  # the test's name is in the environment
)
def test_a_password_before_a_repository_of_the_hub_is_masked_and_a_revision_is_not(address: str, shown: str) -> None:
    assert without_secrets(f"{address} is no dataset") == f"{shown} is no dataset"
    assert holds_secret(address) == (address != shown)
    assert str(ConfigError(address)) == shown


def test_a_name_of_thousands_of_characters_leaves_room_for_the_reason() -> None:
    shown = in_one_line(ConfigError(f"/tmp/{'a' * 5000}.csv cannot be read (File name too long); check the path."))
    assert shown.startswith("/tmp/aaa") and shown.endswith("a.csv cannot be read (File name too long); check the path.")
    assert len(shown) < 300
    path = f"/tmp/{'a' * 200}.csv"
    assert in_one_line(ConfigError(path)) == path
