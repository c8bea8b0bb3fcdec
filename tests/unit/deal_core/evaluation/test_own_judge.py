"""The documented metric that asks a language model scores as the model says."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from deal_core.evaluation.metrics import MODULES_VARIABLE, score_answers
from tests.loopback import Loopback

DOCS = Path(__file__).parents[4] / "docs"


@pytest.fixture
def questions(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What the server was asked. It says A to equal answers, B to a part, else C; of "odd" it says no letter."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert (self.path, body["model"]) == ("/v1/chat/completions", "j")
            question = body["messages"][-1]["content"]
            asked.append(question)
            answer, right = question.removeprefix("Answer:\n").split("\n\nRight answer:\n")
            verdict = (
                "I cannot say." if answer == "odd" else "A\n" if answer == right else "B" if answer in right else "C"
            )
            reply = json.dumps({"choices": [{"message": {"role": "assistant", "content": verdict}}]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply)

    monkeypatch.syspath_prepend(DOCS)
    monkeypatch.delitem(sys.modules, "own_judge", raising=False)
    monkeypatch.setenv(MODULES_VARIABLE, "own_judge")
    with Loopback(Handler) as server:
        monkeypatch.setenv("JUDGE_URL", f"{server.address}/v1")
        monkeypatch.setenv("JUDGE_MODEL", "j")
        yield asked
    sys.modules.pop("own_judge", None)


def test_the_documented_judge_is_a_metric(questions: list[str]) -> None:
    scores = score_answers("own_judge:agrees", ["a b", "a", "x", "a b"], ["a b", "a b", "a b", "a b"])
    assert scores == (1.0, 0.5, 0.0, 1.0)
    assert len(questions) == 3, "an equal pair is asked about once"
