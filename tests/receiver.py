"""An HTTP server of the test's own that keeps what it is told."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler
from typing import Any

from tests.loopback import Loopback


class Receiver(Loopback):
    """Takes POSTs on loopback; `answers` are its next status codes, after which it says 200."""

    def __init__(self) -> None:
        self.answers: list[int] = []
        self.requests: list[tuple[dict[str, str], bytes]] = []
        self.came = threading.Condition()
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                with receiver.came:
                    receiver.requests.append((dict(self.headers), body))
                    status = receiver.answers.pop(0) if receiver.answers else 200
                    receiver.came.notify_all()
                self.send_response(status)
                if 300 <= status < 400:
                    self.send_header("Location", receiver.url)
                self.send_header("Content-Length", "0")
                self.end_headers()

        super().__init__(Handler)
        self.url = f"{self.address}/"

    def told(self) -> list[dict[str, Any]]:
        """What the requests say, as JSON."""
        return [json.loads(body) for _, body in self.requests]

    def wait_for(self, number: int, seconds: float = 60) -> list[tuple[dict[str, str], bytes]]:
        """The requests, once so many have come."""
        with self.came:
            assert self.came.wait_for(lambda: len(self.requests) >= number, seconds), "nothing came"
            return list(self.requests)
