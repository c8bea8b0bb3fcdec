"""MLflow's own model server for one version, as a process that is ready in seconds and ends with its starter.

`mlflow models serve` would do the same, but it imports MLflow twice and torch anew each time, which takes longer than a
rollback may. Here a helper process (multiprocessing's fork server) imports everything once and holds no model; each
server is forked from it, and has but to load its version.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import sys
import threading
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import httpx

from deal_core.errors import DealError
from infra.logs import ready_log

PRELOADED = ["infra.served_model", "mlflow.pyfunc.scoring_server", "fastapi", "uvicorn"]
ANSWER_SECONDS = 300.0
"""A request that takes longer is given up by MLflow's server."""
STOP_SECONDS = 10.0
LOOPBACK = "127.0.0.1"


class ServerError(DealError):
    """A model server did not come up."""


class ModelServer:
    """One version's server: started at once, asked for by `is_ready`, ended by `stop`."""

    def __init__(self, version: str, folder: Path, log: Path, environment: Mapping[str, str]) -> None:
        self.version = version
        self.log = log
        self.num_in_flight = 0
        self.url: str | None = None
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self._news, theirs = context.Pipe(duplex=False)
        self._process = context.Process(
            target=_serve, args=(folder, log, dict(environment), theirs), name=f"deal-version-{version}", daemon=True
        )
        self._process.start()
        theirs.close()

    @property
    def pid(self) -> int | None:
        """The process's number."""
        return self._process.pid

    def is_alive(self) -> bool:
        """Whether the process still runs."""
        return self._process.is_alive()

    async def is_ready(self, client: httpx.AsyncClient) -> bool:
        """Whether the version is loaded and the server's health check is answered.

        Raises:
            ServerError: the version could not be loaded, or the process ended.
        """
        is_alive = self.is_alive()  # before the news: what it says last is read even if it ends now
        if self.url is None:
            self._listen()
        if self.url is None:
            if not is_alive:
                raise ServerError(f"The server of version {self.version} ended before it answered; see {self.log}.")
            return False
        try:
            return (await client.get(f"{self.url}/ping", timeout=5)).is_success
        except httpx.HTTPError:
            return False

    def stop(self) -> None:
        """End the process; what it is answering is finished first. Takes seconds: call it in a thread."""
        self._process.terminate()
        self._process.join(STOP_SECONDS)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._news.close()

    def _listen(self) -> None:
        try:
            if not self._news.poll():
                return
            said = json.loads(self._news.recv_bytes())
        except (EOFError, OSError):
            return
        if "problem" in said:
            raise ServerError(said["problem"])
        self.url = f"http://{LOOPBACK}:{said['port']}"


def _serve(folder: Path, log: Path, environment: Mapping[str, str], news: Connection) -> None:
    """The process: load the version and serve it with MLflow's scoring server until SIGTERM."""
    os.setsid()  # Ctrl-C in a terminal is for the front door, which ends its servers in order
    _write_to(log)
    os.environ.update(environment)
    os.environ["MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT"] = str(int(ANSWER_SECONDS))
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        import uvicorn
        from mlflow.pyfunc import scoring_server

        app = scoring_server.init(_load(folder))
        listener = socket.create_server((LOOPBACK, 0))
    except BaseException as error:
        kind = "" if isinstance(error, DealError) else f"{type(error).__name__}: "
        news.send_bytes(json.dumps({"problem": kind + " ".join(str(error).split())}).encode())
        raise
    news.send_bytes(json.dumps({"port": listener.getsockname()[1]}).encode())
    uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_keep_alive=600)).run(sockets=[listener])


def _load(folder: Path) -> Any:
    """The version that lies in a folder, loaded by this project's code alone.

    MLflow would import whichever module the folder's MLmodel names, and code that lies beside it; whoever may register
    models would run what they like.

    Raises:
        ServerError: the MLmodel names another loader, or code.
    """
    from mlflow.models import Model
    from mlflow.pyfunc import FLAVOR_NAME, load_model

    from infra.served_folder import LOADER

    flavor = Model.load(str(folder)).flavors.get(FLAVOR_NAME, {})
    loader, code = flavor.get("loader_module"), flavor.get("code")
    if loader != LOADER or code is not None:
        found = f"the loader {loader}" if loader != LOADER else f"code of its own ({code})"
        raise ServerError(
            f"its MLmodel names {found}, and nothing but {LOADER} is run here; this pipeline registers no such "
            "version. Promote another one."
        )
    return load_model(str(folder))


def _write_to(log: Path) -> None:
    with ready_log(log).open("ab") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())


def _end_with_parent() -> None:
    """Wait for whoever started this process; a front door that was killed leaves no server behind."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)
