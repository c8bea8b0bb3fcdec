"""Buckets and users of a new store, on servers with no users, with RustFS's and with MinIO's administration."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import urllib3
import yaml
from minio.crypto import decrypt

from deal_core.errors import ConfigError, StoreError
from infra.settings import StoreSettings
from infra.store.keys import DATASETS, FEEDBACK, INBOX, LINEAGES, PREDICTIONS, PROMOTIONS, VERSIONS
from infra.store.provision import BUCKETS, MINIO, RUSTFS, policy_of, provision
from infra.store.s3 import make_client
from tests.s3 import ThreadedMotoServer

COMPOSE = Path(__file__).parents[4] / "infra" / "docker" / "compose.yaml"
KEYS = {f"STORE_{user.upper()}_{name}_KEY": f"{user}-{name}" for user in BUCKETS for name in ("ACCESS", "SECRET")}


def settings_for(address: str) -> StoreSettings:
    keys = {"s3_access_key_id": "admin", "s3_secret_access_key": "secret"}
    return StoreSettings.model_validate({"s3_endpoint_url": address, "s3_region": "us-east-1", **keys})


def test_the_buckets_are_made_once_where_the_server_has_no_users() -> None:
    """The container that gives the command runs at every start of the stack."""
    service = yaml.safe_load(COMPOSE.read_text())["services"]["buckets"]
    assert service["command"] == "python -m infra.store.provision" and service["restart"] == "no"
    assert KEYS.keys() <= service["environment"].keys()
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        settings = settings_for("http://{}:{}".format(*server.get_host_and_port()))
        client = make_client(settings)
        client.create_bucket(Bucket="mlflow")
        client.put_object(Bucket="mlflow", Key="model", Body=b"kept")
        before = {bucket["Name"] for bucket in client.list_buckets()["Buckets"]}  # all moto servers share their buckets
        for _ in range(2):
            provision(settings, KEYS)
        assert {bucket["Name"] for bucket in client.list_buckets()["Buckets"]} == {*before, "deal"}
        assert client.get_object(Bucket="mlflow", Key="model")["Body"].read() == b"kept"
    finally:
        server.stop()


class Administered(BaseHTTPRequestHandler):
    """What `provision` asks of RustFS and MinIO: lists are empty, and requests of the administrator are kept."""

    administration: str
    asked: list[tuple[str, dict[str, list[str]], Any]]
    refused: str

    def do_GET(self) -> None:
        key = self.headers["Authorization"].partition("Credential=")[2].partition("/")[0]
        self.answer(403 if key == self.refused else 200, b"<ListAllMyBucketsResult><Buckets/></ListAllMyBucketsResult>")

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        address = urlsplit(self.path)
        if address.path.count("/") > 1:
            if not address.path.startswith(self.administration):
                self.answer(404, b"<Error><Code>NoSuchBucket</Code></Error>")
                return
            assert "Credential=admin/" in self.headers["Authorization"]
            if self.administration == MINIO and address.path.endswith("add-user"):
                body = decrypt(urllib3.HTTPResponse(io.BytesIO(body), preload_content=False), "secret")
            content = json.loads(body) if body else None
            self.asked.append((address.path.removeprefix(self.administration), parse_qs(address.query), content))
        self.answer(200, b"")

    def answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(params=[RUSTFS, MINIO])
def administered(request: pytest.FixtureRequest) -> Iterator[tuple[StoreSettings, type[Administered]]]:
    handler = type("Handler", (Administered,), {"administration": request.param, "asked": [], "refused": ""})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield settings_for(f"http://127.0.0.1:{server.server_port}"), handler
        server.shutdown()


def test_the_server_gets_a_user_and_a_policy_for_each_part(
    administered: tuple[StoreSettings, type[Administered]],
) -> None:
    settings, server = administered
    provision(settings, KEYS)
    expected = [
        request
        for user in BUCKETS
        for request in (
            ("add-user", {"accessKey": [f"{user}-ACCESS"]}, {"secretKey": f"{user}-SECRET", "status": "enabled"}),
            ("add-canned-policy", {"name": [f"deal-{user}"]}, policy_of(user)),
            (
                "set-user-or-group-policy",
                {"policyName": [f"deal-{user}"], "userOrGroup": [f"{user}-ACCESS"], "isGroup": ["false"]},
                None,
            ),
        )
    ]
    assert server.asked == expected


def test_a_user_whom_the_server_does_not_know_is_named(
    administered: tuple[StoreSettings, type[Administered]],
) -> None:
    settings, server = administered
    server.refused = "front-ACCESS"
    with pytest.raises(StoreError, match="STORE_FRONT_ACCESS_KEY") as raised:
        provision(settings, KEYS)
    assert raised.value.code == "store-user"


def test_a_key_that_is_not_set_is_named() -> None:
    with pytest.raises(ConfigError, match="STORE_MLFLOW_SECRET_KEY") as raised:
        provision(StoreSettings(), {**KEYS, "STORE_MLFLOW_SECRET_KEY": ""})
    assert raised.value.code == "store-keys"


def allowed(user: str, action: str, resource: str) -> bool:
    """Whether the policy of a user allows an action, by S3's rule: a refusal is stronger."""
    effects = {
        statement["Effect"]
        for statement in policy_of(user)["Statement"]
        if f"s3:{action}" in statement["Action"]
        and any(
            resource == arn or (arn.endswith("*") and resource.startswith(arn[:-1])) for arn in statement["Resource"]
        )
    }
    return effects == {"Allow"}


def test_the_front_writes_logs_alone_and_reads_no_rows() -> None:
    deal = "arn:aws:s3:::deal"
    for folder in (VERSIONS, PROMOTIONS, LINEAGES):
        assert allowed("front", "GetObject", f"{deal}/{folder}/x") and allowed(
            "worker", "PutObject", f"{deal}/{folder}/x"
        )
        assert not allowed("front", "PutObject", f"{deal}/{folder}/x")
        assert not allowed("front", "DeleteObject", f"{deal}/{folder}/x")
    for folder in (INBOX, DATASETS):
        assert not allowed("front", "GetObject", f"{deal}/{folder}/x")
        assert not allowed("front", "PutObject", f"{deal}/{folder}/x")
    for folder in (PREDICTIONS, FEEDBACK):
        assert all(allowed("front", f"{action}Object", f"{deal}/{folder}/x") for action in ("Get", "Put", "Delete"))
    assert allowed("worker", "ListBucketMultipartUploads", deal), "uploads of killed processes are found"
    assert not any(allowed(user, "GetObject", "arn:aws:s3:::mlflow/x") for user in ("front", "worker"))
    assert not allowed("mlflow", "GetObject", f"{deal}/versions/x")
