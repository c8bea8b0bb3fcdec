"""An HTTP server on loopback for as long as a test needs it."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self

SECONDS_TO_STOP = 0.01


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
