"""The ground a command runs on: one folder for everything, no server, nobody's log lines but ours on the screen.

Only commands call this, before they import anything heavy; a flow that a worker starts brings its own environment.
"""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path

from deal_core.errors import ConfigError

LOGGING_YAML = """\
# Written by the deal command: what Prefect and MLflow have to say goes to a file beside this one.
version: 1
disable_existing_loggers: false
formatters:
  plain: {{class: infra.logs.PlainFormatter, format: "%(asctime)s %(levelname)s %(name)s: %(message)s"}}
handlers:
  file: {{class: logging.FileHandler, filename: {filename}, formatter: plain, delay: true}}
  api: {{class: prefect.logging.handlers.APILogHandler}}
loggers:
  prefect: {{level: INFO}}
  prefect.flow_runs: {{level: NOTSET, handlers: [api]}}
  prefect.task_runs: {{level: NOTSET, handlers: [api]}}
  prefect._internal: {{level: ERROR, propagate: false, handlers: [file]}}
root: {{level: WARNING, handlers: [file]}}
"""

FAILURES = logging.getLogger("deal")
"""Where a command writes what nobody expected."""

SETTINGS = {
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "300",  # the default, 20, is short on a busy machine
    "MLFLOW_CONFIGURE_LOGGING": "false",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONWARNINGS": "ignore",
}
"""For this process and the ones it starts; a value the user has set is kept."""


def enter_home(home: Path | None) -> Path:
    """Make the home folder, point everything that writes at it, and return it.

    Args:
        home: the folder; None leaves it to DEAL_HOME and its default.
    """
    from infra.disk import disk_full
    from infra.logs import ready_log
    from infra.settings import HomeSettings, embedded_environment

    if home is not None:
        os.environ["DEAL_HOME"] = os.path.realpath(home.expanduser())
    folder = HomeSettings().home
    os.environ["DEAL_HOME"] = str(folder)
    log_file = folder / "logs" / "deal.log"
    logging_file = log_file.with_name("logging.yml")
    quoted = "'" + str(log_file).replace("'", "''").replace("$", "$$") + "'"
    try:
        ready_log(log_file)
        logging_file.write_text(LOGGING_YAML.format(filename=quoted), encoding="utf-8")
    except OSError as error:
        if full := disk_full(error):
            raise full from None
        reason = error.strerror
        raise ConfigError(f"The home folder {folder} cannot be used ({reason}); give one with --home.") from None
    servers = _servers(folder)
    known = {**servers, **os.environ}
    settings = embedded_environment(folder, known)
    for name, value in {**SETTINGS, "PREFECT_LOGGING_SETTINGS_PATH": str(logging_file), **servers, **settings}.items():
        os.environ.setdefault(name, value)
    logging.captureWarnings(True)
    logging.raiseExceptions = False  # a log that cannot be written, on a full disk, is no matter for the screen
    warnings.simplefilter("ignore")
    _log_failures_to(log_file)
    return folder


def _servers(home: Path) -> dict[str, str]:
    """Variables of the servers that `deal up` started in this home, if they run: commands then work beside them."""
    if not (home / "stack.json").exists():
        return {}
    from flows.server.stack import read_stack

    stack = read_stack(home)
    return stack.environment() if stack and stack.is_alive() else {}


def _log_failures_to(log_file: Path) -> None:
    """Commands that import no Prefect have no other handler, and Python's own would print to the screen."""
    from infra.logs import PlainFormatter

    handler = logging.FileHandler(log_file, delay=True)
    handler.setFormatter(PlainFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    FAILURES.handlers, FAILURES.propagate = [handler], False


def calm_libraries() -> None:
    """Send the warnings and bars of libraries to the log file; call it once they are imported."""
    for name in ("mlflow", "alembic", "transformers", "datasets", "huggingface_hub", "accelerate", "peft"):
        library = logging.getLogger(name)
        library.handlers.clear()
        library.propagate = True
    warnings.simplefilter("ignore")  # some of them have set their own filters meanwhile
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
