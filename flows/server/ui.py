"""Where MLflow shows the runs: a server that is there already, or MLflow's own, started on this machine."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import webbrowser

from pydantic import BaseModel, ConfigDict

from deal_core.masking import without_secrets
from infra.settings import TrackingSettings

START_SECONDS = 60


class UiAddress(BaseModel):
    """How to look at the runs."""

    model_config = ConfigDict(frozen=True)

    tracking_uri: str
    url: str
    command: tuple[str, ...]
    """Starts the server; empty where one runs already."""
    environment: dict[str, str] = {}
    """Variables that the command needs: as arguments everybody on the machine could read them."""

    def shown(self) -> UiAddress:
        """The same for other eyes: without passwords."""
        return UiAddress(
            tracking_uri=without_secrets(self.tracking_uri),
            url=without_secrets(self.url),
            command=self.command,
            environment={name: without_secrets(value) for name, value in self.environment.items()},
        )

    def line(self) -> str:
        """The command as one types it into a shell."""
        return " ".join([*(f"{name}={shlex.quote(value)}" for name, value in self.environment.items()),
                         shlex.join(self.command)])  # fmt: skip


def ui_address(port: int) -> UiAddress:
    """Where the runs are shown, and the command that starts what shows them."""
    settings = TrackingSettings()
    uri = settings.tracking_uri
    if uri.startswith(("http://", "https://")):
        return UiAddress(tracking_uri=uri, url=uri, command=())
    command = ("mlflow", "ui", "--host", "127.0.0.1", "--port", str(port), "--workers", "1")
    environment = {"MLFLOW_BACKEND_STORE_URI": uri, "MLFLOW_ARTIFACTS_DESTINATION": settings.artifact_uri}
    return UiAddress(tracking_uri=uri, url=f"http://127.0.0.1:{port}", command=command, environment=environment)


def open_ui(address: UiAddress) -> int:
    """Open the address in a browser, after starting the server if none runs; return the server's exit code."""
    if not address.command:
        webbrowser.open(address.url)
        return 0
    threading.Thread(target=_open_when_ready, args=(address.url,), daemon=True).start()
    try:
        environment = {**os.environ, **address.environment}
        return subprocess.run([sys.executable, "-m", *address.command], env=environment, check=False).returncode
    except KeyboardInterrupt:
        return 0


def _open_when_ready(url: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        try:
            urllib.request.urlopen(f"{url}/health", timeout=1).close()
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
        else:
            webbrowser.open(url)
            return
