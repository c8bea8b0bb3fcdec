"""Fixtures for all tests: a base model small enough that a whole run takes seconds."""

from __future__ import annotations

import asyncio
import functools
import gc
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("DO_NOT_TRACK", "true")
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
# No test uses TLS, and reading all authorities takes longer than most requests to a server do.
os.environ["SSL_CERT_FILE"] = str(Path(__file__).parent / "data" / "authority.pem")

import pytest
from filelock import FileLock
from hypothesis import settings

from tests.hypothesis_settings import BUSY
from tests.loopback import free_port
from tests.printed import check_commands_of_this_process
from tests.receiver import Receiver

# A shell starts what runs in its background with Ctrl-C ignored, and every process of a test would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("busy", BUSY)
settings.load_profile("busy")

pytest_plugins = ["tests.time_budget"]

# Fewer garbage collections than Python's 700, 10, 10: most of what they look at is imported code.
gc.set_threshold(50_000, 20, 20)

MakeOnce = Callable[[str, Callable[[Path], object]], Path]
START_SECONDS = 300
LONG = {"test_deployments.py", "test_python_api.py", "test_rollout.py", "test_secrets.py", "test_serve.py"}
"""Files whose tests wait for processes of their own."""
PREFECT_SERVER = pytest.StashKey[Any]()
"""The server of the fixture `prefect_api`, once a test has asked for it."""
UNUSED = (
    "PREFECT_LOGGING_TO_API_ENABLED",
    "PREFECT_SERVER_SERVICES_SCHEDULER_ENABLED",
    "PREFECT_SERVER_SERVICES_LATE_RUNS_ENABLED",
    "PREFECT_SERVER_SERVICES_FOREMAN_ENABLED",
    "PREFECT_SERVER_SERVICES_CANCELLATION_CLEANUP_ENABLED",
    "PREFECT_SERVER_SERVICES_PAUSE_EXPIRATIONS_ENABLED",
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_ENABLED",
    "PREFECT_SERVER_SERVICES_REPOSSESSOR_ENABLED",
    "PREFECT_SERVER_SERVICES_CLEANUP_RECONCILER_ENABLED",
)
"""What no test of the session's Prefect server needs: log lines on it, its records of the tasks' states, which are half
of its work, and loops that look at it every few seconds."""
last_test = "no test"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long tests first, so that no worker begins one when the others have run out of work."""

    def is_short(item: pytest.Item) -> bool:
        return item.path.name not in LONG and not any(map(item.get_closest_marker, ("base_model", "e2e")))

    items.sort(key=is_short)


@pytest.fixture(scope="session", autouse=True)
def no_full_collections() -> None:
    """Leave garbage collections to Python. Every training asks for a full one, which looks at every imported object."""
    from accelerate.utils import memory

    memory.gc = SimpleNamespace(collect=lambda: 0)


@pytest.fixture(scope="session", autouse=True)
def no_waiting_for_the_disk() -> None:
    """Do not wait until writes are on the disk: what a test writes need not survive the machine."""
    from sqlalchemy import Engine, event

    @event.listens_for(Engine, "connect")
    def leave_it_to_the_system(connection: object, _: object) -> None:
        if isinstance(connection, sqlite3.Connection):
            connection.execute("PRAGMA synchronous=OFF")

    os.fsync = lambda _: None


@pytest.fixture(autouse=True)
def a_stop_of_its_own() -> Iterator[None]:
    """Let no test stop the runs of a later one: calls of one thread without a reporter share their context."""
    from tasks import progress

    before = progress._current.set(None)
    yield
    progress._current.reset(before)


@pytest.fixture(scope="session", autouse=True)
def one_command_tree() -> None:
    """Make typer's tree of `deal` commands once; every call of a test's runner makes it again otherwise."""
    from typer import testing

    testing._get_command = functools.cache(testing._get_command)


@pytest.fixture(scope="session", autouse=True)
def json_as_the_reference_says() -> None:
    """Fail a test whose command prints other JSON than its schema says."""
    check_commands_of_this_process()


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> MakeOnce:
    """Return the folder of a name. The first process that asks makes it; the others wait for it and only read it."""
    root = tmp_path_factory.getbasetemp()
    if hasattr(request.config, "workerinput"):  # pytest-xdist: the processes' folders lie next to each other
        root = root.parent

    def folder_of(name: str, make: Callable[[Path], object]) -> Path:
        folder, done = root / "shared" / name, root / "shared" / f"{name}.done"
        (root / "shared").mkdir(exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                make(folder)
                done.touch()
        return folder

    return folder_of


@pytest.fixture(scope="session")
def tiny_base(made_once: MakeOnce) -> Path:
    """Folder of a base model whose runs take seconds."""
    from benchmarks.tiny_base import build_tiny_base

    return made_once("tiny-base", build_tiny_base)


@pytest.fixture(name="free_port")
def a_free_port() -> int:
    """A port of the loopback address that nothing listens on."""
    return free_port()


@pytest.fixture(scope="session")
def prefect_database(made_once: MakeOnce) -> Path:
    """An empty Prefect database: making its tables takes seconds, copying it none."""
    from prefect import settings
    from prefect.server.database import provide_database_interface
    from prefect.server.database.dependencies import temporary_database_interface

    async def make_tables() -> None:
        database = provide_database_interface()
        await database.create_db()
        await (await database.engine()).dispose()

    def make(folder: Path) -> None:
        address = {settings.PREFECT_SERVER_DATABASE_CONNECTION_URL: f"sqlite+aiosqlite:///{folder}/prefect.db"}
        with temporary_database_interface(), settings.temporary_settings(updates=address):
            asyncio.run(make_tables())

    return made_once("prefect", make) / "prefect.db"


@pytest.fixture(scope="session")
def prefect_api(request: pytest.FixtureRequest, prefect_database: Path) -> Iterator[None]:
    """A Prefect server for the flows of the whole session."""
    from prefect import settings
    from prefect.server.api.server import SubprocessASGIServer
    from prefect.testing import utilities

    folder = tempfile.mkdtemp()  # the harness deletes it
    shutil.copy(prefect_database, Path(folder) / "prefect-test.db")
    with (
        pytest.MonkeyPatch.context() as patch,
        settings.temporary_settings(updates={getattr(settings, name): False for name in UNUSED}),
    ):
        patch.setattr(utilities, "mkdtemp", lambda: folder)
        with utilities.prefect_test_harness(server_startup_timeout=START_SECONDS):
            request.session.stash[PREFECT_SERVER] = SubprocessASGIServer()
            yield


def pytest_runtest_logfinish(nodeid: str) -> None:
    """Keep the name of the test that ended last."""
    global last_test
    last_test = nodeid


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Start the Prefect server again if it has ended, so that one lost server does not fail every later test."""
    server = item.session.stash.get(PREFECT_SERVER, None)
    if server is None or server.server_process is None or (code := server.server_process.poll()) is None:
        return
    warnings.warn(f"The Prefect server ended with code {code}, noticed after {last_test}.", stacklevel=1)
    server.running = False
    server.start(START_SECONDS)


@pytest.fixture(scope="session")
def mlflow_database(made_once: MakeOnce) -> Path:
    """An empty MLflow database: making its tables takes seconds, copying it none."""
    from mlflow.store.db import utils

    from infra.settings import TrackingSettings
    from infra.tracking.tracker import Tracker

    # Every store compares its tables with the newest migration, and reads all of them to know which that is.
    utils._get_latest_schema_revision = functools.cache(utils._get_latest_schema_revision)
    return made_once("mlflow", lambda folder: Tracker(TrackingSettings(home=folder))) / "mlflow.db"


@pytest.fixture
def home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mlflow_database: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """An empty home folder that the settings point at."""
    for name in [name for name in os.environ if name.startswith("DEAL_")]:
        monkeypatch.delenv(name)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = tmp_path / "home"
    folder.mkdir()
    shutil.copy(mlflow_database, folder / "mlflow.db")
    monkeypatch.setenv("DEAL_HOME", str(folder))
    monkeypatch.setenv("DEAL_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "cache"))
    return folder


@pytest.fixture
def receiver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Receiver]:
    """Gets the webhook's notices."""
    with Receiver() as found:
        monkeypatch.setenv("DEAL_WEBHOOK_URL", found.url)
        monkeypatch.setenv("DEAL_WEBHOOK_SECRET", "a-secret")
        yield found


@pytest.fixture
def mlflow_server(tmp_path: Path, free_port: int, mlflow_database: Path) -> Iterator[str]:
    """Address of an MLflow server that keeps the artifacts itself, in server/ of the test's folder."""
    from infra.settings import QUIET

    folder = tmp_path / "server"
    folder.mkdir()
    shutil.copy(mlflow_database, folder / "mlflow.db")
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "mlflow",
            "server",
            "--host",
            "127.0.0.1",
            "--port",
            str(free_port),
            "--workers",
            "1",
            "--backend-store-uri",
            f"sqlite:///{folder}/mlflow.db",
            "--artifacts-destination",
            str(folder / "artifacts"),
        ],
        cwd=folder,
        env={**os.environ, **QUIET, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    log = []
    try:
        for line in process.stdout:
            log.append(line)
            if "startup complete" in line:
                break
        else:
            pytest.fail("".join(log))
        yield f"http://127.0.0.1:{free_port}"
    finally:
        process.terminate()
        process.communicate()
