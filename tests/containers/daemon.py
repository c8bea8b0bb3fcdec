"""A Docker for the test of the containers: one that answers, or one that is started here, with images made here.

The images of compose.yaml that others publish are not pulled: stand-ins are built under their names from the folders
here. Images and the layers of builds stay in CACHE, so that the next run takes them.
"""

from __future__ import annotations

import operator
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import platformdirs
import pytest
import tenacity

HERE = Path(__file__).parent
CACHE = platformdirs.user_cache_path("deal-container-test")
"""The folder of a daemon that is started here; it may be deleted while no test runs."""
BASE = "python:3.11.17-slim-trixie"
STAND_INS = {
    "postgres": "postgres:17.11-trixie",
    "prefect": "prefecthq/prefect:3.9.1-python3.11",
    "rustfs": "rustfs/rustfs:1.0.1",
}
ENGINE = {"vllm": "vllm/vllm-openai:v0.32.0"}
PACKAGES = "apt-get install docker.io docker-cli docker-compose docker-buildx iptables debootstrap"


def run(*command: str, **options: object) -> str:
    """Run a command; return its output."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, f"{' '.join(command)}: {done.stdout[-4000:]}{done.stderr[-4000:]}"
    return str(done.stdout)


def answers() -> bool:
    """Whether a Docker answers, at DOCKER_HOST or its usual socket."""
    return subprocess.run(["docker", "info"], capture_output=True, check=False).returncode == 0


@contextmanager
def docker(*, with_engine: bool) -> Iterator[None]:
    """A Docker with all images. DOCKER_HOST names it meanwhile. The test is skipped where there can be none."""
    images = {**STAND_INS, **(ENGINE if with_engine else {})}
    if any(shutil.which(program) is None for program in ("docker", "debootstrap")) or sys.version_info[:2] != (3, 11):
        pytest.skip(f"needs Docker on Debian, and Python 3.11 ({PACKAGES})")
    if subprocess.run(["docker", "compose", "version"], capture_output=True, check=False).returncode:
        pytest.skip(f"needs Docker Compose ({PACKAGES})")
    if answers():
        if run("docker", "ps", "--all", "--quiet", "--filter", "label=com.docker.compose.project=deal"):
            pytest.skip("a stack of the project `deal` runs in this Docker")
        make_images(images, is_ours=False)
        yield
        return
    if os.geteuid() != 0 or shutil.which("dockerd") is None:
        pytest.skip(f"no Docker answers, and only root may start one here ({PACKAGES})")
    CACHE.mkdir(parents=True, exist_ok=True)
    address, log = f"unix://{CACHE}/docker.sock", CACHE / "dockerd.log"
    folders = ("--data-root", str(CACHE / "data"), "--exec-root", str(CACHE / "run"))
    with log.open("w") as output, pytest.MonkeyPatch.context() as patch:
        daemon = subprocess.Popen(
            ["dockerd", *folders, "--pidfile", str(CACHE / "dockerd.pid"), "--host", address],
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        patch.setenv("DOCKER_HOST", address)
        try:
            tenacity.Retrying(
                retry=tenacity.retry_if_result(operator.not_),
                stop=tenacity.stop_after_delay(120),
                wait=tenacity.wait_fixed(0.5),
                retry_error_callback=lambda _: False,
            )(lambda: daemon.poll() is not None or answers())
            if not answers():
                lines = log.read_text().splitlines() or ["no reason"]
                pytest.skip(f"Docker does not start here: {lines[-1]}")
            make_images(images, is_ours=True)
            yield
        finally:
            daemon.terminate()
            daemon.wait()


def has_image(name: str) -> bool:
    """Whether Docker has the image."""
    return subprocess.run(["docker", "image", "inspect", name], capture_output=True, check=False).returncode == 0


def make_images(images: Mapping[str, str], *, is_ours: bool) -> None:
    """Make the base image and the stand-ins. In another one's Docker images that are there stay as they are."""
    if not has_image(BASE):
        run("bash", str(HERE / "base.sh"), str(CACHE / "rootfs"), sys.executable)
    for folder, name in images.items():
        if is_ours or not has_image(name):
            run("docker", "build", "--tag", name, str(HERE / folder))
