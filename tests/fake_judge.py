"""A judge on loopback that speaks OpenAI's chat completions; a rule of the test decides."""

from __future__ import annotations

import contextlib
import json
import re
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler

from tests.loopback import Loopback

_ANSWERS = re.compile(r"\nAnswer A:\n(.*)\n\nAnswer B:\n(.*)\n\nWhich answer is better\?", re.DOTALL)


class FakeJudge(Loopback):
    """`decide` gets both answers and says the reply; `status` other than 200 is a failure, `pause` comes before."""

    def __init__(self, decide: Callable[[str, str], str] = lambda first, second: "C") -> None:
        self.decide, self.status, self.pause = decide, 200, 0.0
        self.questions: list[str] = []
        self.tokens: set[str | None] = set()
        judge, lock = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                question = body["messages"][-1]["content"]
                with lock:
                    judge.questions.append(question)
                    judge.tokens.add(self.headers["Authorization"])
                time.sleep(judge.pause)
                found = _ANSWERS.search(question)
                known = self.path == "/v1/chat/completions" and body["model"] == "j" and found is not None
                said = judge.decide(*found.groups()) if known and found else ""
                message = {"role": "assistant", "content": said}
                choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
                reply = json.dumps({"object": "chat.completion", "choices": choices}).encode()
                self.send_response(judge.status if known else 404)
                self.send_header("Content-Length", str(len(reply)))
                self.end_headers()
                with contextlib.suppress(OSError):  # the client may have given up
                    self.wfile.write(reply)

        super().__init__(Handler)
        self.url = f"{self.address}/v1"
