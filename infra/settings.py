"""Settings of the machine, the store, MLflow and servers: one class per subject, read from the variables of a place.

The place is the one that `at_place` names, and the process's environment elsewhere. All defaults are below the folder
DEAL_HOME, so one machine needs no settings.

Example:
    >>> StoreSettings(home="/srv/deal").store_uri
    'file:///srv/deal/store'
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

import platformdirs
from pydantic import AfterValidator, Field, SecretStr
from pydantic_settings import BaseSettings, EnvSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

from deal_core.config import Shard
from deal_core.errors import ConfigError

Folder = Annotated[Path, AfterValidator(lambda path: Path(os.path.realpath(path.expanduser())))]
"""An absolute path, so that a change of directory does not change its meaning. It need not exist."""

QUIET = {
    "DO_NOT_TRACK": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "RAY_USAGE_STATS_ENABLED": "0",
}
"""Variables that turn off the telemetry and the screen output of Prefect, MLflow and Ray."""
IMPATIENT = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "4"}
"""For commands at which a person waits. Processes of `deal server up` have the patience of MLflow's own default."""


@dataclass(frozen=True)
class Place:
    """Where the files lie, and how this machine works: the variables that the settings below are read from."""

    variables: Mapping[str, str] = field(repr=False)
    """Name → value, such as DEAL_HOME → /srv/deal. Some are secrets."""


_place: ContextVar[Place | None] = ContextVar("deal_place", default=None)


@contextmanager
def at_place(place: Place) -> Iterator[None]:
    """Let the settings that are read in this block be those of a place. The environment stays as it is.

    A thread that the block starts reads the process's environment, unless it runs in a copy of the block's context.
    """
    token = _place.set(place)
    try:
        yield
    finally:
        _place.reset(token)


class _Settings(BaseSettings):
    model_config = SettingsConfigDict(env_prefix="DEAL_", env_ignore_empty=True, frozen=True)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Read the variables of the present place; without one, those of the process."""
        place = _place.get()
        if place is not None:
            assert isinstance(env_settings, EnvSettingsSource)
            env_settings.env_vars = {name.lower(): value for name, value in place.variables.items() if value}
        return init_settings, env_settings


class HomeSettings(_Settings):
    """Folders of this machine."""

    model_config = SettingsConfigDict(populate_by_name=True)

    home: Folder = Field(default=Path("deal-home"), validate_default=True)
    """Folder of everything that the pipeline writes without servers (DEAL_HOME)."""
    cache_dir: Folder = Field(default_factory=lambda: platformdirs.user_cache_path("deal"))
    """Base models that were downloaded or converted (DEAL_CACHE_DIR). Default: the user's cache folder."""


class LockSettings(_Settings):
    """The lock of a run on its lineage in a Prefect server."""

    lease_seconds: float = Field(default=300.0, ge=60.0, le=86_400.0)
    """Time after which a lock that is not renewed ends (DEAL_LEASE_SECONDS), a day at most, as Prefect demands. A run
    renews its lock after three quarters of this time and repeats a failed renewal for about a minute. So five minutes
    bridge one minute without the server.
    """


class StoreSettings(HomeSettings):
    """The object store. boto3's own sources (AWS_* variables, profiles, roles) give the keys that are not set."""

    store_uri: str = Field(default_factory=lambda data: (data["home"] / "store").as_uri())
    """file:///folder or s3://bucket/prefix (DEAL_STORE_URI). Default: DEAL_HOME/store."""
    s3_endpoint_url: str | None = None
    """Address of an S3 server other than Amazon's (DEAL_S3_ENDPOINT_URL)."""
    s3_region: str | None = None
    """Region of the bucket (DEAL_S3_REGION)."""
    s3_access_key_id: SecretStr | None = None
    """Access key (DEAL_S3_ACCESS_KEY_ID). It needs the secret key."""
    s3_secret_access_key: SecretStr | None = None
    """Secret key (DEAL_S3_SECRET_ACCESS_KEY)."""
    s3_max_attempts: int = Field(default=5, ge=1)
    """Number of attempts of a request, with growing pauses (DEAL_S3_MAX_ATTEMPTS). Five attempts take about 10 s.
    Fifteen bridge an outage of a minute and are recommended for workers."""
    s3_encryption: Literal["AES256", "aws:kms"] | None = None
    """Server-side encryption of written objects (DEAL_S3_ENCRYPTION); None: the bucket decides."""
    s3_kms_key_id: str | None = None
    """Key of aws:kms (DEAL_S3_KMS_KEY_ID); None: the key of the bucket or account."""


class LandingSettings(StoreSettings):
    """Notifications of the bucket. Address, region and keys are those of the store."""

    landing_queue_url: str | None = None
    """Address of the SQS queue of the bucket's events (DEAL_LANDING_QUEUE_URL)."""


class InboxSettings(_Settings):
    """When a folder in the inbox is complete."""

    inbox_settle_seconds: float = Field(default=300.0, ge=0.0)
    """Time without a change after which a folder without a file _SUCCESS is complete (DEAL_INBOX_SETTLE_SECONDS)."""


class NoticeSettings(_Settings):
    """Receivers of notices about adaptations, in addition to the Prefect server."""

    webhook_url: SecretStr | None = None
    """Address that gets every notice as signed JSON (DEAL_WEBHOOK_URL): https, or http on loopback. It is a secret,
    because it may contain a token."""
    webhook_secret: SecretStr | None = None
    """Key of the signature (DEAL_WEBHOOK_SECRET): whsec_ and base64, or any text. It is required with an address."""
    notification_block: str | None = None
    """`type/name` of a Prefect notification block (DEAL_NOTIFICATION_BLOCK), for example slack-webhook/operators.
    `deal server register` adds the block to its automations."""


def _in_uri(folder: Path) -> Path:
    """Return the folder if a database uri can contain it.

    A '?' would cut the path, and versions of SQLAlchemy differ on '%'.
    """
    if {"?", "%"} & set(str(folder)):
        raise ConfigError(f"The home folder {folder} has a '?' or '%' in its path; set DEAL_HOME to one without.")
    return folder


class TrackingSettings(HomeSettings):
    """MLflow: runs, models and their artifacts. MLflow's own MLFLOW_TRACKING_* variables give user and password."""

    tracking_uri: str = Field(
        default_factory=lambda data: f"sqlite:///{_in_uri(data['home'])}/mlflow.db",
        validation_alias="MLFLOW_TRACKING_URI",
    )
    """Address of a tracking server or a database (MLFLOW_TRACKING_URI). Default: SQLite in DEAL_HOME."""
    artifact_uri: str = Field(default_factory=lambda data: (data["home"] / "mlflow-artifacts").as_uri())
    """Folder of the artifacts if tracking_uri is a database (DEAL_ARTIFACT_URI). A server has its own folder. Default:
    DEAL_HOME/mlflow-artifacts."""


class ServingSettings(_Settings):
    """How this machine serves, and what it keeps of the answers."""

    base_model: str | None = None
    """Place of the base model (DEAL_BASE_MODEL); None: the place that the version names. Another model is refused."""
    serve_api_key: SecretStr | None = None
    """Token that clients of `deal serve` must send (DEAL_SERVE_API_KEY); None: the server asks for no token."""
    serving_precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Precision of the base model's weights (DEAL_SERVING_PRECISION); auto: as in training. In bf16 the other rows of a
    batch may change an answer that is a close decision; in fp32 they do not."""
    log_predictions: Literal["off", "numbers", "texts"] = "off"
    """What `deal serve` keeps of each answer (DEAL_LOG_PREDICTIONS): nothing, numbers and labels, or the texts too."""
    log_retention_days: int = Field(default=30, ge=1)
    """Days until `deal serve` and `deal data gc` remove logged rows and their feedback (DEAL_LOG_RETENTION_DAYS)."""


class EvaluationSettings(_Settings):
    """Where test rows are answered."""

    evaluate_engine: str | None = None
    """Address of a vLLM server that answers test rows (DEAL_EVALUATE_ENGINE); None: the process that evaluates does."""


class LaunchSettings(_Settings):
    """What starts the processes of a training and of its evaluation; `train.num_processes` is their number."""

    launch: Literal["local", "torchrun", "ray"] = "local"
    """local: on this machine. torchrun: by a command. ray: on a Ray cluster, that of RAY_ADDRESS or a new one on this
    machine (DEAL_LAUNCH)."""
    launch_command: str | None = None
    """The command of torchrun (DEAL_LAUNCH_COMMAND), such as `srun torchrun --nnodes 2 --nproc-per-node 4 ...`; it may
    contain {processes}. None: torchrun on this machine."""
    shard: Shard = "none"
    """base: each process holds a part of the base model, so that it need not fit on one device (DEAL_SHARD)."""
    ray_resources: dict[str, float] | None = None
    """What a worker takes of the Ray cluster (DEAL_RAY_RESOURCES, JSON), such as {"CPU": 8, "GPU": 1}. None: a GPU if
    the cluster has one, else a CPU."""


class EngineSettings(_Settings):
    """vLLM servers that answer for `deal serve --engine`, and the options that they were started with."""

    model_config = SettingsConfigDict(env_prefix="DEAL_ENGINE_")

    api_key: SecretStr | None = None
    """The servers' --api-key (DEAL_ENGINE_API_KEY)."""
    ca_file: Folder | None = None
    """PEM file of the authorities that sign the servers' certificates (DEAL_ENGINE_CA_FILE); None: the system's."""
    adapter_dir: Folder | None = None
    """Folder for copies of adapters that this machine and the servers can read (DEAL_ENGINE_ADAPTER_DIR); None:
    DEAL_HOME/engine-adapters."""
    server_adapter_dir: str | None = None
    """Path of that folder on the servers (DEAL_ENGINE_SERVER_ADAPTER_DIR); None: the same path."""
    max_lora_rank: int = Field(default=16, ge=1)
    """The --max-lora-rank of the servers that read published folders (DEAL_ENGINE_MAX_LORA_RANK). Its default is 16."""
    target_modules: frozenset[str] = frozenset(
        {"q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "gate_proj", "up_proj", "down_proj", "gate_up_proj"}
    )
    """Layers that may have an adapter in these servers (DEAL_ENGINE_TARGET_MODULES, a JSON list)."""
    grace_seconds: float = Field(default=30.0, ge=0.0)
    """Time for which the adapter before stays loaded (DEAL_ENGINE_GRACE_SECONDS)."""


def host_of(url: str, setting: str) -> str:
    """Return the host of an address, or raise ConfigError. No message has the address: it may contain a token."""
    try:
        host = urlsplit(url).hostname
    except ValueError:  # such as https://[abc
        host = None
    if not host:
        raise ConfigError(f"{setting} is no address with a host; give one, such as https://example.com/path.")
    return host


def make_places_absolute(environment: MutableMapping[str, str]) -> None:
    """Make relative folders in the environment absolute: processes of `deal server up` start in another directory."""
    for name in ("DEAL_CACHE_DIR", "DEAL_ENGINE_ADAPTER_DIR", "DEAL_ENGINE_CA_FILE"):
        if folder := environment.get(name):
            environment[name] = os.path.realpath(os.path.expanduser(folder))
    for name in ("DEAL_STORE_URI", "DEAL_ARTIFACT_URI"):
        if (uri := environment.get(name)) and "://" not in uri:
            environment[name] = Path(os.path.realpath(os.path.expanduser(uri))).as_uri()
    scheme, _, path = environment.get("MLFLOW_TRACKING_URI", "").partition("sqlite:///")
    if not scheme and path and not path.startswith(("/", ":")):
        environment["MLFLOW_TRACKING_URI"] = f"sqlite:///{os.path.realpath(path)}"


def embedded_environment(home: Path, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the variables with which Prefect and MLflow run without a server, without output, and inside `home`.

    They must be set before the import of Prefect and MLflow. With them, requests to a tracking server that does not
    answer end after half a minute, not after four. Variables in `environment` are left out. So is Prefect's database
    if PREFECT_API_URL names a server.

    Raises:
        ConfigError: A database uri cannot contain the path of `home`.
    """
    values = {**QUIET, **IMPATIENT, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    if not environment.get("PREFECT_API_URL"):
        folder = _in_uri(home) / "prefect"
        values["PREFECT_HOME"] = str(folder)
        values["PREFECT_API_DATABASE_CONNECTION_URL"] = f"sqlite+aiosqlite:///{folder / 'prefect.db'}"
    return {name: value for name, value in values.items() if name not in environment}
