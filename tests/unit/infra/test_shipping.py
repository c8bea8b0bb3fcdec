"""What the project ships for Docker and Kubernetes, held against their schemas; it is not run here."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

INFRA = Path(__file__).parents[3] / "infra"
COMPOSE = INFRA / "docker" / "compose.yaml"
MANIFESTS = ("deal.yaml", "secrets.example.yaml")


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((INFRA / "kubernetes" / name).read_text()))


@pytest.mark.parametrize("name", MANIFESTS)
def test_kubernetes_takes_the_manifests(name: str) -> None:
    for document in documents(name):
        kubernetes_validate.validate(document, "1.32", strict=True)


def test_pods_have_no_more_rights_than_the_namespace_allows() -> None:
    kinds = ("Deployment", "Job")
    pods = [each["spec"]["template"]["spec"] for each in documents("deal.yaml") if each["kind"] in kinds]
    assert len(pods) == 3
    for pod in pods:
        assert pod["securityContext"]["runAsNonRoot"] is True
        for container in pod["containers"]:
            assert container["securityContext"]["capabilities"]["drop"] == ["ALL"]
            assert {"requests", "limits"} <= container["resources"].keys()


def test_compose_fits_its_schema() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(COMPOSE)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_compose_publishes_on_loopback_and_names_every_secret() -> None:
    text = COMPOSE.read_text()
    services = yaml.safe_load(text)["services"]
    ports = [port for service in services.values() for port in service.get("ports", [])]
    assert ports and all(port.startswith("127.0.0.1:") for port in ports)
    wanted = set(re.findall(r"\$\{(\w+)", text)) - {"TORCH_INDEX", "PREFECT_UI_API_URL"}
    example = (INFRA / "docker" / "env.example").read_text()
    assert wanted == {line.split("=")[0] for line in example.splitlines() if "=" in line and not line.startswith("#")}


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
    environment = {f"MLFLOW_{name}": "secret" for name in names}
    environment |= {"HOME": str(tmp_path), "PATH": f"{tmp_path}:/usr/bin:/bin"}

    def start(environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
        script = ["sh", str(INFRA / "docker" / "mlflow-start.sh")]
        return subprocess.run(script, env=environment, capture_output=True, text=True, check=False)

    done = start(environment)
    assert done.stdout.startswith("server --app-name basic-auth") and "secret" not in done.stdout, done.stderr
    del environment["MLFLOW_BACKEND_STORE_URI"]
    assert start(environment).returncode != 0, "MLflow would take a file of its own"
