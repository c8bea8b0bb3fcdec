"""Where the pipeline runs: one settings class per concern, read from the environment when it is made.

Everything has a default under one folder, DEAL_HOME, so that nothing needs to be set to run on one machine.

Example:
    >>> StoreSettings(home="/srv/deal").store_uri
    'file:///srv/deal/store'
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import platformdirs
from pydantic import AfterValidator, Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

from deal_core.errors import ConfigError

Folder = Annotated[Path, AfterValidator(lambda path: Path(os.path.realpath(path.expanduser())))]
"""A path made absolute, so that it means the same after a change of directory; it need not exist."""

QUIET = {
    "DO_NOT_TRACK": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
"""What keeps Prefect and MLflow from calling home, and off the screen."""


class HomeSettings(BaseSettings):
    """Folders of this machine."""

    model_config = SettingsConfigDict(env_prefix="DEAL_", env_ignore_empty=True, frozen=True, populate_by_name=True)

    home: Folder = Field(default=Path("deal-home"), validate_default=True)
    """Everything the pipeline writes when it runs embedded (DEAL_HOME)."""
    cache_dir: Folder = Field(default_factory=lambda: platformdirs.user_cache_path("deal"))
    """Base models that were downloaded or converted (DEAL_CACHE_DIR)."""


class LockSettings(BaseSettings):
    """The hold of a run on its lineage, where a Prefect server keeps it."""

    model_config = SettingsConfigDict(env_prefix="DEAL_", env_ignore_empty=True, frozen=True)

    lease_seconds: float = Field(default=300.0, ge=60.0)
    """A holder that is gone is taken to be gone after so long (DEAL_LEASE_SECONDS). A live one renews its hold at three
    quarters of it and tries for about a minute, so that five minutes bridge a server that is away for one."""


def _default_store(data: dict[str, Any]) -> str:
    return str((data["home"] / "store").as_uri())


class StoreSettings(HomeSettings):
    """The object store. Keys that are not set are left to boto3's own sources (AWS_* variables, profiles, roles)."""

    store_uri: str = Field(default_factory=_default_store)
    """file:///folder or s3://bucket/prefix (DEAL_STORE_URI)."""
    s3_endpoint_url: str | None = None
    """Address of an S3 server other than Amazon's (DEAL_S3_ENDPOINT_URL)."""
    s3_region: str | None = None
    """Region of the bucket (DEAL_S3_REGION)."""
    s3_access_key_id: SecretStr | None = None
    """Access key (DEAL_S3_ACCESS_KEY_ID); needs the secret key too."""
    s3_secret_access_key: SecretStr | None = None
    """Secret key (DEAL_S3_SECRET_ACCESS_KEY)."""
    s3_max_attempts: int = Field(default=5, ge=1)
    """How often a request is sent before it counts as failed, with growing pauses (DEAL_S3_MAX_ATTEMPTS). Five are over
    in about ten seconds; fifteen bridge a minute's outage, which is what workers want."""
    s3_encryption: Literal["AES256", "aws:kms"] | None = None
    """Server-side encryption of what is written (DEAL_S3_ENCRYPTION); None leaves it to the bucket."""
    s3_kms_key_id: str | None = None
    """Key of aws:kms (DEAL_S3_KMS_KEY_ID); None: the bucket's or account's own."""


class LandingSettings(StoreSettings):
    """Notifications of the bucket; address, region and keys are the store's."""

    landing_queue_url: str | None = None
    """Address of the SQS queue that the bucket's events go to (DEAL_LANDING_QUEUE_URL)."""


class NoticeSettings(BaseSettings):
    """Who is told what became of an adaptation, besides the Prefect server."""

    model_config = SettingsConfigDict(env_prefix="DEAL_", env_ignore_empty=True, frozen=True)

    webhook_url: SecretStr | None = None
    """Address that gets every notice as signed JSON (DEAL_WEBHOOK_URL); https, or http on loopback. It may hold a
    token, so it is treated as a secret."""
    webhook_secret: SecretStr | None = None
    """Key of the signature (DEAL_WEBHOOK_SECRET); needed where the address is given."""
    notification_block: str | None = None
    """`type/name` of a Prefect notification block (DEAL_NOTIFICATION_BLOCK), which `deal deploy` ties to the
    automations that tell people, for example slack-webhook/operators."""


def _default_tracking(data: dict[str, Any]) -> str:
    return f"sqlite:///{_in_uri(data['home'])}/mlflow.db"


def _in_uri(folder: Path) -> Path:
    """The folder, if a database uri can name it: a '?' would cut the path, and versions of SQLAlchemy differ on '%'."""
    if {"?", "%"} & set(str(folder)):
        raise ConfigError(f"The home folder {folder} has a '?' or '%' in its path; set DEAL_HOME to one without.")
    return folder


def _default_artifacts(data: dict[str, Any]) -> str:
    return str((data["home"] / "mlflow-artifacts").as_uri())


class TrackingSettings(HomeSettings):
    """MLflow: runs, models and their artifacts. User and password are MLflow's own MLFLOW_TRACKING_* variables."""

    tracking_uri: str = Field(default_factory=_default_tracking, validation_alias="MLFLOW_TRACKING_URI")
    """A tracking server, or a database (MLFLOW_TRACKING_URI)."""
    artifact_uri: str = Field(default_factory=_default_artifacts)
    """Where artifacts go when tracking_uri is a database (DEAL_ARTIFACT_URI); a server decides for itself."""


class ServingSettings(BaseSettings):
    """How a version is served on this machine."""

    model_config = SettingsConfigDict(env_prefix="DEAL_", env_ignore_empty=True, frozen=True)

    base_model: str | None = None
    """Where the base model is here (DEAL_BASE_MODEL); None: where the version says. Another one is refused."""
    serving_precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Of the base model's weights (DEAL_SERVING_PRECISION); auto is as in training. In bf16 the rounding of a batch may
    tip an answer that hung in the balance; in fp32 an answer does not depend on what else is asked at that moment."""


class VllmSettings(BaseSettings):
    """A vLLM server that is kept in step with a lineage's champion, and what it was started to allow."""

    model_config = SettingsConfigDict(env_prefix="DEAL_VLLM_", env_ignore_empty=True, frozen=True)

    url: str | None = None
    """Address of the server (DEAL_VLLM_URL), such as http://127.0.0.1:8000."""
    api_key: SecretStr | None = None
    """What the server was given as --api-key (DEAL_VLLM_API_KEY)."""
    adapter_dir: Folder | None = None
    """Folder that both this machine and the server see (DEAL_VLLM_ADAPTER_DIR); adapters are copied into it."""
    server_adapter_dir: str | None = None
    """Path of that folder on the server (DEAL_VLLM_SERVER_ADAPTER_DIR); None: the same."""
    max_lora_rank: int = Field(default=16, ge=1)
    """The server's --max-lora-rank (DEAL_VLLM_MAX_LORA_RANK); its default is 16."""
    target_modules: frozenset[str] = frozenset(
        {"q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "gate_proj", "up_proj", "down_proj", "gate_up_proj"}
    )
    """Layers that the server lets carry an adapter (DEAL_VLLM_TARGET_MODULES, a JSON list)."""
    grace_seconds: float = Field(default=30.0, ge=0.0)
    """How long the adapter that served before stays loaded (DEAL_VLLM_GRACE_SECONDS), for who has not looked again."""
    max_attempts: int = Field(default=5, ge=1)
    """How often a request is sent before the server counts as away, with growing pauses (DEAL_VLLM_MAX_ATTEMPTS)."""


def embedded_environment(home: Path, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Environment variables that let Prefect and MLflow run without a server, quietly, inside `home`.

    The command sets them before it imports either; a tracking server that is away is given up after half a minute
    rather than four. A variable that `environment` has is left out; so is Prefect's
    database when PREFECT_API_URL names a server.

    Args:
        home: the folder that takes everything; see HomeSettings.
        environment: what the user has set.

    Raises:
        ConfigError: the path of `home` does not fit into a database uri.
    """
    values = {**QUIET, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "4"}
    if not environment.get("PREFECT_API_URL"):
        folder = _in_uri(home) / "prefect"
        values["PREFECT_HOME"] = str(folder)
        values["PREFECT_API_DATABASE_CONNECTION_URL"] = f"sqlite+aiosqlite:///{folder / 'prefect.db'}"
    return {name: value for name, value in values.items() if name not in environment}
