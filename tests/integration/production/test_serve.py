"""Versions in use: `deal serve` while the champion moves, `mlflow models serve`, and plain PEFT."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import mlflow
import psutil
import pyarrow.parquet as pq
import pytest
import torch
from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts
from mlflow.models import Model
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.output import DEAL
from benchmarks.speed.serving import (
    LINEAGE,
    Clients,
    Expected,
    answers_of,
    learn_versions,
    make_champion,
    served,
    stale,
    texts_to_ask,
)
from deal_core.adapter.files import WEIGHTS_FILE
from deal_core.adapter.state import adapter_on
from deal_core.base_model.load import load_base
from deal_core.errors import ConfigError
from deal_core.evaluation.answerer import Answerer
from infra.predictions import read_feedback, read_predictions
from infra.served_model import LOADER, _load_pyfunc
from infra.serving.champion import NoChampionError
from infra.serving.run import serve
from infra.settings import HomeSettings, TrackingSettings
from infra.store.keys import adapter_uri, file_name
from infra.store.opening import open_store
from infra.tracking.client import global_address
from infra.versions import UNREGISTERED, Versions
from tasks.lineage.history import find_version
from tasks.lineage.record import read_record
from tasks.lineage.version_files import borrowed_adapter
from tasks.mlflow_mirror import sync_lineage
from tests.waiting import wait_for

WAIT_SECONDS = 300.0
TEXTS = texts_to_ask()[:12]


@pytest.fixture(scope="module")
def versions(serving_home: Path, tiny_base: Path) -> Expected:
    """The answers of two versions."""
    learn_versions(str(tiny_base), max_steps=4, learning_rate=0.02)
    expected = answers_of(["1", "2"], TEXTS, "bank")
    assert sum(first != second for first, second in zip(*expected.values(), strict=True)) >= 4
    return expected


def state(url: str) -> dict[str, str | None]:
    found: dict[str, str | None] = httpx.get(f"{url}/version").json()
    return found


def register_again(version: str, run_key: str, **changes: Any) -> str:
    """Register a further version of the same files; return its number."""
    known = find_version(open_store(), LINEAGE, version)
    again = known.model_copy(update={"version": UNREGISTERED, "run_key": run_key, **changes})
    return Versions(open_store()).register(again).version


def register_damaged() -> str:
    """Register a version one of whose files has other bytes in the store than it had."""
    store, uri = open_store(), adapter_uri(LINEAGE, "damaged")
    for info in store.list(find_version(store, LINEAGE, "2").adapter_uri):
        store.put_bytes(f"{uri}/{file_name(info.key)}", store.get_bytes(info.key))
    store.put_bytes(f"{uri}/{WEIGHTS_FILE}", b"other bytes")
    return register_again("2", "damaged", adapter_uri=uri)


def test_deal_serve_moves_with_the_champion_fails_no_request_and_logs_every_answer_but_no_word(
    versions: Expected, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One server for all of it, as its start takes long. MLflow is away all the time. In the end it is killed."""
    make_champion("2")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("DEAL_LOG_PREDICTIONS", "numbers")
    store = open_store()
    with served() as (url, process):
        asked = answers_with_feedback(url, versions["2"])
        num_asked = len(TEXTS) + check_the_champion_is_followed(url, versions) + check_requests(url)
        wait_for(lambda: len(read_feedback(store, LINEAGE)) == 1)
        wait_for(lambda: len(read_predictions(store, LINEAGE)) == num_asked)
        assert psutil.Process(process.pid).children() == [], "one process has the one base model"
        process.kill()
        process.wait(WAIT_SECONDS)
    check_the_log_has_the_answers_and_no_word(asked)


def answers_with_feedback(url: str, expected: Sequence[str]) -> list[dict[str, Any]]:
    """Ask all texts at once and say that the first answer is right."""
    rows = [{"input": text, "task": "bank"} for text in TEXTS]
    answer = httpx.post(f"{url}/invocations", json={"dataframe_records": rows}, timeout=WAIT_SECONDS)
    asked: list[dict[str, Any]] = answer.json()["predictions"]
    assert [row["output"] for row in asked] == expected, "the answers are those without a log"
    taken = httpx.post(f"{url}/feedback", json=[{"id": asked[0]["id"], "is_right": True}])
    assert taken.status_code == 202
    return asked


def check_the_champion_is_followed(url: str, versions: Expected) -> int:
    """Move the champion while clients ask. There is no time limit: one waits for the first answer of the new version.

    Returns:
        How many answers the clients got.
    """
    moves: list[tuple[float, str]] = []
    clients = Clients(url, TEXTS, "bank", versions)
    with clients.asking(4):

        def move_to(version: str) -> None:
            moves.append((time.monotonic(), version))
            make_champion(version)
            clients.first_of(version, moves[-1][0], sent_since=moves[-1][0])

        for version in ("1", "2"):
            move_to(version)
        damaged = register_damaged()
        make_champion(damaged)
        wait_for(lambda: state(url)["problem"] is not None)
        assert (state(url)["version"], state(url)["champion"]) == ("2", damaged)
        assert f"{WEIGHTS_FILE} has sha256" in str(state(url)["problem"])
        metrics = httpx.get(f"{url}/metrics").text
        assert f'deal_serving{{champion="{damaged}",lineage="{LINEAGE}",version="2"}} 1.0' in metrics
        assert "deal_serving_problem 1.0" in metrics
        now = time.monotonic()
        clients.first_of("2", now, sent_since=now)
        move_to("1")
        wait_for(lambda: state(url)["problem"] is None)
        assert "deal_serving_problem 0.0" in httpx.get(f"{url}/metrics").text
    log = (HomeSettings().home / "logs" / f"serve-{LINEAGE}.log").read_text()
    assert "Version 2 serves" in log and TEXTS[0] not in log
    assert f"WARNING deal.serving: Version {damaged} does not load" in log
    assert [each.problem for each in clients.answers if each.problem] == []
    assert stale(clients.answers, moves) == 0
    return len(clients.answers)


def check_the_log_has_the_answers_and_no_word(asked: list[dict[str, Any]]) -> None:
    """The log of a killed server. It keeps numbers."""
    store, home = open_store(), HomeSettings().home
    everything = read_predictions(store, LINEAGE, task="bank")
    assert set(everything["version"]) == {"1", "2"} and everything["input"].isna().all()
    assert everything["confidence"].between(0, 1).all() and (everything["label_mass"] > 0).all()
    found = everything.head(len(asked))
    assert [*found["id"]] == [row["id"] for row in asked] and set(found["version"]) == {"2"}
    assert [*found["confidence"]] == [row["confidence"] for row in asked]
    assert [*read_feedback(store, LINEAGE)["id"]] == [asked[0]["id"]]
    kept = [path for path in home.rglob("*") if path.is_file() and {"predictions", "feedback"} & {*path.parts}]
    tables = [path for path in kept if path.suffix == ".parquet"]
    content = b"".join(json.dumps(pq.read_table(path).to_pylist()).encode() + path.read_bytes() for path in tables)
    labels = " ".join(str(label) for label in everything["label"])
    words = {word for text in TEXTS for word in text.split() if len(word) > 4 and word not in labels}
    assert len(tables) == len(kept) > 1 and words and not [word for word in words if word.encode() in content]


@pytest.mark.nightly
def test_a_full_disk_ends_nothing_and_no_copy_stays(versions: Expected, monkeypatch: pytest.MonkeyPatch) -> None:
    home = HomeSettings().home
    monkeypatch.setenv("DEAL_TRUSTED_HOSTS", "a.example b.example")
    third = register_again("1", "third")
    make_champion(third)
    with served() as (url, process):
        for host, status in (("b.example", 200), ("evil.example", 400)):
            assert httpx.get(f"{url}/health", headers={"Host": host}).status_code == status
        temporary = home / "tmp"
        assert list(temporary.iterdir()) == [], "the version is in memory"
        temporary.rmdir()
        temporary.touch()  # no folder can be made there, as on a full disk
        make_champion("2")
        wait_for(lambda: state(url)["problem"] is not None)
        assert f"version {third} continues to serve" in str(state(url)["problem"]) and str(temporary) in str(state(url))
        row = {"input": TEXTS[0], "task": "bank"}
        answer = httpx.post(f"{url}/invocations", json={"dataframe_records": [row]}, timeout=60)
        assert answer.headers["X-Deal-Version"] == third
        temporary.unlink()
        make_champion("1")
        wait_for(lambda: state(url)["version"] == "1")
        wait_for(lambda: list(temporary.iterdir()) == [])
        assert process.poll() is None


def test_a_lineage_that_does_not_exist_has_no_log(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEAL_LOG_PREDICTIONS", "numbers")

    def begin(lineage: str) -> None:
        store = open_store()
        serve(store, lineage, home, host="127.0.0.1", port=0, trusted_hosts=(), say=print, ready=lambda *_: None)

    with pytest.raises(NoChampionError):
        begin("nobody")
    assert not list(open_store().list("predictions"))
    with pytest.raises(ConfigError, match="The lineage is"):
        begin("../../data")


@pytest.mark.nightly
def test_ctrl_c_ends_at_once_though_the_store_keeps_silent(versions: Expected, monkeypatch: pytest.MonkeyPatch) -> None:
    """An S3 server accepts connections and never answers, so a request takes minutes."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("DEAL_STORE_URI", "s3://bucket")
        monkeypatch.setenv("DEAL_S3_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("DEAL_S3_ACCESS_KEY_ID", "key")
        monkeypatch.setenv("DEAL_S3_SECRET_ACCESS_KEY", "secret")
        process = subprocess.Popen(
            [*DEAL, "serve", "--lineage", LINEAGE, "--port", "0"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        try:
            silent.settimeout(WAIT_SECONDS)
            with silent.accept()[0]:
                process.send_signal(signal.SIGINT)
                said, _ = process.communicate(timeout=WAIT_SECONDS)
        finally:
            process.kill()
        assert process.returncode == 130 and b"Stopped" in said, said


@pytest.mark.nightly
def test_ctrl_c_ends_the_server_while_it_prepares_large_requests(versions: Expected) -> None:
    """Their rows take seconds of processor time to prepare. The server gives them up at the signal, and ends."""
    make_champion("2")
    body = {"dataframe_records": [{"input": "I lost my card. " * 60_000, "task": "bank"}] * 15}
    with served() as (url, process), ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(httpx.post, f"{url}/invocations", json=body, timeout=2 * WAIT_SECONDS) for _ in range(4)]
        wait_for(lambda: "deal_requests_in_flight 0.0" not in httpx.get(f"{url}/metrics", timeout=60).text)
        process.send_signal(signal.SIGINT)
        answers = [each.result(2 * WAIT_SECONDS) for each in asked if each.exception() is None]
        refused = [answer for answer in answers if not answer.is_success]
        assert refused and all("The server is stopping" in answer.json()["error"] for answer in refused)
        assert process.wait(WAIT_SECONDS) == 0


def check_requests(url: str) -> int:
    """Tasks, batches and a refused request; the number of rows that were answered."""
    assert httpx.get(f"{url}/health").status_code == 200

    def ask(body: object) -> httpx.Response:
        return httpx.post(f"{url}/invocations", json=body, timeout=60)

    rows = [{"input": "I lost my card.", "task": "bank"}, {"input": "I lost my card."}]
    answer = ask({"dataframe_records": rows})
    assert (answer.headers["X-Deal-Lineage"], answer.headers["X-Deal-Version"]) == (LINEAGE, "1")
    predictions = answer.json()["predictions"]
    assert [(row["task"], row["version"], row["lineage"]) for row in predictions] == [("bank", "1", LINEAGE)] * 2
    refused = ask({"secret": "a secret"})
    assert refused.status_code == 400 and "a secret" not in refused.text and "IMPORTANT" not in refused.text
    return len(predictions)


@pytest.mark.nightly
def test_mlflow_models_serve_answers_with_the_champion(versions: Expected, free_port: int, tmp_path: Path) -> None:
    example = json.loads((registered_folder("2", tmp_path) / "serving_input_example.json").read_text())
    url = f"http://127.0.0.1:{free_port}"
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "models",
        "serve",
        "-m",
        f"models:/{LINEAGE}@champion",
        "--env-manager",
        "local",
        "--host",
        "127.0.0.1",
        "--port",
        str(free_port),
    ]
    environment = {
        **os.environ,
        "MLFLOW_TRACKING_URI": f"sqlite:///{HomeSettings().home}/mlflow.db",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(Path(__file__).parents[3]),
    }
    log = tmp_path / "log"
    with log.open("w") as output:
        process = subprocess.Popen(command, env=environment, cwd=tmp_path, stdout=output, stderr=output)

    def is_up() -> bool:
        assert process.poll() is None, log.read_text()
        try:
            return httpx.get(f"{url}/ping").is_success
        except httpx.TransportError:
            return False

    try:
        wait_for(is_up)
        assert httpx.post(f"{url}/invocations", json=example, timeout=60).is_success
        rows = [{"input": text, "task": "bank"} for text in TEXTS[:2]]
        answer = httpx.post(f"{url}/invocations", json={"dataframe_records": rows}, timeout=60)
        found = [(row["output"], row["version"], row["lineage"]) for row in answer.json()["predictions"]]
        assert found == [(text, "2", LINEAGE) for text in versions["2"][:2]]
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(WAIT_SECONDS)


def test_what_is_set_for_this_machine_counts(
    versions: Expected, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = registered_folder("2", tmp_path)
    answerer = loaded(folder)
    assert (answerer.version, answerer._model.dtype) == ("2", torch.float32)
    monkeypatch.setenv("DEAL_SERVING_PRECISION", "bf16")
    moved = json.loads((folder / "deal.json").read_text())
    (folder / "deal.json").write_text(json.dumps({**moved, "base_source": "/was/there/once"}))
    with pytest.raises(ConfigError, match="/was/there/once"):
        _load_pyfunc(str(folder))
    monkeypatch.setenv("DEAL_BASE_MODEL", str(tiny_base))
    answerer = loaded(folder)
    assert (answerer.version, answerer._model.dtype) == ("2", torch.bfloat16)


def loaded(folder: Path) -> Answerer:
    """The answerer of the version in a folder, as MLflow loads the folder."""
    return _load_pyfunc(str(folder)).ask.__self__  # type: ignore[attr-defined, no-any-return]


def registered_folder(version: str, tmp_path: Path) -> Path:
    """A version as somebody gets it who reads MLflow alone."""
    make_champion(version)
    sync_lineage(open_store(), LINEAGE)
    with global_address(TrackingSettings().tracking_uri):
        return Path(download_artifacts(artifact_uri=f"models:/{LINEAGE}@champion", dst_path=str(tmp_path / version)))


def test_the_registrys_folder_loads_with_peft_alone(versions: Expected, tiny_base: Path, tmp_path: Path) -> None:
    folder = registered_folder("2", tmp_path)
    (folder / "MLmodel").unlink()
    tokens = AutoTokenizer.from_pretrained(tiny_base)("I lost my card", return_tensors="pt")
    plain = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    with torch.no_grad():
        untouched = plain(**tokens).logits
        found = PeftModel.from_pretrained(plain, str(folder)).eval()(**tokens).logits
        base = load_base(str(tiny_base), HomeSettings().cache_dir, precision="fp32")
        second = find_version(open_store(), LINEAGE, "2")
        with borrowed_adapter(open_store(), second) as own, adapter_on(base.model, own) as model:
            wanted = model(**tokens).logits
    assert torch.allclose(found, wanted, atol=1e-4) and not torch.allclose(found, untouched, atol=1e-2)


def test_the_registrys_folder_says_what_it_is_and_holds_no_row(versions: Expected, tmp_path: Path) -> None:
    info = find_version(open_store(), LINEAGE, "2")
    folder = registered_folder("2", tmp_path)
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
        "deal.json",
        "MLmodel",
        "conda.yaml",
        "python_env.yaml",
        "requirements.txt",
        "input_example.json",
        "serving_input_example.json",
        "registered_model_meta",
    }
    card = (folder / "README.md").read_text()
    record = read_record(open_store(), info)
    digests = [known.test_uris[0].split("/")[2] for known in record.tasks]
    assert all(len(digest) == 64 for digest in digests) and info.dataset_sha256 in digests
    facts = (info.base_sha256, info.dataset_sha256, "continues version 1", "| bank | clinic |", "- licence: ")
    for fact in (*digests, *facts):
        assert fact in card, fact
    model = Model.load(str(folder))
    flavor = model.flavors["python_function"]
    assert (flavor["loader_module"], flavor["code"]) == (LOADER, None), "the folder contains no code"
    run = MlflowClient(TrackingSettings().tracking_uri).get_run(str(model.run_id))
    assert run.data.tags["deal.run_key"] == info.run_key and model.signature is not None
    assert model.signature.inputs.input_names() == ["input", "task"]
    assert not model.signature.inputs.input_dict()["task"].required
    pins = dict(line.split("==") for line in (folder / "requirements.txt").read_text().splitlines())
    assert pins["mlflow"] == mlflow.__version__ and {"torch", "peft", "transformers"} <= pins.keys()
    assert "deal-pipeline" not in pins, "anyone could register the name in a public index"
    everything = "".join((folder / name).read_text() for name in names if not name.endswith(".safetensors"))
    assert not any(text in everything for text in texts_to_ask())
