"""What a command uses: its home folder, its log files, a Prefect API that ends with it, and MLflow's pages.

Only commands use this module, before they import anything heavy. A flow that a worker starts has its own environment.
"""

from __future__ import annotations

import errno
import logging
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
import urllib.request
import warnings
import webbrowser
from collections.abc import Mapping, MutableMapping
from concurrent.futures import Future
from contextlib import closing, suppress
from contextvars import copy_context
from pathlib import Path

from pydantic import BaseModel

from deal_core.errors import ConfigError, DealError, in_one_line
from deal_core.regular_file import WRONG_PATH, complete_file
from deal_core.safe_text import without_secrets

LOGGING_YAML = """\
# Written by the deal command: messages of Prefect and MLflow go to a file in this folder.
version: 1
disable_existing_loggers: false
formatters:
  plain: {{(): infra.logs.PlainFormatter}}
handlers:
  file: {{class: infra.logs.LogFile, filename: {filename}, formatter: plain, delay: true}}
  api: {{class: prefect.logging.handlers.APILogHandler}}
loggers:
  prefect: {{level: INFO}}
  prefect.flow_runs: {{level: NOTSET, handlers: [api]}}
  prefect.task_runs: {{level: NOTSET, handlers: [api]}}
  prefect._internal: {{level: ERROR, propagate: false, handlers: [file]}}
root: {{level: WARNING, handlers: [file]}}
"""

FAILURES = logging.getLogger("deal")
"""Log of unexpected errors."""

API_SECONDS = 300
"""Longest wait for Prefect's API. Its default, 20, is short on a busy machine."""
SETTINGS = {
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": str(API_SECONDS),
    "MLFLOW_CONFIGURE_LOGGING": "false",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONWARNINGS": "ignore",
}
"""For this process and its children. Values that the user has set are kept."""
COMMAND_PID = "DEAL_COMMAND_PID"
"""Environment variable that tells the API's process which command it belongs to."""
API_MARK = "prefect.server.api.server:create_app"
"""Part of the command line of an API's process."""
_WRONG_PATH = (*WRONG_PATH, errno.EEXIST, errno.EROFS)
"""Numbers of the errors of a path that cannot be read or written."""
PAGES_SECONDS = 60
"""Longest wait for MLflow's pages, and for their server's end."""
CHECK_SECONDS = 1.0
"""Longest check of Prefect's database."""
STEPS_OF_CHECK = 1000
"""Steps of SQLite's machine between two looks at the clock."""


class DatabaseError(DealError):
    """Prefect's database is damaged."""

    code = "prefect-database"


def enter_home(home: Path | None, *, makes_home: bool = True) -> Path:
    """Create the home folder, direct this process's files to it, and return its path. None: DEAL_HOME or its default.

    Args:
        home: the folder.
        makes_home: without it, a home that does not exist and would hold the store is not created: nothing can be
            found there. Nothing is logged then.

    Raises:
        ConfigError: The folder cannot be used, or another release made the store (`FormatError`); nothing is written.
    """
    from infra.disk import disk_full
    from infra.logs import LogFile, PlainFormatter, ready_log
    from infra.settings import HomeSettings, embedded_environment, make_places_absolute
    from infra.store.format import FormatError
    from infra.store.opening import open_store

    make_places_absolute(os.environ)
    if home is not None:
        os.environ["DEAL_HOME"] = os.path.realpath(home.expanduser())
    folder = HomeSettings().home
    os.environ["DEAL_HOME"] = str(folder)
    try:
        open_store()
    except FormatError:
        raise
    except (DealError, ValueError, RuntimeError):  # the command says so, if it needs the store
        pass
    if not makes_home and not folder.exists() and "DEAL_STORE_URI" not in os.environ:
        _settle({**SETTINGS, **embedded_environment(folder)}, logging.NullHandler())
        return folder
    log_file = folder / "logs" / "deal.log"
    logging_file = log_file.with_name("logging.yml")
    quoted = "'" + str(log_file).replace("'", "''").replace("$", "$$") + "'"
    try:
        ready_log(log_file)
        with complete_file(logging_file) as part:  # another command may read it just now
            part.write_text(LOGGING_YAML.format(filename=quoted), encoding="utf-8")
    except OSError as error:
        if disk_full(error) is None:  # on a full disk commands that read or remove work, without a log
            problem = f"The home folder {folder} cannot be used ({error.strerror}); give one with --home."
            raise ConfigError(problem) from None
    servers = running_servers(folder, os.environ)
    settings = embedded_environment(folder, {**servers, **os.environ})
    logging.raiseExceptions = False  # if the disk is full and a log cannot be written, print nothing
    # a command without Prefect has no other handler, and Python's default handler prints to the screen
    handler: logging.Handler = logging.NullHandler()
    if log_file.parent.is_dir():
        handler = LogFile(log_file, delay=True)
        handler.setFormatter(PlainFormatter())
    _settle({**SETTINGS, "PREFECT_LOGGING_SETTINGS_PATH": str(logging_file), **servers, **settings}, handler)
    return folder


def _settle(variables: Mapping[str, str], handler: logging.Handler) -> None:
    """Set the variables that the user has not set, and send unexpected errors and warnings away from the screen."""
    for name, value in variables.items():
        os.environ.setdefault(name, value)
    logging.captureWarnings(True)
    warnings.simplefilter("ignore")
    FAILURES.handlers, FAILURES.propagate = [handler], False


def running_servers(home: Path, environment: MutableMapping[str, str]) -> dict[str, str]:
    """Return the variables that make a command use the servers of `deal server up`; empty if they do not run.

    The database that `deal server up` was given is that of its MLflow server. A command writes to the server then,
    because the server alone knows where it keeps artifacts. So the database's address is removed from `environment`.
    """
    if not (home / "stack.json").exists():
        return {}
    from deal_pipeline.server.local_processes import read_stack

    stack = read_stack(home)
    if stack is None or not stack.is_alive():
        return {}
    if environment.get("MLFLOW_TRACKING_URI") == stack.backend_uri:
        del environment["MLFLOW_TRACKING_URI"]
    return stack.environment()


def explained(error: Exception, home: Path | None, option: str | None = None) -> DealError:
    """Return an error as one of the project's own. What nobody expected goes to the log, with its traceback.

    `option` is that of a command with which it shows the traceback.
    """
    from infra.disk import disk_full, disk_full_unexpected

    if isinstance(error, DealError):
        return disk_full(error) or error
    if full := disk_full_unexpected(error):
        return full
    FAILURES.error("The command failed", exc_info=error)
    # a path that a person has given and no file can have, or that may not be used
    if isinstance(error, OSError) and error.errno in _WRONG_PATH and error.filename is not None:
        return ConfigError(f"{os.fsdecode(error.filename)} cannot be used ({error.strerror}); check the path.")
    if isinstance(error, ValueError) and "embedded null" in str(error):
        return ConfigError("A path has a NUL in it, which no file's name can have; check the paths.")
    places = [str(home / "logs" / "deal.log")] if home is not None and home.exists() else []
    places += [option] if option else []
    where = f"; {' and '.join(places)} show{'' if len(places) > 1 else 's'} where it happened" if places else ""
    return DealError(f"{in_one_line(error)}. This was not expected{where}.", code="unexpected")


def calm_libraries() -> None:
    """Send warnings of libraries to the log file and hide their progress bars. Call this after the imports."""
    for name in ("mlflow", "alembic", "transformers", "datasets", "huggingface_hub", "accelerate", "peft"):
        library = logging.getLogger(name)
        library.handlers.clear()
        library.propagate = True
    warnings.simplefilter("ignore")  # some libraries set filters when they are imported
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]


def require_database() -> None:
    """Raise DatabaseError if the file of Prefect's database is damaged: Prefect would try it again and again.

    A damage that is not found in CHECK_SECONDS is left to Prefect. A server elsewhere has its own database.
    """
    import sqlite3

    url = os.environ.get("PREFECT_API_DATABASE_CONNECTION_URL", "")
    file = Path(url.partition(":///")[2])
    if not url.startswith("sqlite") or not file.is_file():
        return
    problem, end = "ok", time.monotonic() + CHECK_SECONDS
    try:
        with closing(
            sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro", uri=True, timeout=CHECK_SECONDS)
        ) as database:
            database.set_progress_handler(lambda: time.monotonic() > end, STEPS_OF_CHECK)
            (problem,) = database.execute("PRAGMA quick_check(1)").fetchone()
    except sqlite3.DatabaseError as error:
        if error.sqlite_errorcode & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            problem = str(error)
    if problem != "ok":
        raise DatabaseError(
            f"Prefect's database {file} is damaged ({' '.join(problem.split())}). Move it away with {file.name}-wal "
            f"and {file.name}-shm, and run the same command again: it makes a new one. Only the history of Prefect's "
            "runs is lost."
        )


def start_api() -> Future[None]:
    """Start Prefect's API in the background, unless PREFECT_API_URL names a server. The API ends with this process.

    Ctrl-C in a terminal goes to all its processes. The flow needs the API in order to end cleanly, so the API starts
    with that signal blocked.

    Returns:
        Its result is there once the API answers, or has not started.

    Raises:
        DatabaseError: The API's database is damaged.
    """
    from prefect.client.orchestration import get_client
    from prefect.settings import get_current_settings

    if not get_current_settings().api.url:
        require_database()
        # imported here: two threads that import one package may see half of it
        from prefect.server.api import server  # noqa: F401

    os.environ[COMMAND_PID] = str(os.getpid())
    # Prefect starts its API as a uvicorn command, which would write its errors to the screen.
    os.environ["UVICORN_LOG_CONFIG"] = os.environ["PREFECT_LOGGING_SETTINGS_PATH"]
    started: Future[None] = Future()

    def start() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # of this thread; the API inherits it
        try:
            get_client(sync_client=True)
        except BaseException as error:  # whoever waits for the result gets it
            started.set_exception(error)
        else:
            started.set_result(None)

    threading.Thread(target=copy_context().run, args=(start,), name="start Prefect's API", daemon=True).start()
    return started


def end_orphans(home: Path) -> None:
    """End the APIs of this home whose command was killed."""
    import psutil

    for process in psutil.process_iter():
        with suppress(psutil.Error):  # the process has ended, or is another user's
            if API_MARK not in " ".join(process.cmdline()):
                continue
            environment = process.environ()
            is_ours = environment.get("PREFECT_HOME") == str(home / "prefect")
            if is_ours and environment.get(COMMAND_PID, "") not in ("", str(process.ppid())):
                process.terminate()


class UiAddress(BaseModel, frozen=True):
    """Where MLflow shows the runs, and how to start its server."""

    tracking_uri: str
    """Where MLflow keeps the runs."""
    url: str
    """Address of MLflow's pages."""
    command: tuple[str, ...]
    """Starts the server; empty if a server runs already."""
    environment: dict[str, str] = {}
    """Variables of the command: every user of the machine can read arguments. A printed address has no passwords."""

    def shown(self) -> UiAddress:
        """Return a copy without passwords."""
        environment = {name: without_secrets(value) for name, value in self.environment.items()}
        tracking_uri, url = without_secrets(self.tracking_uri), without_secrets(self.url)
        return UiAddress(tracking_uri=tracking_uri, url=url, command=self.command, environment=environment)

    def line(self) -> str:
        """Return the command as a line for a shell."""
        variables = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return " ".join([*variables, shlex.join(self.command)])


def ui_address(port: int) -> UiAddress:
    """Return the address of MLflow's pages: the tracking server's, or that of a server on this port."""
    from infra.settings import TrackingSettings

    settings = TrackingSettings()
    uri = settings.tracking_uri
    if uri.startswith(("http://", "https://")):
        return UiAddress(tracking_uri=uri, url=uri, command=())
    command = ("mlflow", "ui", "--host", "127.0.0.1", "--port", str(port), "--workers", "1")
    environment = {"MLFLOW_BACKEND_STORE_URI": uri, "MLFLOW_ARTIFACTS_DESTINATION": settings.artifact_uri}
    return UiAddress(tracking_uri=uri, url=f"http://127.0.0.1:{port}", command=command, environment=environment)


def open_ui(address: UiAddress) -> int:
    """Open the address in a browser; start the server first if none runs. Return the server's exit code.

    The server has processes of its own. All of them end with this one, unless it is killed.
    """
    if not address.command:
        webbrowser.open(address.url)
        return 0
    threading.Thread(target=_open_when_ready, args=(address.url,), daemon=True).start()
    for ending in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(ending, lambda number, frame: sys.exit(128 + number))
    environment = {**os.environ, **address.environment}
    server = subprocess.Popen([sys.executable, "-m", *address.command], env=environment, start_new_session=True)
    try:
        return server.wait()
    except KeyboardInterrupt:
        return 0
    finally:
        for ending in (signal.SIGTERM, signal.SIGKILL):  # to the whole group
            with suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(server.pid, ending)
                server.wait(PAGES_SECONDS)


def _open_when_ready(url: str) -> None:
    deadline = time.monotonic() + PAGES_SECONDS
    while time.monotonic() < deadline:
        try:
            urllib.request.urlopen(f"{url}/health", timeout=1).close()
        except OSError:  # includes URLError
            time.sleep(0.5)
        else:
            webbrowser.open(url)
            return
