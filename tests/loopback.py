"""A free port of the loopback address, and an HTTP server there for as long as a test needs it."""

from __future__ import annotations

import secrets
import socket
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self

SECONDS_TO_STOP = 0.01
PORTS = range(20_000, 32_000)
"""Below those that the kernel gives to connections, which may take a free port before its server does."""


def free_port() -> int:
    """A port that nothing listens on."""
    while True:
        port = secrets.choice(PORTS)
        with socket.socket() as free, suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port


class Loopback:
    """Serves a handler on a free port, one thread per request; `address` has no slash at its end. It logs nothing."""

    def __init__(self, handler: type[BaseHTTPRequestHandler]) -> None:
        quiet = type("Quiet", (handler,), {"log_message": lambda *_: None})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), quiet)
        self.address = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(SECONDS_TO_STOP,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()
