"""A real vLLM server on this machine's CPU, from the environment that `make engine` makes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx

PROGRAM = Path(os.environ.get("ENGINE", Path(__file__).parents[2] / ".venv-engine")).absolute() / "bin" / "vllm"
WAIT_SECONDS = 600.0
MAX_RANK = 16
SETTINGS = {
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


@dataclass
class RealEngine:
    """A server that can be killed and started again at the same address."""

    base: Path
    folder: Path
    """Where it runs and writes its log."""
    port: int
    dtype: str = "float32"
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.port}"

    def environment(self) -> dict[str, str]:
        """This process's environment, with the address for `deal serve`."""
        return {**os.environ, "DEAL_ENGINE_URL": self.url}

    def start(self) -> None:
        """Start it, and wait until it answers."""
        command = [PROGRAM, "serve", self.base, "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--enable-lora", "--max-lora-rank", str(MAX_RANK), "--max-loras", "2", "--max-cpu-loras", "4"]
        command += ["--generation-config", "vllm", "--max-model-len", "512", "--enforce-eager", "--dtype", self.dtype]
        with (self.folder / "engine.log").open("ab") as log:
            self.process = subprocess.Popen(
                [str(part) for part in command],
                cwd=self.folder,  # it starts Python in its directory, which must have no modules
                env={**os.environ, **SETTINGS},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + WAIT_SECONDS
        while True:
            assert self.process.poll() is None, (self.folder / "engine.log").read_text()[-3000:]
            try:
                if httpx.get(f"{self.url}/health", timeout=5).is_success:
                    return
            except httpx.TransportError:
                pass
            assert time.monotonic() < deadline, (self.folder / "engine.log").read_text()[-3000:]
            time.sleep(0.5)

    def kill(self) -> None:
        """Kill it with all its processes."""
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(60)
            self.process = None

    def adapters(self) -> set[str]:
        """The names of the adapters that it has loaded."""
        models = httpx.get(f"{self.url}/v1/models", timeout=60).json()["data"]
        return {model["id"] for model in models if model["parent"] is not None}


@contextmanager
def running_engine(base: Path, folder: Path, dtype: str = "float32") -> Iterator[RealEngine]:
    """A server of a base model; its log is in the folder, which must be empty."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        engine = RealEngine(base, folder, int(free.getsockname()[1]), dtype)
    try:
        engine.start()
        yield engine
    finally:
        engine.kill()
