"""A secret in every setting that can contain one, and a search for these secrets in all output of the pipeline."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import SecretStr
from pydantic_settings import BaseSettings

from benchmarks.tiny_base import NO_LIMITS
from infra import settings
from infra.store.opening import store_at
from tests.adapting import BANK
from tests.receiver import Receiver

WORD = "Swordfish"
"""Part of every planted secret, and of nothing else."""
OTHERS = {
    "MLFLOW_TRACKING_USERNAME": "me",
    "MLFLOW_TRACKING_PASSWORD": f"tracking-{WORD}",
    "PREFECT_API_AUTH_STRING": f"admin:prefect-{WORD}",
    "PREFECT_API_KEY": f"cloud-{WORD}",
    "HF_TOKEN": f"hf_{WORD}",
    "AWS_SECRET_ACCESS_KEY": f"aws-{WORD}",
    "AWS_SESSION_TOKEN": f"session-{WORD}",
}
HARMLESS = {
    "DEAL_S3_REGION",
    "DEAL_S3_KMS_KEY_ID",
    "DEAL_NOTIFICATION_BLOCK",
    "DEAL_ENGINE_SERVER_ADAPTER_DIR",
    "DEAL_ENGINE_TARGET_MODULES",
    "DEAL_LAUNCH_COMMAND",
    "DEAL_EVALUATE_ENGINE",  # an address with a password is refused
}
"""Settings with texts that are no secrets and no addresses."""
RUN = """
import json, os, sys
from deal_pipeline.cli.app import app
from infra import webhook

webhook.MAX_PAUSE_SECONDS = 0.01
for step in json.load(sys.stdin):
    os.environ.update(step["environment"])
    for words in step["commands"]:
        try:
            code = app(words, standalone_mode=False)
        except SystemExit as error:
            code = error.code
        except Exception as error:
            code = f"{type(error).__name__}: {error}"
        print(f"== {' '.join(words[:2])}: {code}", flush=True)
"""
"""Runs commands one after another in one process; a step's variables stay for the next ones."""


def planted(port: int) -> dict[str, str]:
    """Every variable of this project that can contain a secret, with a secret. No server answers at the addresses."""
    host = f"me:{{}}-{WORD}@127.0.0.1:{port}"
    return {
        "DEAL_STORE_URI": f"s3://me:store-{WORD}@bucket/deal",
        "DEAL_S3_ENDPOINT_URL": f"http://{host.format('endpoint')}",
        "DEAL_S3_ACCESS_KEY_ID": f"key-{WORD}",
        "DEAL_S3_SECRET_ACCESS_KEY": f"secret-{WORD}",
        "DEAL_LANDING_QUEUE_URL": f"http://{host.format('queue')}/1/landed",
        "DEAL_WEBHOOK_URL": f"http://{host.format('hook')}/services/{WORD}",
        "DEAL_WEBHOOK_SECRET": f"sign-{WORD}",
        "DEAL_ENGINE_API_KEY": f"engine-{WORD}",
        "DEAL_SERVE_API_KEY": f"serve-{WORD}",
        "DEAL_BASE_MODEL": f"https://{host.format('base')}/model",
        "DEAL_ARTIFACT_URI": f"ftp://{host.format('artifacts')}/mlflow",
        "MLFLOW_TRACKING_URI": f"http://{host.format('mlflow')}",
    }


def test_every_setting_that_can_hold_a_secret_is_planted() -> None:
    kinds = [kind for kind in vars(settings).values() if isinstance(kind, type) and issubclass(kind, BaseSettings)]
    texts = {
        str(field.validation_alias or f"{kind.model_config.get('env_prefix')}{name}".upper())
        for kind in kinds
        for name, field in kind.model_fields.items()
        if {field.annotation, *get_args(field.annotation)} & {str, SecretStr, frozenset[str]}
        or field.annotation == frozenset[str]
    }
    assert texts == set(planted(1)) | HARMLESS


def holding(content: bytes, where: str) -> list[str]:
    """Each secret in a content, with the text around it."""
    places = [found.start() for found in re.finditer(WORD.encode(), content)]
    return [f"{where}: {content[max(0, place - 120) : place + 40]!r}" for place in places]


def holding_files(folder: Path) -> list[str]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    assert files
    return [found for path in files for found in holding(path.read_bytes(), str(path.relative_to(folder)))]


def run(
    home: Path, steps: Sequence[tuple[Mapping[str, str], Sequence[Sequence[str]]]]
) -> subprocess.CompletedProcess[str]:
    """Run commands in one process, with the secrets that no address needs in its environment."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("DEAL_", "MLFLOW_", "PREFECT_"))}
    quick = {"DEAL_S3_MAX_ATTEMPTS": "1", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    given = json.dumps([{"environment": dict(variables), "commands": commands} for variables, commands in steps])
    done = subprocess.run(
        [sys.executable, "-c", RUN],
        input=given,
        capture_output=True,
        text=True,
        check=False,
        env={**clean, **quick, **OTHERS, "DEAL_HOME": str(home), "DEAL_S3_REGION": "us-east-1"},
    )
    assert done.returncode == 0, done.stderr
    return done


def spec_of(folder: Path, base: Path | str, **changes: Any) -> str:
    path = folder / f"{len(list(folder.glob('*.json')))}.json"  # JSON is YAML
    train = {"max_steps": 2, "max_prompt_tokens": 192, "max_answer_tokens": 12, "checkpoint_steps": 0}
    path.write_text(json.dumps({"base_model": str(base), "task": BANK, "gate": NO_LIMITS, "train": train, **changes}))
    return str(path)


@pytest.mark.nightly
def test_no_secret_is_shown_or_kept_where_nothing_answers(
    tiny_base: Path, tmp_path: Path, free_port: int, prefect_database: Path
) -> None:
    home, secret = tmp_path / "home", planted(free_port)
    (home / "prefect").mkdir(parents=True)
    shutil.copy(prefect_database, home / "prefect" / "prefect.db")
    there = {**secret, "DEAL_STORE_URI": "s3://bucket/deal"}
    local = {"DEAL_STORE_URI": (tmp_path / "store").as_uri()}
    good = spec_of(tmp_path, tiny_base)
    spoiled = [
        spec_of(tmp_path, f"https://me:base-{WORD}@127.0.0.1/model"),
        spec_of(tmp_path, f"https://127.0.0.1/model.gguf?token=base-{WORD}"),
        spec_of(tmp_path, tiny_base, task={**BANK, "data": f"https://me:data-{WORD}@127.0.0.1/x.csv"}),
    ]
    looking = [
        ["status", "--json"],
        ["status"],
        ["version", "list"],
        ["data", "gc"],
        ["adapt", "--watch", "--once"],
        ["lineage", "list"],
    ]
    bad_endpoint = {"DEAL_S3_ENDPOINT_URL": f"http://me:bad-{WORD}@[not"}
    done = run(
        home,
        [
            (
                secret,
                [["status", "--json"], ["adapt", good], ["adapt", good, "--debug"], ["version", "list", "--json"]],
            ),
            (there, [*looking, ["adapt", good], ["adapt", good, "--debug"], ["adapt", good, "--json"]]),
            (bad_endpoint, [["status", "--json"], ["adapt", good, "--debug"]]),
            (local, [["status", "--json"], ["adapt", good], ["predict", "x"], ["ui", "--json"]]),
            (
                {"DEAL_ARTIFACT_URI": "", "DEAL_WEBHOOK_URL": ""},
                [
                    *looking,
                    ["adapt", good, "--debug"],
                    ["version", "list"],
                    ["serve"],
                    ["demo", "--base", secret["DEAL_BASE_MODEL"]],
                    ["serve", "--engine", f"http://me:engine-{WORD}@127.0.0.1:{free_port}"],
                    ["adapt", good, "--set", f"base_model={secret['DEAL_BASE_MODEL']}"],
                    *(["adapt", each] for each in spoiled),
                    *(["lineage", "apply", each] for each in spoiled),
                    ["predict", "x", "--debug"],
                ],
            ),
            (
                {"PREFECT_API_URL": f"http://me:api-{WORD}@127.0.0.1:{free_port}/api"},
                [["status", "--json"], ["status"]],
            ),
        ],
    )
    said = done.stdout + done.stderr
    found = [*holding(done.stdout.encode(), "stdout"), *holding(done.stderr.encode(), "stderr"), *holding_files(home)]
    assert found == []
    assert said.count("== ") >= 40 and "== adapt " in said and "HF_TOKEN for a Hub" in said
    assert f"***@127.0.0.1:{free_port}" in said, "the address is still shown"


@pytest.mark.nightly
def test_no_secret_is_kept_by_a_run_that_succeeds_with_all_of_them(
    tiny_base: Path, tmp_path: Path, mlflow_server: str, s3_server: str, receiver: Receiver
) -> None:
    home, hook = tmp_path / "home", "http://" + receiver.url.removeprefix("http://").rstrip("/")
    secrets = {
        "DEAL_STORE_URI": "s3://bucket/deal",
        "DEAL_S3_ENDPOINT_URL": s3_server,
        "DEAL_S3_ACCESS_KEY_ID": f"key-{WORD}",
        "DEAL_S3_SECRET_ACCESS_KEY": f"secret-{WORD}",
        "DEAL_WEBHOOK_URL": f"{hook}/services/{WORD}",
        "DEAL_WEBHOOK_SECRET": f"sign-{WORD}",
        "DEAL_ENGINE_API_KEY": f"engine-{WORD}",
        "MLFLOW_TRACKING_URI": mlflow_server.replace("http://", f"http://me:mlflow-{WORD}@"),
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**secrets, "DEAL_S3_REGION": "us-east-1"}.items():
            patch.setenv(name, value)
        store = store_at("s3://bucket/deal")
        store.client.create_bucket(Bucket="bucket")  # type: ignore[attr-defined]
        good, failing = spec_of(tmp_path, tiny_base), spec_of(tmp_path, tiny_base, lineage="other", adapter={"rank": 0})
        refused = spec_of(tmp_path, tmp_path / "no model", lineage="other")
        done = run(
            home,
            [
                (
                    secrets,
                    [
                        ["adapt", good],
                        ["adapt", good, "--force", "--json"],
                        ["adapt", failing],
                        ["adapt", refused, "--debug"],
                        ["version", "list", "--json"],
                        ["status", "--json"],
                        ["version", "show", "1", "--report"],
                        ["predict", "My card was lost."],
                        ["data", "gc"],
                    ],
                )
            ],
        )
        said = done.stdout + done.stderr
        assert said.count("== adapt ") == 4 and '"status": "promoted"' in said, said
        assert len(receiver.told()) >= 3, "two versions and a failure"
        found = [*holding(done.stdout.encode(), "stdout"), *holding(done.stderr.encode(), "stderr")]
        found += [*holding_files(home), *holding_files(tmp_path / "server")]
        for info in store.list():
            found += holding(store.get_bytes(info.key), info.key)
        for _, body in receiver.requests:
            found += holding(body, "webhook")
    assert found == []
