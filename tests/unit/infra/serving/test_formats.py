"""OpenAI's own client asks the server: chats, completions, streams, and requests that are refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import openai
import pytest

from tests.served import Champion, running

KEY = "a-token"


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """One server for all tests: none of them changes it."""
    with running(Champion(), tmp_path_factory.mktemp("log") / "log", api_key=KEY) as port:
        yield port


@pytest.fixture(scope="module")
def client(port: int) -> openai.OpenAI:
    return client_of(port)


def client_of(port: int) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=KEY, max_retries=0)


USER = {"role": "user", "content": "a text"}


@pytest.mark.parametrize("model", ["l", "l@3", "l/bank", "l@3/bank"])
def test_a_chat_asks_a_task_of_texts_by_its_user_message(client: openai.OpenAI, model: str) -> None:
    answer = client.chat.completions.create(model=model, messages=[USER], temperature=0)  # type: ignore[list-item]
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("A TEXT", "stop")
    assert answer.model == "l@3"


def test_a_task_of_chats_takes_every_message(client: openai.OpenAI) -> None:
    parts = [{"type": "text", "text": "more"}, {"type": "text", "text": "text"}]
    messages = [
        {"role": "system", "content": "s"},
        USER,
        {"role": "assistant", "content": "ok"},
        {"role": "user", "content": parts},
    ]
    answer = client.chat.completions.create(model="l/talk", messages=messages)  # type: ignore[call-overload]
    asked = json.loads(answer.choices[0].message.content.lower())
    assert [message["content"] for message in asked] == ["s", "a text", "ok", "more\ntext"]


def test_a_chat_with_tools_keeps_what_its_task_is_stored_with(client: openai.OpenAI) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "find", "arguments": '{"x": 1}'}}
    asked = [
        {**USER, "name": "jo"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "found", "tool_call_id": "c1", "name": "find"},
        {"role": "assistant", "content": "ok", "tool_calls": None},
        USER,
    ]
    answer = client.chat.completions.create(model="l/talk", messages=asked)  # type: ignore[arg-type]
    assert json.loads(answer.choices[0].message.content.lower()) == [  # type: ignore[union-attr]
        USER,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        asked[2],
        {"role": "assistant", "content": "ok"},
        USER,
    ]


@pytest.mark.parametrize(
    ("message", "sentence"),
    [
        ({"content": "a text"}, "role is no text"),
        ({"role": None, "content": "a text"}, "role is no text"),
        ({"role": "assistant", "content": None}, "content is no text"),
        ({"role": "assistant", "content": None, "tool_calls": []}, "content is no text"),
        ({"role": "assistant", "content": None, "tool_calls": "find"}, "tool_calls is no list"),
        ({"role": "assistant", "content": None, "tool_calls": [{"function": "find"}]}, "tool_calls is no list"),
        ({"role": "assistant", "content": None, "tool_calls": [{"function": {"name": 3}}]}, "tool_calls is no list"),
    ],
)
def test_a_message_of_another_form_is_refused(client: openai.OpenAI, message: dict[str, object], sentence: str) -> None:
    with pytest.raises(openai.BadRequestError, match=sentence):
        client.chat.completions.create(model="l/talk", messages=[message, USER])  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "/v1/embeddings", 404),
        ("GET", "/v1", 404),
        ("GET", "/v1/completions", 405),
        ("POST", "/v1/models", 405),
    ],
)
def test_what_is_not_below_v1_is_refused_in_openais_form(port: int, method: str, path: str, status: int) -> None:
    found = httpx.request(method, f"http://127.0.0.1:{port}{path}")
    assert found.status_code == status
    assert found.json()["error"].keys() == {"message", "type", "param", "code"} and path in found.text


def test_completions_of_several_prompts_keep_their_order(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="l", prompt=["one", "two"])
    assert [(choice.index, choice.text) for choice in answer.choices] == [(0, "ONE"), (1, "TWO")]


def test_a_stream_ends_as_its_client_expects(client: openai.OpenAI) -> None:
    pieces = list(client.chat.completions.create(model="l", messages=[USER], stream=True))  # type: ignore[list-item]
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == "A TEXT"
    assert pieces[-1].choices[0].finish_reason == "stop"
    assert [piece.choices[0].text for piece in client.completions.create(model="l", prompt="x", stream=True)] == ["X"]


def test_an_answer_that_was_cut_says_so(client: openai.OpenAI) -> None:
    found = client.completions.create(model="l", prompt=["one", "long"])
    assert [choice.finish_reason for choice in found.choices] == ["stop", "length"]
    message = {"role": "user", "content": "long"}
    chat = client.chat.completions.create(model="l", messages=[message])  # type: ignore[list-item]
    assert chat.choices[0].finish_reason == "length"
    stream = client.chat.completions.create(model="l", messages=[message], stream=True)  # type: ignore[list-item]
    assert [piece.choices[0].finish_reason for piece in stream] == [None, "length"]


def test_an_answer_that_is_no_label_of_its_task_has_a_problem(port: int) -> None:
    head = {"Authorization": f"Bearer {KEY}"}

    def ask(path: str, **body: object) -> dict[str, Any]:
        found = httpx.post(f"http://127.0.0.1:{port}{path}", json=body, headers=head)
        assert found.status_code == 200
        return dict(found.json())

    one, two = ask("/v1/completions", model="l", prompt=["a", "other"])["choices"]
    assert "problem" not in one and two["problem"] == "the answer is no label of bank"
    chat = ask("/v1/chat/completions", model="l/talk", messages=[USER])["choices"][0]
    assert "problem" not in chat, "the task has no labels"
    rows = [{"input": "a"}, {"input": "other"}]
    found = ask("/invocations", dataframe_records=rows)["predictions"]
    assert [row["problem"] for row in found] == [None, "the answer is no label of bank"]
    assert all("problem" not in row for row in ask("/invocations", dataframe_records=rows[:1])["predictions"])


def test_models_are_the_champion_its_version_and_its_tasks(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["l", "l@3", "l/bank", "l/talk"]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("other", "model is 'other'; l is served here"),
        ("l@2", "Version 2 does not answer here; version 3 does"),
        ("l/nope", "the version that answers knows bank, talk"),
    ],
)
def test_a_model_that_is_not_served_is_not_found(client: openai.OpenAI, model: str, message: str) -> None:
    with pytest.raises(openai.NotFoundError, match=message):
        client.chat.completions.create(model=model, messages=[USER])  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"n": 2}, "the server gives one answer"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "the server has no tools"),
        ({"messages": [{"role": "system", "content": "Be brief."}, USER]}, "send one message of the role user"),
        ({"messages": []}, "no list of messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "is no text"),
    ],
)
def test_what_the_server_does_not_have_is_refused(client: openai.OpenAI, more: dict[str, object], message: str) -> None:
    with pytest.raises(openai.BadRequestError, match=message):
        client.chat.completions.create(**{"model": "l", "messages": [USER], **more})  # type: ignore[call-overload]


def test_completions_of_a_task_of_chats_are_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="takes chats"):
        client.completions.create(model="l/talk", prompt="x")


@pytest.mark.parametrize("path", ["/invocations", "/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {KEY}"}])
def test_without_the_token_nothing_is_answered(port: int, path: str, headers: dict[str, str]) -> None:
    answer = httpx.post(f"http://127.0.0.1:{port}{path}", json={"model": "l"}, headers=headers)
    assert answer.status_code == 401 and "Authorization: Bearer" in answer.text and KEY not in answer.text
    assert httpx.get(f"http://127.0.0.1:{port}/v1/models", headers=headers).status_code == 401
    assert httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200


def test_prometheus_counts_requests_by_status_and_version(tmp_path: Path) -> None:
    with running(Champion(), tmp_path / "log", api_key=KEY) as port:
        client = client_of(port)
        client.completions.create(model="l", prompt="x")
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model="other", prompt="x")
        page = httpx.get(f"http://127.0.0.1:{port}/metrics").text
    assert 'deal_requests_total{path="/v1/completions",status="200",version="3"} 1.0' in page
    assert 'deal_requests_total{path="/v1/completions",status="404",version=""} 1.0' in page
    assert 'deal_request_seconds_count{path="/v1/completions"} 2.0' in page and "deal_requests_in_flight 0.0" in page


def test_answers_and_requests_are_as_the_openapi_page_says(port: int, client: openai.OpenAI) -> None:
    page = httpx.get(f"http://127.0.0.1:{port}/openapi.json").json()

    def check(name: str, body: object) -> None:
        schema = {"$ref": f"#/components/schemas/{name}", "components": page["components"]}
        jsonschema.Draft202012Validator(schema).validate(body)

    head = {"Authorization": f"Bearer {KEY}"}
    for path, body in (
        ("/v1/chat/completions", {"model": "l", "messages": [USER]}),
        ("/v1/completions", {"model": "l", "prompt": ["one", "two"], "max_tokens": 3}),
    ):
        of_path = page["paths"][path]["post"]
        asked, answered = (
            part["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
            for part in (of_path["requestBody"], of_path["responses"]["200"])
        )
        check(asked, body)
        check(answered, httpx.post(f"http://127.0.0.1:{port}{path}", json=body, headers=head).json())
        with pytest.raises(jsonschema.ValidationError):
            check(asked, {**body, "n": "2"})
    check("ModelList", client.models.list().model_dump(mode="json"))
