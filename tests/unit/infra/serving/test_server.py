"""The answers and refusals of the server, also to clients that are slow, gone or hostile."""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from deal_core.errors import ConfigError
from infra.serving import run, server
from infra.serving.run import API_KEY, _api_key
from infra.store.local import FileStore
from tests.served import WAIT_SECONDS, Champion, running
from tests.waiting import wait_for

JSON = {"Content-Type": "application/json"}
ROW = {"dataframe_records": [{"input": "a text", "task": "bank"}]}


@pytest.fixture
def champion() -> Iterator[Champion]:
    champion = Champion()
    yield champion
    champion.may_answer.set()


@pytest.fixture
def port(champion: Champion, tmp_path: Path) -> Iterator[int]:
    with running(champion, tmp_path / "log") as port:
        yield port


def post(port: int, content: bytes | str, headers: dict[str, str] | None = None) -> httpx.Response:
    headers = JSON if headers is None else headers
    return httpx.post(f"http://127.0.0.1:{port}/invocations", content=content, headers=headers, timeout=60)


def ask(port: int, body: Any) -> httpx.Response:
    return post(port, json.dumps(body))


def read_until_closed(connection: socket.socket) -> bytes:
    connection.settimeout(WAIT_SECONDS)
    found = b""
    with connection:
        while part := connection.recv(65536):
            found += part
    return found


def test_rows_are_answered_in_each_of_mlflows_forms(port: int) -> None:
    for body in (
        ROW,
        {"dataframe_split": {"columns": ["input", "task"], "data": [["a text", "bank"]]}},
        {"instances": [{"input": "a text", "task": "bank"}]},
        {"inputs": {"input": ["a text"], "task": ["bank"]}},
        {**ROW, "params": {}},
    ):
        found = ask(port, body)
        assert found.status_code == 200, found.text
        row = {"output": "A TEXT", "task": "bank", "version": "3", "lineage": "l"}
        assert found.json() == {"predictions": [{**row, "problem": "the answer is no label of bank"}]}
        assert (found.headers["X-Deal-Version"], found.headers["X-Deal-Lineage"]) == ("3", "l")


def test_health_and_version(port: int) -> None:
    serving, state = {"status": "serving"}, {"lineage": "l", "version": "3", "champion": "3", "problem": None}
    for path, wanted in (("health", serving), ("ping", serving), ("version", state)):
        assert httpx.get(f"http://127.0.0.1:{port}/{path}").json() == wanted


NO_ROWS: list[tuple[bytes, str]] = [
    *(
        (b'{"dataframe_records": ' + b"[" * depth + b"]" * depth + b"}", sentence)
        for depth, sentence in ((200, ""), (900, ""), (100_000, "nested too deeply"), (2_000_000, "nested too deeply"))
    ),
    (b"", "no JSON"),
    (b"{", "no JSON"),
    (b"\xff\xfe\xfa", "no JSON"),
    (b"[]", "no JSON object"),
    (b"3", "no JSON object"),
    (b"{}", "input fields"),
    (b'{"dataframe_records": [' + b"9" * 5000 + b"]}", "no JSON"),
    (b'{"dataframe_records": [{"input": "\\ud800"}]}', "surrogate"),
    (b'{"dataframe_records": [{"input": null}]}', "Row 1 has no text as its input"),
    (b'{"dataframe_records": [{"input": ["a secret"]}]}', ""),
    (b'{"dataframe_records": [{"text": "a secret"}]}', "Model is missing inputs ['input']"),
    (b'{"dataframe_records": [{"input": "a secret", "task": "nope"}]}', "Row 1 names the task 'nope'"),
    (b'{"dataframe_records": [{"input": "a secret", "task": 5}]}', "Row 1 names the task 5, which is no text"),
    (b'{"dataframe_records": [{"input": "a secret", "task": ["bank"]}]}', "Row 1 names the task ['bank'], which"),
    (
        b'{"dataframe_records": [{"input": "a", "task": "bank"}, {"input": "a secret", "task": true}]}',
        "Row 2 names the task True, which is no text",
    ),
    (b'{"dataframe_records": [{"input": "a secret"}], "task": "talk"}', "task stands beside the rows"),
    (b'{"dataframe_records": [1, "a secret"]}', ""),
    (b'{"dataframe_records": {"a secret": 1}}', ""),
    (b'{"dataframe_split": {"data": "a secret"}}', ""),
    (b'{"inputs": "a secret"}', ""),
    (b'{"instances": {"a secret": [[1], 2]}}', ""),
    (b'{"messages": [{"role": "user", "content": "a secret"}]}', ""),
]


def test_what_is_no_table_of_rows_costs_one_sentence(port: int, tmp_path: Path) -> None:
    for body, sentence in NO_ROWS:
        found = post(port, body)
        assert found.status_code == 400, (body[:100], found.text)
        assert sentence in found.json()["error"] and "\n" not in found.json()["error"]
        assert "a secret" not in found.text
    assert not (tmp_path / "log").exists()


def test_a_model_that_breaks_says_so_once_and_the_next_request_is_answered(port: int, tmp_path: Path) -> None:
    found = ask(port, {"dataframe_records": [{"input": "poison"}]})
    assert found.status_code == 500 and "log" in found.json()["error"]
    assert (tmp_path / "log").read_text().count("RuntimeError: the model broke") == 1
    assert ask(port, ROW).is_success


def test_a_body_that_is_not_called_json_is_refused(port: int) -> None:
    kinds = ("text/plain", "application/x-www-form-urlencoded", "text/csv", "application/json; charset=latin-1")
    for headers in ({}, *({"Content-Type": kind} for kind in kinds)):
        found = post(port, json.dumps(ROW), headers)
        assert found.status_code == 415 and "Content-Type: application/json" in found.json()["error"], headers
    assert post(port, json.dumps(ROW), {"Content-Type": "application/json; charset=UTF-8"}).is_success


def test_a_page_under_another_name_cannot_ask(champion: Champion, tmp_path: Path) -> None:
    with running(champion, tmp_path / "log", "model.example") as port:
        for host in (f"evil.example:{port}", "evil.example", "127.0.0.1.evil.example", ""):
            for path in ("invocations", "version", "health"):
                found = httpx.post(f"http://127.0.0.1:{port}/{path}", json=ROW, headers={"Host": host})
                assert found.status_code == 400 and "A TEXT" not in found.text
        for host in (f"localhost:{port}", f"127.0.0.1:{port}", f"[::1]:{port}", "model.example", "LOCALHOST"):
            assert post(port, json.dumps(ROW), {**JSON, "Host": host}).is_success, host


def test_prometheus_reads_metrics_by_any_address(champion: Champion, tmp_path: Path) -> None:
    foreign = {"Host": "10.0.0.7:5001"}
    with running(champion, tmp_path / "log") as port:
        assert "deal_serving{" in httpx.get(f"http://127.0.0.1:{port}/metrics", headers=foreign).text
        for path in ("version", "health", "v1/models", "metrics/"):
            assert httpx.get(f"http://127.0.0.1:{port}/{path}", headers=foreign).status_code == 400, path


def test_names_are_trusted_that_the_server_was_told() -> None:
    assert run._trusted("127.0.0.1", ["a.example"])[-2:] == ["127.0.0.1", "a.example"]
    assert "[fe80::1]" in run._trusted("fe80::1", [])
    assert set(run._trusted("0.0.0.0", [])) == set(server.LOOPBACK_NAMES)


@pytest.mark.parametrize(
    "name",
    [
        "*internal",
        "10.0.0.*",
        "a.*.example",
        "**",
        "model.example:443",
        "[::1]:5001",
        "http://model.example",
        "a/b",
        "a.example,b.example",
        "",
    ],
)
def test_a_trusted_host_that_can_match_no_request_is_refused_before_the_server_listens(
    name: str, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ConfigError, match="The trusted host is"):
        run.serve(
            FileStore(tmp_path / "store"),
            "l",
            tmp_path,
            host="127.0.0.1",
            port=taken.getsockname()[1],
            trusted_hosts=["a.example", name],
            say=lambda text: None,
            ready=lambda url, version: None,
        )


def test_no_part_of_an_answer_waits_for_the_client_to_acknowledge_the_part_before() -> None:
    with run.listen("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        connection, _ = listener.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_names_below_a_name_and_ipv6_addresses_can_be_trusted(champion: Champion, tmp_path: Path) -> None:
    told = ["*.example", "fe80::1", "[fe80::2]", "my_host-1.internal"]
    assert run._trusted("127.0.0.1", [*told, "*"])[-1] == "*"
    with running(champion, tmp_path / "log", *run._trusted("127.0.0.1", told)) as port:
        for host in ("model.example", "a.b.example:80", f"[fe80::1]:{port}", "[fe80::2]", "my_host-1.internal"):
            assert httpx.get(f"http://127.0.0.1:{port}/health", headers={"Host": host}).is_success, host
        for host in ("example", "[fe80::3]", "internal"):
            assert httpx.get(f"http://127.0.0.1:{port}/health", headers={"Host": host}).status_code == 400, host


def test_a_path_or_a_method_that_the_server_does_not_have_is_refused_in_one_sentence(port: int) -> None:
    url = f"http://127.0.0.1:{port}"
    assert "There is no /nope here; the paths are /invocations" in httpx.get(f"{url}/nope").json()["error"]
    wrong = httpx.get(f"{url}/invocations")
    assert (wrong.status_code, wrong.headers["Allow"]) == (405, "POST")
    assert wrong.json() == {"error": "/invocations takes no GET; send POST."}


def test_what_is_too_large_is_refused_before_it_is_read(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "MAX_BODY_BYTES", 1 << 20)
    found = post(port, b"x" * ((1 << 20) + 1))
    assert found.status_code == 413 and "1 MB" in found.json()["error"]

    def parts() -> Iterator[bytes]:
        for _ in range(17):
            yield b"x" * (1 << 16)

    found = httpx.post(f"http://127.0.0.1:{port}/invocations", content=parts(), headers=JSON, timeout=60)
    assert found.status_code == 413
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(
            b"POST /invocations HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: 99999999999\r\n\r\n"
        )
        assert b" 413 " in read_until_closed(connection)


def test_one_request_too_many_is_told_when_to_come_again(champion: Champion, tmp_path: Path) -> None:
    champion.may_answer.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server, "MAX_IN_FLIGHT", 2)
        with running(champion, tmp_path / "log") as port:
            threads = [threading.Thread(target=ask, args=(port, ROW)) for _ in range(2)]
            for thread in threads:
                thread.start()
            champion.wait_until(lambda: champion.num_inside == 2)
            found = ask(port, ROW)
            assert (found.status_code, found.headers["Retry-After"]) == (503, "2")
            assert httpx.get(f"http://127.0.0.1:{port}/health").is_success, "it is busy, but works"
            champion.may_answer.set()
            for thread in threads:
                thread.join(WAIT_SECONDS)
            assert ask(port, ROW).is_success


def test_a_request_that_takes_too_long_is_given_up(
    port: int, champion: Champion, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "ANSWER_SECONDS", 0.2)
    champion.may_answer.clear()
    found = ask(port, ROW)
    assert (found.status_code, found.headers["Retry-After"]) == (503, "2")
    champion.wait_until(lambda: champion.num_given_up == 1)


HEAD = b"POST /invocations HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


def test_clients_that_break_off_leave_no_line_in_the_log(port: int, champion: Champion, tmp_path: Path) -> None:
    body = json.dumps(ROW).encode()
    for sent in (b"POST /invoc", HEAD, HEAD + b"Content-Length: 100\r\n\r\n", HEAD + b"Content-Length: 100\r\n\r\n{"):
        connection = socket.create_connection(("127.0.0.1", port))
        connection.sendall(sent)
        time.sleep(0.05)  # otherwise the server may not see it
        connection.close()
    champion.may_answer.clear()
    for number in range(1, 4):
        connection = socket.create_connection(("127.0.0.1", port))
        connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        champion.wait_until(lambda number=number: champion.num_inside == number)  # type: ignore[misc]
        connection.close()
        champion.wait_until(lambda number=number: champion.num_given_up == number)  # type: ignore[misc]
    champion.may_answer.set()
    assert ask(port, ROW).is_success
    assert not (tmp_path / "log").exists(), (tmp_path / "log").read_text()


def test_connections_that_keep_the_server_waiting_are_closed(
    champion: Champion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After an answer, and in the middle of a body. The test fails if a connection stays open for a minute."""
    monkeypatch.setattr(run, "IDLE_SECONDS", 0.3)
    monkeypatch.setattr(server, "BODY_SECONDS", 0.3)
    with running(champion, tmp_path / "log") as port:
        asked = connect(port, sent=b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        slow = connect(port, sent=HEAD + b"Content-Length: 9\r\n\r\n{")
        assert b" 200 " in read_until_closed(asked) and b" 408 " in read_until_closed(slow)

        champion.may_answer.clear()  # a slow answer is no idle connection
        body = json.dumps(ROW).encode()
        asking = connect(port, sent=HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        time.sleep(1)
        champion.may_answer.set()
        assert b" 200 " in read_until_closed(asking)


LARGE = HEAD + b"Content-Length: 100000\r\n\r\n{"


def connect(port: int, sent: bytes = b"") -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port))
    connection.sendall(sent)
    return connection


def is_open(connection: socket.socket) -> bool:
    """Whether the server has not closed a connection that waits for its client."""
    connection.setblocking(False)
    try:
        return connection.recv(1) != b""
    except BlockingIOError:
        return True
    except ConnectionError:
        return False


def healthy(port: int) -> bool:
    return httpx.get(f"http://127.0.0.1:{port}/health", timeout=60).is_success


@pytest.mark.parametrize("sent", [b"", b"POST /invoc", LARGE])
def test_too_many_connections_get_503_until_some_are_closed(
    champion: Champion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sent: bytes
) -> None:
    monkeypatch.setattr(run, "MAX_CONNECTIONS", 8)
    with running(champion, tmp_path / "log") as port:
        opened = [connect(port, sent=sent) for _ in range(6)]
        assert ask(port, ROW).is_success
        opened += [connect(port) for _ in range(6)]
        assert ask(port, ROW).status_code == 503 and not healthy(port)
        for connection in opened:
            connection.close()
        wait_for(lambda: healthy(port))
        assert ask(port, ROW).is_success


def test_slow_bodies_take_no_place_from_others(port: int) -> None:
    """More of them than requests may be in flight, from the same address."""
    opened = [connect(port, sent=LARGE) for _ in range(server.MAX_IN_FLIGHT + 10)]
    wait_for(lambda: f"deal_requests_in_flight {len(opened)}.0" in metrics(port))
    assert healthy(port) and ask(port, ROW).is_success
    assert all(map(is_open, opened))
    for connection in opened:
        connection.close()


def metrics(port: int) -> str:
    return httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=60).text


def test_the_end_waits_for_requests_in_flight(champion: Champion, tmp_path: Path) -> None:
    champion.may_answer.clear()
    found: list[httpx.Response] = []
    with running(champion, tmp_path / "log") as port:
        thread = threading.Thread(target=lambda: found.append(ask(port, ROW)))
        thread.start()
        champion.wait_until(lambda: champion.num_inside == 1)
    thread.join(WAIT_SECONDS)
    assert found[0].is_success


def test_the_log_takes_what_the_libraries_warn_of(tmp_path: Path) -> None:
    with run._logged_to(tmp_path / "logs" / "log"):
        logging.getLogger("uvicorn.error").warning("Invalid HTTP request received.")
    assert (tmp_path / "logs" / "log").read_text().endswith("Invalid HTTP request received.\n")


def test_an_empty_token_is_refused_and_an_open_door_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.delenv(API_KEY, raising=False)
    assert _api_key("127.0.0.1", said.append) is None and said == []
    assert _api_key("0.0.0.0", said.append) is None and "may be reached by other machines" in said[0]
    monkeypatch.setenv(API_KEY, " ")
    with pytest.raises(ConfigError, match="DEAL_SERVE_API_KEY is empty"):
        _api_key("127.0.0.1", said.append)
    monkeypatch.setenv(API_KEY, "token")
    assert _api_key("0.0.0.0", said.append) == "token" and len(said) == 1
    monkeypatch.setenv(API_KEY, "token\n")  # as a secret that was made from a file
    assert _api_key("0.0.0.0", said.append) == "token"
