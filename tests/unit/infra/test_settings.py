"""The settings: their defaults, variables and effects."""

from __future__ import annotations

from pathlib import Path

import pytest

from deal_core.errors import ConfigError
from infra.settings import (
    HomeSettings,
    StoreSettings,
    TrackingSettings,
    embedded_environment,
    host_of,
    make_places_absolute,
)
from infra.store.opening import store_at

NAMES = (
    "DEAL_HOME",
    "DEAL_CACHE_DIR",
    "DEAL_STORE_URI",
    "DEAL_ARTIFACT_URI",
    "MLFLOW_TRACKING_URI",
    "DEAL_S3_ENDPOINT_URL",
    "DEAL_S3_REGION",
    "DEAL_S3_ACCESS_KEY_ID",
    "DEAL_S3_SECRET_ACCESS_KEY",
    "DEAL_S3_MAX_ATTEMPTS",
    "DEAL_S3_ENCRYPTION",
    "DEAL_S3_KMS_KEY_ID",
    "DEAL_LANDING_QUEUE_URL",
)


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


def test_everything_is_under_one_folder_by_default(tmp_path: Path) -> None:
    home = tmp_path / "deal-home"
    assert HomeSettings().home == home
    assert StoreSettings().store_uri == (home / "store").as_uri()
    assert TrackingSettings().tracking_uri == f"sqlite:///{home}/mlflow.db"
    assert TrackingSettings().artifact_uri == (home / "mlflow-artifacts").as_uri()
    assert list(tmp_path.iterdir()) == []


def test_relative_places_become_absolute(tmp_path: Path) -> None:
    given = {
        "DEAL_CACHE_DIR": "cache",
        "DEAL_STORE_URI": "store",
        "DEAL_ARTIFACT_URI": "s3://bucket/artifacts",
        "MLFLOW_TRACKING_URI": "sqlite:///mlflow.db",
    }
    make_places_absolute(given)
    assert given == {
        "DEAL_CACHE_DIR": f"{tmp_path}/cache",
        "DEAL_STORE_URI": f"file://{tmp_path}/store",
        "DEAL_ARTIFACT_URI": "s3://bucket/artifacts",
        "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db",
    }
    again = dict(given)
    make_places_absolute(again)
    assert again == given
    for uri in ("http://localhost:5000", "sqlite:///:memory:", "postgresql://u@h/db"):
        make_places_absolute(other := {"MLFLOW_TRACKING_URI": uri})
        assert other == {"MLFLOW_TRACKING_URI": uri}


def test_each_variable_is_honoured_and_an_empty_one_is_not(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DEAL_CACHE_DIR", str(tmp_path / "models"))
    monkeypatch.setenv("DEAL_STORE_URI", "s3://bucket/team")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://mlflow.example")
    monkeypatch.setenv("DEAL_ARTIFACT_URI", "")
    assert HomeSettings().cache_dir == tmp_path / "models"
    assert StoreSettings().store_uri == "s3://bucket/team"
    assert TrackingSettings().tracking_uri == "https://mlflow.example"
    assert TrackingSettings().artifact_uri.startswith("file:")


def test_s3_settings_reach_the_client_and_the_secret_is_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEAL_S3_ENDPOINT_URL", "http://127.0.0.1:9000")
    monkeypatch.setenv("DEAL_S3_REGION", "eu-west-3")
    monkeypatch.setenv("DEAL_S3_ACCESS_KEY_ID", "the-key")
    monkeypatch.setenv("DEAL_S3_SECRET_ACCESS_KEY", "the-secret")
    settings = StoreSettings()
    client = store_at("s3://bucket").client  # type: ignore[attr-defined]
    credentials = client._request_signer._credentials
    assert client.meta.endpoint_url == "http://127.0.0.1:9000"
    assert client.meta.region_name == "eu-west-3"
    assert (credentials.access_key, credentials.secret_key) == ("the-key", "the-secret")
    assert "the-secret" not in f"{settings!r}{settings}{settings.model_dump_json()}"


def test_checksums_of_a_server_that_aws_variables_name_are_theirs_to_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9000")
    client = store_at("s3://bucket").client  # type: ignore[attr-defined]
    assert client.meta.endpoint_url == "http://127.0.0.1:9000"
    assert client.meta.config.request_checksum_calculation == "when_required"
    assert client.meta.config.response_checksum_validation == "when_supported"


def test_half_a_pair_of_keys_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEAL_S3_ACCESS_KEY_ID", "the-key")
    with pytest.raises(ConfigError, match="set both or none"):
        store_at("s3://bucket")


@pytest.mark.parametrize("uri", ["ftp://host/x", "s3://", "s3://bucket?x=1", "file://host/folder", "gs://bucket"])
def test_other_stores_are_refused_with_a_remedy(uri: str) -> None:
    with pytest.raises(ConfigError, match=r"neither file:///folder nor s3://.*DEAL_STORE_URI"):
        store_at(uri)


@pytest.mark.parametrize(
    "uri",
    [
        "s3://KEY:hunter2@bucket/x",
        "s3://me:hun/ter2@bucket",
        "https://me:hunter2@host/x",
        "s3://bucket/x?key=hunter2",
        "file://me:hunter2@host/folder",
    ],
)
def test_an_address_with_a_password_is_refused_and_the_password_not_shown(uri: str) -> None:
    with pytest.raises(ConfigError, match="DEAL_S3_SECRET_ACCESS_KEY") as refused:
        store_at(uri)
    assert "ter2" not in str(refused.value)


@pytest.mark.parametrize("name", ["DEAL_S3_ENDPOINT_URL", "AWS_ENDPOINT_URL"])
@pytest.mark.parametrize("host", ["hunter2@host:9000", "hunter2@ho st", "12/hunter2@host", "hun/ter2@host"])
def test_a_server_with_a_password_is_refused_and_the_password_not_shown(
    name: str, host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, f"http://me:{host}")
    monkeypatch.setenv("DEAL_S3_ACCESS_KEY_ID", "somebody")  # so that boto3 requests no keys from a server
    monkeypatch.setenv("DEAL_S3_SECRET_ACCESS_KEY", "secret")
    with pytest.raises(ConfigError, match="DEAL_S3_") as refused:
        store_at("s3://bucket")
    assert "ter2" not in str(refused.value)


@pytest.mark.parametrize("name", ["a?b", "a%20b"])
def test_a_home_that_no_database_uri_can_name_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="set DEAL_HOME"):
        TrackingSettings(home=tmp_path / name)
    with pytest.raises(ConfigError, match="set DEAL_HOME"):
        embedded_environment(tmp_path / name, {})
    assert StoreSettings(home=tmp_path / name).home == tmp_path / name


def test_embedded_prefect_lives_in_the_home_folder_and_calls_nobody() -> None:
    values = embedded_environment(Path("/srv/deal"), {})
    assert values["PREFECT_HOME"] == "/srv/deal/prefect"
    assert values["PREFECT_API_DATABASE_CONNECTION_URL"] == "sqlite+aiosqlite:////srv/deal/prefect/prefect.db"
    assert values["DO_NOT_TRACK"] == values["MLFLOW_DISABLE_TELEMETRY"] == "true"
    assert values["PREFECT_SERVER_ANALYTICS_ENABLED"] == "false"


def test_what_the_user_has_set_is_kept() -> None:
    with_server = embedded_environment(Path("/srv/deal"), {"PREFECT_API_URL": "http://prefect:4200/api"})
    assert not {"PREFECT_HOME", "PREFECT_API_DATABASE_CONNECTION_URL"} & with_server.keys()
    assert with_server["DO_NOT_TRACK"] == "true"
    with_home = embedded_environment(Path("/srv/deal"), {"PREFECT_HOME": "/mine", "DO_NOT_TRACK": "1"})
    assert not {"PREFECT_HOME", "DO_NOT_TRACK"} & with_home.keys()


def test_an_address_without_a_host_is_refused_and_not_shown() -> None:
    assert host_of("https://user:pass@example.org/hook", "DEAL_WEBHOOK_URL") == "example.org"
    for url in ("https://[secret/x", "https:///secret", "secret", ""):
        with pytest.raises(ConfigError, match="DEAL_WEBHOOK_URL is no address with a host") as caught:
            host_of(url, "DEAL_WEBHOOK_URL")
        assert "secret" not in str(caught.value)
