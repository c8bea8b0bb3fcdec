"""The client of a vLLM server: what it reads, and what it says of servers that refuse or are none."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from typing import Any, ClassVar

import pytest

from deal_core.errors import ConfigError
from infra.serving import vllm as engine_module
from infra.serving.vllm import EngineAwayError, EngineClient, EngineError, Piece
from infra.settings import EngineSettings
from tests.loopback import Loopback

MODELS = {"data": [{"id": "base", "root": "/base", "parent": None}, {"id": "a", "root": "/a", "parent": "base"}]}
ASKED = {"model": "a", "prompt": [[1, 2]]}


def call(address: str, method: str, *args: Any, max_attempts: int = 1) -> Any:
    """Call a method of a client."""

    async def run() -> Any:
        async with EngineClient(address, EngineSettings(), max_attempts=max_attempts) as client:
            return await getattr(client, method)(*args)

    return asyncio.run(run())


def pieces_of(address: str) -> list[Any]:
    """What a stream of ASKED gives. The last one may be an error."""

    async def run() -> list[Any]:
        pieces: list[Any] = []
        async with EngineClient(address, EngineSettings()) as client:
            try:
                async for piece in client.stream(ASKED):
                    pieces.append(piece)  # noqa: PERF401  # those before an error count
            except EngineError as error:
                pieces.append(error)
        return pieces

    return asyncio.run(run())


class Handler(BaseHTTPRequestHandler):
    """Gives the next answer of a path, and its last one again and again."""

    answers: ClassVar[dict[str, list[tuple[int, str]]]] = {}
    asked: ClassVar[list[tuple[str, Any]]] = []

    def do_GET(self) -> None:
        size = int(self.headers.get("Content-Length", 0))
        self.asked.append((self.path, json.loads(self.rfile.read(size)) if size else None))
        left = self.answers[self.path]
        status, body = left.pop(0) if len(left) > 1 else left[0]
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    do_POST = do_GET


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(Handler, "answers", {"/v1/models": [(200, json.dumps(MODELS))]})
    monkeypatch.setattr(Handler, "asked", [])
    monkeypatch.setattr(engine_module, "FIRST_PAUSE_SECONDS", 0.001)
    with Loopback(Handler) as loopback:
        yield loopback.address


def refusal(message: str) -> str:
    return json.dumps({"error": {"message": message}})


def stream(*events: object) -> str:
    texts = [event if isinstance(event, str) else json.dumps(event) for event in (*events, "[DONE]")]
    return "".join(f"data: {text}\n\n" for text in texts)


def test_models_are_told_from_adapters_under_every_spelling_of_the_address(server: str) -> None:
    for address in (server, f"{server}/", f"{server}/v1"):
        assert call(address, "models") == {"base": ("/base", False), "a": ("/a", True)}


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (401, '{"error": "Unauthorized"}', "DEAL_ENGINE_API_KEY"),
        (404, '{"detail": "Not Found"}', "VLLM_ALLOW_RUNTIME_LORA_UPDATING"),
        (404, refusal("No adapter\n found"), "did not load /b: No adapter found$"),
        (400, '{"message": "at the top"}', "at the top"),
        (500, "<html>", "it answered 500"),
    ],
)
def test_a_refusal_is_said_with_its_reason(server: str, status: int, body: str, message: str) -> None:
    Handler.answers["/v1/load_lora_adapter"] = [(status, body)]
    with pytest.raises(EngineError, match=message) as caught:
        call(server, "load", "b", "/b")
    assert caught.value.status == status and not isinstance(caught.value, EngineAwayError)


def test_what_is_done_already_is_no_refusal(server: str) -> None:
    Handler.answers["/v1/load_lora_adapter"] = [(400, refusal("has already been loaded"))]
    call(server, "load", "a", "/a")
    with pytest.raises(EngineError, match="already been loaded"):
        call(server, "load", "a", "/another/path")
    Handler.answers["/v1/unload_lora_adapter"] = [(404, refusal("cannot be found"))]
    call(server, "unload", "b")
    with pytest.raises(EngineError, match="cannot be found"):
        call(server, "unload", "a")


@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_a_server_that_is_busy_or_away_is_told_apart_and_tried_again(server: str, status: int) -> None:
    Handler.answers["/v1/models"] = [(status, ""), (status, ""), (200, json.dumps(MODELS))]
    with pytest.raises(EngineAwayError) as caught:
        call(server, "models")
    assert caught.value.status == status
    assert call(server, "models", max_attempts=2)
    Handler.answers["/v1/completions"] = [(status, "")]
    assert [type(piece) for piece in pieces_of(server)] == [EngineAwayError]


def test_a_server_that_does_not_answer_has_no_status() -> None:
    with pytest.raises(EngineAwayError, match=r"http://\*\*\*@127\.0\.0\.1:9 does not answer") as caught:
        call("http://me:secret@127.0.0.1:9", "models")
    assert caught.value.status == 0
    with pytest.raises(ConfigError, match="DEAL_ENGINE_URL"):
        EngineClient("localhost", EngineSettings())


@pytest.mark.parametrize("content", ["<html>a page</html>", "[]", '{"data": [{}]}', '{"choices": [{}]}'])
def test_a_server_that_is_no_vllm_is_said(server: str, content: str) -> None:
    Handler.answers = {"/v1/models": [(200, content)], "/v1/completions": [(200, content)]}
    with pytest.raises(EngineError, match="lists no models as vLLM does"):
        call(server, "models")
    with pytest.raises(EngineError, match="gave no logprobs of a token as vLLM does"):
        call(server, "log_probs", "base", [([1], 2)])
    Handler.answers["/v1/completions"] = [(200, stream(content))]
    (error,) = pieces_of(server)
    assert isinstance(error, EngineError) and "gave no completion as vLLM does" in str(error)


def test_pieces_of_a_stream_are_read(server: str) -> None:
    logged = {
        "tokens": ["token_id:7"],
        "token_logprobs": [-0.5],
        "top_logprobs": [{"token_id:7": -0.5, "token_id:9": -2.0}],
    }
    piece = {"index": 1, "text": " a", "logprobs": logged, "finish_reason": None}
    last = {"index": 0, "text": "", "logprobs": None, "finish_reason": "stop"}
    usage = {"prompt_tokens": 2, "completion_tokens": 1}
    events = ({"choices": [piece, last]}, {"choices": [], "usage": usage})
    Handler.answers["/v1/completions"] = [(200, ": a comment\n\n" + stream(*events))]
    assert pieces_of(server) == [
        Piece(1, " a", [7], [-0.5], [{7: -0.5, 9: -2.0}], None),
        Piece(0, "", [], [], [], "stop"),
        usage,
    ]
    sent = Handler.asked[-1][1]
    assert sent["stream"] and sent["return_tokens_as_token_ids"] and sent["stream_options"] == {"include_usage": True}
    Handler.answers["/v1/completions"] = [(200, stream({"choices": [piece]}, {"error": {"message": "it broke"}}))]
    first, error = pieces_of(server)
    assert isinstance(first, Piece) and isinstance(error, EngineError) and "failed: it broke" in str(error)
    Handler.answers["/v1/completions"] = [(400, refusal("temperature must be"))]
    (error,) = pieces_of(server)
    assert "did not ask a: temperature must be" in str(error) and error.status == 400


def test_whole_answers_come_in_one_piece_each(server: str) -> None:
    logged = {"tokens": ["token_id:7", "token_id:8"], "token_logprobs": [-0.5, -1.0], "top_logprobs": [{}, {}]}
    choice = {"index": 0, "text": " a b", "logprobs": logged, "finish_reason": "stop"}
    usage = {"prompt_tokens": 2, "completion_tokens": 2}
    Handler.answers["/v1/completions"] = [(200, json.dumps({"choices": [choice], "usage": usage}))]
    assert call(server, "complete", ASKED) == [Piece(0, " a b", [7, 8], [-0.5, -1.0], [{}, {}], "stop"), usage]
    assert Handler.asked[-1][1] == {**ASKED, "return_tokens_as_token_ids": True}
    Handler.answers["/v1/completions"] = [(200, json.dumps({"choices": [{}]}))]
    with pytest.raises(EngineError, match="gave no completion as vLLM does"):
        call(server, "complete", ASKED)
    Handler.answers["/v1/completions"] = [(500, refusal("it broke"))]
    with pytest.raises(EngineError, match="did not ask a: it broke"):
        call(server, "complete", ASKED)


def test_the_probability_of_a_token_is_that_of_a_request_which_allows_no_other(server: str) -> None:
    """A request for the probabilities of a whole prompt ends some engines with all their users' answers."""
    logged = {"tokens": ["token_id:6"], "token_logprobs": [-2.5], "top_logprobs": [{"token_id:6": -2.5}]}
    choice = {"index": 0, "text": " b", "logprobs": logged, "finish_reason": "length"}
    Handler.answers["/v1/completions"] = [(200, json.dumps({"choices": [choice]}))]
    assert call(server, "log_probs", "base", [([4, 5], 6)]) == [-2.5]
    sent = Handler.asked[-1][1]
    assert (sent["prompt"], sent["allowed_token_ids"], sent["max_tokens"]) == ([4, 5], [6], 1)
    assert "prompt_logprobs" not in sent
    with pytest.raises(EngineError, match="gave no logprobs of a token"):
        call(server, "log_probs", "base", [([4, 5], 7)])
