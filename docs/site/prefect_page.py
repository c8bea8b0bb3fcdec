"""Take the picture of an adaptation's run on Prefect's page, docs/img/prefect.png.

    apt-get install chromium
    python -m docs.site.prefect_page

A server of its own is started in an empty home, with a tiny base model. A file lands, and its run is opened.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import yaml
from playwright.sync_api import sync_playwright

from benchmarks.output import DEAL
from benchmarks.tiny_base import EXAMPLES, NO_LIMITS, build_tiny_base

PICTURE = Path(__file__).parents[1] / "img" / "prefect.png"
WAIT_SECONDS = 600.0
TRAIN = {"max_steps": 40, "max_prompt_tokens": 192, "checkpoint_steps": 0}


def free_ports(number: int) -> list[str]:
    """Return so many ports that nobody listens on."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for free in sockets:
            free.bind(("127.0.0.1", 0))
        return [str(free.getsockname()[1]) for free in sockets]


def finished_run(api: str) -> str:
    """Return the id of the flow run that has adapted, once it has ended."""
    deadline = time.monotonic() + WAIT_SECONDS
    wanted = {"flows": {"name": {"any_": ["adapt"]}}, "flow_runs": {"state": {"type": {"any_": ["COMPLETED"]}}}}
    while time.monotonic() < deadline:
        runs: list[dict[str, Any]] = httpx.post(f"{api}/flow_runs/filter", json=wanted, timeout=60).json()
        if runs:
            return str(runs[0]["id"])
        time.sleep(2)
    raise TimeoutError(f"No adaptation ended within {WAIT_SECONDS:.0f} s")


def take_picture(url: str, run: str) -> None:
    """Open the page of a run, and store what a browser shows."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 1000})
        page.goto(f"{url}/runs/flow-run/{run}")
        page.get_by_text("Completed").first.wait_for()
        page.wait_for_timeout(8000)  # the graph is drawn bit by bit
        page.screenshot(path=PICTURE)
        browser.close()


def main() -> None:
    """Start the server, land a file, and take the picture."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        home = Path(folder) / "home"
        environment = {**os.environ, "DEAL_HOME": str(home), "OMP_NUM_THREADS": "1"}
        environment.pop("PREFECT_API_URL", None)

        def deal(*arguments: str) -> None:
            subprocess.run([*DEAL, *arguments], env=environment, check=True, capture_output=True)

        build_tiny_base(Path(folder) / "base")
        values = {"lineage": "support", "base_model": str(Path(folder) / "base"), "gate": NO_LIMITS, "train": TRAIN}
        (Path(folder) / "support.yaml").write_text(yaml.safe_dump(values))
        stack.callback(deal, "server", "down")
        ports = free_ports(2)
        deal("server", "up", "--prefect-port", ports[0], "--mlflow-port", ports[1])
        deal("lineage", "apply", str(Path(folder) / "support.yaml"))
        inbox = home / "inbox" / "bank"
        inbox.mkdir(parents=True)
        shutil.copy(EXAMPLES / "bank" / "train.jsonl", inbox / "june.jsonl")
        url = f"http://127.0.0.1:{ports[0]}"
        take_picture(url, finished_run(f"{url}/api"))


if __name__ == "__main__":
    main()
