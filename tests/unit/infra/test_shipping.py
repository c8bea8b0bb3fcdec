"""The files for Docker and Kubernetes fit their schemas. These tests do not run them."""

from __future__ import annotations

import configparser
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from docker.utils import exclude_paths
from prefect.settings.models.server.services import ServerServicesDBVacuumSettings
from typer.main import get_command

from flows.cli.app import app
from infra.settings import StoreSettings
from infra.store.s3 import make_client
from tests.s3 import ThreadedMotoServer

INFRA = Path(__file__).parents[3] / "infra"
COMPOSE = INFRA / "docker" / "compose.yaml"
MANIFESTS = ("base/deal.yaml", "prefect-home.yaml", "secrets.example.yaml")


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((INFRA / "kubernetes" / name).read_text()))


@pytest.mark.parametrize("name", MANIFESTS)
def test_kubernetes_takes_the_manifests(name: str) -> None:
    for document in documents(name):
        kubernetes_validate.validate(document, "1.32", strict=True)


def test_every_container_is_given_a_command_that_there_is() -> None:
    pods = [pod["spec"]["template"]["spec"] for pod in documents("base/deal.yaml") if "template" in pod.get("spec", {})]
    given = [container["args"] for pod in pods for container in pod["containers"] if "args" in container]
    services = yaml.safe_load(COMPOSE.read_text())["services"].values()
    given += [shlex.split(service["command"]) for service in services if isinstance(service.get("command"), str)]
    commands = [words[1:] for words in given if words[0] == "deal"]
    assert len(commands) >= 2
    for words in commands:
        command = get_command(app)
        while hasattr(command, "commands"):
            command = command.commands[words.pop(0)]
        command.make_context("deal", words)  # raises UsageError


@pytest.mark.skipif(shutil.which("kustomize") is None, reason="kustomize is not installed")
def test_an_overlay_changes_images_and_sizes_and_nothing_else() -> None:
    folder = INFRA / "kubernetes" / "overlay.example"
    done = subprocess.run(["kustomize", "build", str(folder)], capture_output=True, text=True, check=True)
    made = {(each["kind"], each["metadata"]["name"]): each for each in yaml.safe_load_all(done.stdout)}
    expected = {(each["kind"], each["metadata"]["name"]): each for each in documents("base/deal.yaml")}
    for name, document in made.items():
        kubernetes_validate.validate(document, "1.32", strict=True)
        if "template" in document.get("spec", {}):
            (theirs,), (ours,) = (pod["spec"]["template"]["spec"]["containers"] for pod in (document, expected[name]))
            assert theirs["image"] == "registry.example.com/deal-worker:cpu-0.3.0"
            theirs["image"] = ours["image"]
    claim = made["PersistentVolumeClaim", "deal-home"]["spec"]
    assert (claim.pop("storageClassName"), claim["resources"]["requests"]["storage"]) == ("shared-files", "1Ti")
    claim["resources"]["requests"]["storage"] = "200Gi"
    limits = made["Deployment", "worker-cpu"]["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert limits == {"memory": "8Gi"}
    limits["memory"] = "4Gi"
    assert made == expected


def test_pods_have_no_more_rights_than_the_namespace_allows() -> None:
    kinds = ("Deployment", "Job")
    pods = [each["spec"]["template"]["spec"] for each in documents("base/deal.yaml") if each["kind"] in kinds]
    assert len(pods) == 3
    for pod in pods:
        assert pod["securityContext"]["runAsNonRoot"] is True
        for container in pod["containers"]:
            assert container["securityContext"]["capabilities"]["drop"] == ["ALL"]
            assert {"requests", "limits"} <= container["resources"].keys()


def test_compose_fits_its_schema() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(COMPOSE)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_service_of_compose_logs_without_end() -> None:
    services = yaml.safe_load(COMPOSE.read_text())["services"]
    assert [name for name, service in services.items() if "max-size" not in service["logging"]["options"]] == []


def test_compose_publishes_on_loopback_and_names_every_secret() -> None:
    text = COMPOSE.read_text()
    services = yaml.safe_load(text)["services"]
    ports = [port for service in services.values() for port in service.get("ports", [])]
    assert ports and all(port.startswith("127.0.0.1:") for port in ports)
    no_secrets = {"DEAL_POOL_TYPE", "PREFECT_UI_API_URL", "PREFECT_UI_URL", "TORCH_INDEX"}
    wanted = set(re.findall(r"\$\{(\w+)", text)) - no_secrets
    example = (INFRA / "docker" / "env.example").read_text()
    assert wanted == {line.split("=")[0] for line in example.splitlines() if "=" in line and not line.startswith("#")}


def test_images_get_what_they_copy_and_no_secret(tmp_path: Path) -> None:
    copied = [
        source
        for path in (INFRA / "docker").glob("*ockerfile")
        for line in re.findall(r"^COPY (?!--from)(.+)", path.read_text(), re.MULTILINE)
        for source in line.split()[:-1]
    ]
    patterns = (INFRA.parent / ".dockerignore").read_text().splitlines()
    sent = exclude_paths(str(INFRA.parent), patterns)
    assert set(copied) <= sent
    packages = tomllib.loads((INFRA.parent / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert {name.partition(".")[0] for name in packages} <= set(copied), "the wheel is built from them"
    secrets = (".env", "infra/docker/.env", "flows/.env.local", "infra/kubernetes/secrets.yaml", "deal-home/stack.json")
    for name in secrets:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("secret")
    assert not exclude_paths(str(tmp_path), patterns) & set(secrets)


def test_prefects_server_removes_old_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    compose = yaml.safe_load(COMPOSE.read_text())["services"]["prefect"]["environment"]
    (values,) = documents("prefect-server-values.yaml")
    for environment in (compose, {each["name"]: each["value"] for each in values["server"]["env"]}):
        with monkeypatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            assert {"events", "flow_runs"} <= ServerServicesDBVacuumSettings().enabled_vacuum_types


def test_prefects_server_keeps_what_its_pod_may_not_lose() -> None:
    (values,) = documents("prefect-server-values.yaml")
    (claim,) = documents("prefect-home.yaml")
    (volume,), (mount,) = values["server"]["extraVolumes"], values["server"]["extraVolumeMounts"]
    assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert (volume["name"], mount["mountPath"]) == (mount["name"], "/home/prefect/.prefect"), "the image's PREFECT_HOME"
    assert values["server"]["updateStrategy"]["type"] == "Recreate", "a second pod would never get the volume"
    assert values["postgresql"]["primary"]["persistence"]["enabled"] is True


def test_the_secrets_of_prefects_server_are_shown_with_the_keys_that_its_chart_reads() -> None:
    (values,) = documents("prefect-server-values.yaml")
    shown = {each["metadata"]["name"]: each for each in documents("secrets.example.yaml")}
    wanted = {
        values["server"]["basicAuth"]["existingSecret"]: {"auth-string"},
        values["postgresql"]["auth"]["existingSecret"]: {"connection-string", "password"},
    }
    assert {name: shown[name]["stringData"].keys() for name in wanted} == wanted
    namespaces = {shown[name]["metadata"]["namespace"] for name in wanted}
    assert namespaces == {documents("prefect-home.yaml")[0]["metadata"]["namespace"]} == {"prefect"}


def test_no_secret_of_the_example_looks_as_if_it_could_stay() -> None:
    lines = (INFRA / "docker" / "env.example").read_text().splitlines()
    values = dict(line.split("=") for line in lines if not line.startswith("#"))
    assert {name for name, value in values.items() if "change-me" not in value} == {"MLFLOW_ADMIN_USERNAME"}
    assert len(set(values.values())) == len(values)


def test_workers_wait_for_the_pool_that_the_deploy_makes() -> None:
    commands = [
        container["args"]
        for each in documents("base/deal.yaml")
        if each["kind"] == "Deployment"
        for container in each["spec"]["template"]["spec"]["containers"]
    ]
    commands.append((INFRA / "docker" / "Dockerfile").read_text().partition("CMD")[2].split())
    assert len(commands) == 3 and all("--no-create-pool-if-not-found" in command for command in commands)


def test_images_are_pinned_and_run_as_nobody_special() -> None:
    for path in sorted((INFRA / "docker").glob("*ockerfile")):
        text = path.read_text()
        assert re.search(r"^FROM \S+:\d+\.\d+\.\d+\S*", text, re.MULTILINE), path
        assert re.search(r"^USER (?!root)\w+", text, re.MULTILINE), path
    images = [service["image"] for service in yaml.safe_load(COMPOSE.read_text())["services"].values()]
    assert all(":" in image and not image.endswith(":latest") for image in images)


def test_mlflow_is_started_with_no_password_among_the_arguments(tmp_path: Path) -> None:
    stand_in = tmp_path / "mlflow"
    stand_in.write_text('#!/bin/sh\necho "$@"\n')
    stand_in.chmod(0o755)
    names = ("BACKEND_STORE_URI", "AUTH_DATABASE_URI", "ADMIN_USERNAME", "ADMIN_PASSWORD", "ARTIFACTS_DESTINATION")
    environment = {f"MLFLOW_{name}": "secret-50%" for name in names}
    environment |= {"HOME": str(tmp_path), "PATH": f"{tmp_path}:/usr/bin:/bin"}

    def start(environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
        script = ["sh", str(INFRA / "docker" / "mlflow-start.sh")]
        return subprocess.run(script, env=environment, capture_output=True, text=True, check=False)

    done = start(environment)
    assert done.stdout.startswith("server --app-name basic-auth") and "secret" not in done.stdout, done.stderr
    written = configparser.ConfigParser()  # MLflow reads the file with interpolation
    written.read(tmp_path / "auth.ini")
    assert {name: written["mlflow"][name] for name in ("admin_username", "admin_password", "database_uri")} == {
        "admin_username": "secret-50%",
        "admin_password": "secret-50%",
        "database_uri": "secret-50%",
    }
    del environment["MLFLOW_BACKEND_STORE_URI"]
    assert start(environment).returncode != 0, "MLflow would take a file of its own"


def test_the_buckets_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one-shot container runs at every start of the stack."""
    service = yaml.safe_load(COMPOSE.read_text())["services"]["buckets"]
    program, *arguments = service["command"].split()
    assert program == "python" and arguments[-2:] == ["deal", "mlflow"] and service["restart"] == "no"
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    keys = {"DEAL_S3_ACCESS_KEY_ID": "somebody", "DEAL_S3_SECRET_ACCESS_KEY": "secret"}
    ours = {"DEAL_S3_ENDPOINT_URL": f"http://{host}:{port}", "DEAL_S3_REGION": "us-east-1", **keys}
    assert ours.keys() <= service["environment"].keys()
    for name, value in ours.items():
        monkeypatch.setenv(name, value)
    try:
        client = make_client(StoreSettings())
        client.create_bucket(Bucket="mlflow")
        client.put_object(Bucket="mlflow", Key="model", Body=b"kept")
        before = {bucket["Name"] for bucket in client.list_buckets()["Buckets"]}  # all moto servers share their buckets
        for _ in range(2):
            subprocess.run([sys.executable, *arguments], cwd=INFRA.parent, check=True)
        assert {bucket["Name"] for bucket in client.list_buckets()["Buckets"]} == {*before, "deal"}
        assert client.get_object(Bucket="mlflow", Key="model")["Body"].read() == b"kept"
    finally:
        server.stop()


def test_no_image_of_compose_is_one_that_is_gone() -> None:
    compose = yaml.safe_load(COMPOSE.read_text())
    pulled = {service["image"] for service in compose["services"].values() if "build" not in service}
    for path in (INFRA / "docker").glob("*ockerfile"):
        pulled |= set(re.findall(r"^FROM (\S+)", path.read_text(), re.MULTILINE))
    assert not [image for image in pulled if image.startswith("minio/")]
    page = (INFRA.parent / "docs" / "compose.md").read_text()
    assert [image for image in sorted(pulled) if f"| `{image}` |" not in page] == [], "the page says when it was seen"


def test_the_store_has_no_key_that_all_know_and_keeps_its_rows() -> None:
    compose = yaml.safe_load(COMPOSE.read_text())
    store, volumes = compose["services"]["store"], compose["volumes"]
    assert {store["environment"][f"RUSTFS_{name}"].partition(":?")[1] for name in ("ACCESS_KEY", "SECRET_KEY")} == {
        ":?"
    }
    (mount,) = store["volumes"]
    assert mount.split(":") == ["store", store["environment"]["RUSTFS_VOLUMES"]] and "store" in volumes
    for name in ("buckets", "mlflow", "worker-cpu"):
        text = json.dumps(compose["services"][name]["environment"])
        assert "http://store:9000" in text and "STORE_SECRET_KEY" in text
