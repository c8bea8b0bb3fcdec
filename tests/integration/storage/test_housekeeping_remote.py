"""gc and forget with the rows on an S3 server and the artifacts in an MLflow server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest

from flows.forget import forget
from flows.gc import gc
from infra.settings import StoreSettings
from infra.store.opening import open_store
from infra.store.s3 import S3Store
from tasks.mlflow_mirror import sync_lineage
from tests.adapting import BANK, CLINIC, FAIL, run

SECRET = "Zanzibar-4711"

pytestmark = pytest.mark.usefixtures("prefect_api", "home")


@pytest.fixture
def bucket(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> S3Store:
    """An empty store on an S3 server over HTTP, which the settings name."""
    settings = {
        "STORE_URI": "s3://team/store",
        "S3_ENDPOINT_URL": s3_server,
        "S3_REGION": "us-east-1",
        "S3_ACCESS_KEY_ID": "somebody",
        "S3_SECRET_ACCESS_KEY": "secret",
    }
    for name, value in settings.items():
        monkeypatch.setenv(f"DEAL_{name}", value)
    S3Store("team", "store", StoreSettings()).client.create_bucket(Bucket="team")
    store = open_store()
    assert isinstance(store, S3Store)
    return store


@pytest.fixture
def artifacts(mlflow_server: str, tmp_path: Path) -> Iterator[Path]:
    """Folder of the artifacts of the MLflow server that the settings name."""
    before = mlflow.get_tracking_uri()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", mlflow_server)
        yield tmp_path / "server" / "artifacts"
    assert mlflow.get_tracking_uri() == before, "the address does not outlive the variable"


def holding(store: S3Store, artifacts: Path, text: str) -> list[str]:
    """Objects and files of the MLflow server that contain a text."""
    found = [info.key for info in store.list("") if text.encode() in store.get_bytes(info.key)]
    return found + [str(path) for path in artifacts.rglob("*") if path.is_file() and text.encode() in path.read_bytes()]


@pytest.mark.nightly
def test_what_goes_is_gone_from_both_servers(tiny_base: Path, bucket: S3Store, artifacts: Path) -> None:
    row = json.dumps({"text": f"My card {SECRET} was lost abroad.", "label": "lost card"})
    bad = json.dumps({"text": "", "label": f"lost card {SECRET}"})
    bucket.put_bytes("inbox/bank/may.jsonl", f"{Path(BANK['data']).read_text()}{row}\n{bad}\n".encode())
    first = run(
        tiny_base,
        {**BANK, "data": bucket.uri_of("inbox/bank/may.jsonl")},
        data={"retain_training_rows": True},
    )
    rejected = run(tiny_base, CLINIC, gate=FAIL)
    assert (first.status, rejected.status) == ("promoted", "rejected")
    assert any("quarantine" in key for key in holding(bucket, artifacts, SECRET))

    def stored(run_key: str) -> list[str]:
        return [info.key for info in bucket.list(f"adapters/l/{run_key[:16]}")]

    num_weights = len(list(artifacts.rglob("adapter_model.safetensors")))
    assert num_weights, "MLflow has copies"
    done = asyncio.run(gc("l", "0h"))
    assert [removal.version for removal in done.removals if removal.kind == "adapter"] == ["2"]
    assert stored(first.run_key) and not stored(rejected.run_key)
    sync_lineage(bucket, "l")
    assert len(list(artifacts.rglob("adapter_model.safetensors"))) == num_weights - 1

    left = {"Bucket": bucket.bucket, "Key": f"{bucket.root}{first.dataset.uri}/train.parquet"}
    left["UploadId"] = bucket.client.create_multipart_upload(**left)["UploadId"]
    bucket.client.upload_part(**left, PartNumber=1, Body=SECRET.encode())
    plan = asyncio.run(forget("inbox/bank/may.jsonl", "the customer asked")).plan
    assert [*bucket.uploads()] == []
    assert {
        "unfinished upload",
        "training rows",
        "test rows",
        "quarantine",
        "inbox file",
        "rows kept by the method",
    } <= {each.kind for each in plan.held}
    assert holding(bucket, artifacts, SECRET) == []
    assert not [info.key for info in bucket.list("datasets/bank") if info.key.endswith(".parquet")]
