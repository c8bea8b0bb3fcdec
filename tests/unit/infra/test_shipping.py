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

from deal_pipeline.cli.app import app
from deal_pipeline.server.deploy import require_values, variables_of

INFRA = Path(__file__).parents[3] / "infra"
COMPOSE = INFRA / "docker" / "compose.yaml"
COMPOSE_GPU = INFRA / "docker" / "compose.gpu.yaml"
PARTS = ("base/deal.yaml", "front/front.yaml", "engine/engine.yaml")
MANIFESTS = (*PARTS, "prefect-home.yaml", "secrets.example.yaml")
KINDS_OF_PODS = ("Deployment", "StatefulSet")
SECRET = re.compile(r"<(\w+)>")
"""A value by which the tests see where a secret goes."""
NO_SECRETS = {"DEAL_SERVE_BASE", "MLFLOW_ADMIN_USERNAME", "MLFLOW_WORKER_USERNAME"}
needs_compose = pytest.mark.skipif(
    shutil.which("docker") is None
    or subprocess.run(["docker", "compose", "version"], capture_output=True, check=False).returncode != 0,
    reason="Docker Compose is not installed (apt-get install docker-cli docker-compose)",
)
needs_kustomize = pytest.mark.skipif(shutil.which("kustomize") is None, reason="kustomize is not installed")


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((INFRA / "kubernetes" / name).read_text()))


def named(name: str) -> dict[tuple[str, str], dict[str, Any]]:
    return {(each["kind"], each["metadata"]["name"]): each for each in documents(name)}


def pods() -> list[dict[str, Any]]:
    parts = [document for name in PARTS for document in documents(name)]
    return [each["spec"]["template"]["spec"] for each in parts if each["kind"] in KINDS_OF_PODS]


def containers(pod: dict[str, Any]) -> list[dict[str, Any]]:
    return [*pod.get("initContainers", ()), *pod["containers"]]


def built(folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """What kustomize makes of a folder."""
    done = subprocess.run(["kustomize", "build", str(folder)], capture_output=True, text=True, check=True)
    return {(each["kind"], each["metadata"]["name"]): each for each in yaml.safe_load_all(done.stdout)}


def overlay(tmp_path: Path, *components: str) -> Path:
    """An overlay of the base with these components."""
    shutil.copytree(INFRA / "kubernetes", tmp_path, dirs_exist_ok=True)
    folder = tmp_path / "overlay"
    folder.mkdir()
    content = {"resources": ["../base"], "components": [f"../{name}" for name in components]}
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(content))
    return folder


@pytest.mark.parametrize("name", MANIFESTS)
def test_kubernetes_takes_the_manifests(name: str) -> None:
    for document in documents(name):
        kubernetes_validate.validate(document, "1.32", strict=True)


def test_every_container_is_given_a_command_that_there_is() -> None:
    given = [container["args"] for pod in pods() for container in containers(pod)]
    services = [service for file in (COMPOSE, COMPOSE_GPU) for service in services_of(file).values()]
    given += [shlex.split(service["command"]) for service in services if isinstance(service.get("command"), str)]
    commands = [words[1:] for words in given if words[0] == "deal"]
    assert sorted(words[0] for words in commands) == ["serve", "serve", "serve", "server", "server"]
    for words in commands:
        command = get_command(app)
        while hasattr(command, "commands"):
            command = command.commands[words.pop(0)]
        command.make_context("deal", words)  # raises UsageError


def test_pods_have_no_more_rights_than_the_namespace_allows() -> None:
    assert len(pods()) == 4
    for pod in pods():
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in containers(pod):
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"]["drop"] == ["ALL"]
            assert {"requests", "limits"} <= container["resources"].keys()


@pytest.mark.parametrize("file", [COMPOSE, COMPOSE_GPU], ids=lambda file: file.name)
def test_compose_fits_its_schema(file: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(file)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_service_of_compose_logs_without_end() -> None:
    services = services_of(COMPOSE) | {"engine": services_of(COMPOSE_GPU)["engine"]}
    assert [name for name, service in services.items() if "max-size" not in service["logging"]["options"]] == []


def test_no_service_of_compose_has_failed_while_a_slow_machine_starts_it() -> None:
    """Compose gives up `up` when a service that others wait for is unhealthy."""
    services = [service for file in (COMPOSE, COMPOSE_GPU) for service in services_of(file).values()]
    checks = [service["healthcheck"] for service in services if "healthcheck" in service]
    assert len(checks) == 6 and all(int(check["start_period"].removesuffix("m")) >= 15 for check in checks)


def test_compose_publishes_on_loopback_and_names_every_secret() -> None:
    text = COMPOSE.read_text() + COMPOSE_GPU.read_text()
    services = [*services_of(COMPOSE).values(), *services_of(COMPOSE_GPU).values()]
    ports = [port for service in services for port in service.get("ports", [])]
    assert ports and all(port.startswith("127.0.0.1:") for port in ports)
    optional = {"DEAL_POOL_TYPE", "PREFECT_UI_API_URL", "PREFECT_UI_URL", "TORCH_INDEX", "DEAL_LINEAGE", "HF_TOKEN"}
    optional |= {"DEAL_LOG_PREDICTIONS", "DEAL_SERVE_GPU", "DEAL_TRAIN_GPU", "DEAL_SERVE_MAX_LORA_RANK"}
    optional |= {"DEAL_WEBHOOK_URL", "DEAL_WEBHOOK_SECRET"}
    wanted = set(re.findall(r"(?<!\$)\$\{(\w+)", text)) - optional
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
    compose = services_of(COMPOSE)["prefect"]["environment"]
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
    values = dict(line.split("=") for line in lines if line and not line.startswith("#"))
    assert {name for name, value in values.items() if "change-me" not in value} == NO_SECRETS
    assert len(set(values.values())) == len(values)


def test_images_are_pinned_and_run_as_nobody_special() -> None:
    for path in sorted((INFRA / "docker").glob("*ockerfile")):
        text = path.read_text()
        assert re.search(r"^FROM \S+:\d+\.\d+\.\d+\S*", text, re.MULTILINE), path
        assert re.search(r"^USER (?!root)\w+", text, re.MULTILINE), path
    images = [service["image"] for service in compose_services().values()]
    assert all(":" in image and not image.endswith(":latest") for image in images)


def test_mlflow_is_started_with_no_password_among_the_arguments(tmp_path: Path) -> None:
    stand_in = tmp_path / "mlflow"
    stand_in.write_text('#!/bin/sh\necho "$@"\n')
    stand_in.chmod(0o755)
    python = tmp_path / "python"  # the workers' user is made in the test of the containers
    python.write_text("#!/bin/sh\n")
    python.chmod(0o755)
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


def test_the_store_has_no_key_that_all_know_and_keeps_its_rows() -> None:
    compose = yaml.safe_load(COMPOSE.read_text())
    store, volumes = compose["services"]["store"], compose["volumes"]
    assert {store["environment"][f"RUSTFS_{name}"].partition(":?")[1] for name in ("ACCESS_KEY", "SECRET_KEY")} == {
        ":?"
    }
    (mount,) = store["volumes"]
    assert mount.split(":") == ["store", store["environment"]["RUSTFS_VOLUMES"]] and "store" in volumes


def services_of(file: Path) -> dict[str, Any]:
    return dict(yaml.safe_load(file.read_text())["services"])


def compose_services() -> dict[str, Any]:
    """The services of both files. Of one that stands in both, environments are merged, and other values replaced."""
    services = services_of(COMPOSE)
    for name, added in services_of(COMPOSE_GPU).items():
        before = services.get(name, {})
        merged = {"environment": {**before.get("environment", {}), **added.get("environment", {})}}
        services[name] = {**before, **added, **merged}
    return services


STORE = {"STORE_WORKER_ACCESS_KEY", "STORE_WORKER_SECRET_KEY"}
FRONT = {"STORE_FRONT_ACCESS_KEY", "STORE_FRONT_SECRET_KEY", "DEAL_SERVE_API_KEY", "HF_TOKEN"}
WORKER = {*STORE, "PREFECT_AUTH", "MLFLOW_WORKER_PASSWORD", "HF_TOKEN", "DEAL_WEBHOOK_URL", "DEAL_WEBHOOK_SECRET"}
SECRETS_OF_SERVICES = {
    "postgres": {"POSTGRES_PASSWORD"},
    "store": {"STORE_ACCESS_KEY", "STORE_SECRET_KEY"},
    "buckets": {
        f"STORE_{user}{key}" for user in ("", "WORKER_", "FRONT_", "MLFLOW_") for key in ("ACCESS_KEY", "SECRET_KEY")
    },
    "prefect": {"POSTGRES_PASSWORD", "PREFECT_AUTH"},
    "mlflow": {
        "POSTGRES_PASSWORD",
        "STORE_MLFLOW_ACCESS_KEY",
        "STORE_MLFLOW_SECRET_KEY",
        "MLFLOW_ADMIN_PASSWORD",
        "MLFLOW_WORKER_PASSWORD",
        "MLFLOW_SECRET_KEY",
    },
    "deploy": {*STORE, "PREFECT_AUTH"},
    "worker-cpu": WORKER,
    "worker-gpu": WORKER,
    "front": FRONT,
}


@needs_compose
@pytest.mark.parametrize("files", [(COMPOSE,), (COMPOSE, COMPOSE_GPU)], ids=["cpu", "gpu"])
def test_each_service_of_compose_has_the_secrets_that_it_needs_alone(files: tuple[Path, ...], tmp_path: Path) -> None:
    example = (INFRA / "docker" / "env.example").read_text()
    names = {*re.findall(r"^(\w+)=", example, re.MULTILINE)} - NO_SECRETS
    names |= {"HF_TOKEN", "DEAL_WEBHOOK_URL", "DEAL_WEBHOOK_SECRET"}
    environment = tmp_path / "env"
    environment.write_text(
        "".join([*(f"{name}=<{name}>\n" for name in names), *(f"{name}=x\n" for name in NO_SECRETS)])
    )
    arguments = [word for file in files for word in ("--file", str(file))]
    command = ["docker", "compose", "--env-file", str(environment), *arguments, "--profile", "serve", "config"]
    done = subprocess.run([*command, "--format", "json"], capture_output=True, text=True, check=True)
    text = {name: json.dumps(each, ensure_ascii=False) for name, each in json.loads(done.stdout)["services"].items()}
    expected = dict(SECRETS_OF_SERVICES)
    if COMPOSE_GPU in files:
        expected |= {"front": {*FRONT, "DEAL_ENGINE_API_KEY"}, "engine": {"DEAL_ENGINE_API_KEY", "HF_TOKEN"}}
    assert {name: {*SECRET.findall(each)} for name, each in text.items()} == expected


@needs_kustomize
def test_each_container_of_kubernetes_has_the_secrets_that_it_needs_alone(tmp_path: Path) -> None:
    shown = {each["metadata"]["name"]: {*each["stringData"]} for each in documents("secrets.example.yaml")}

    def secrets_of(container: dict[str, Any]) -> set[tuple[str, str]]:
        whole = [each["secretRef"]["name"] for each in container.get("envFrom", ()) if "secretRef" in each]
        pairs = [(name, key) for name in whole for key in shown[name]]
        parts = [each.get("valueFrom", {}).get("secretKeyRef") for each in container.get("env", ())]
        return {*pairs, *((part["name"], part["key"]) for part in parts if part)}

    def listed(secret: str, keys: set[str]) -> set[tuple[str, str]]:
        return {(secret, key) for key in keys}

    store = {"DEAL_STORE_URI", "DEAL_S3_REGION", "DEAL_S3_ACCESS_KEY_ID", "DEAL_S3_SECRET_ACCESS_KEY"}
    launcher = {"PREFECT_API_URL", "PREFECT_API_AUTH_STRING"}
    tracking = {"MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"}
    others = {"PREFECT_UI_URL", "DEAL_LANDING_QUEUE_URL", "HF_TOKEN", "DEAL_WEBHOOK_URL", "DEAL_WEBHOOK_SECRET"}
    worker = listed("deal-secrets", {*store, *launcher, *tracking, *others})
    front = listed("deal-front", {*store, "DEAL_SERVE_API_KEY", "HF_TOKEN"})
    engine_key = listed("deal-engine", {"DEAL_ENGINE_API_KEY"})
    expected = {
        ("worker-gpu", "worker"): listed("deal-secrets", launcher),
        ("worker-cpu", "register"): worker,
        ("worker-cpu", "worker"): worker,
        ("front", "front"): front,
    }
    for components in (("front",), ("front", "engine")):
        made = built(overlay(tmp_path / "-".join(components), *components))
        found = {
            (name, container["name"]): secrets_of(container)
            for (kind, name), document in made.items()
            if kind in KINDS_OF_PODS
            for container in containers(document["spec"]["template"]["spec"])
        }
        if "engine" in components:
            expected["front", "front"] = front | engine_key
            expected["engine", "engine"] = engine_key | listed("deal-engine", {"HF_TOKEN"})
        assert found == expected


def test_a_front_without_an_engine_answers_itself() -> None:
    made = named("front/front.yaml")
    (front,) = made["Deployment", "front"]["spec"]["template"]["spec"]["containers"]
    text = json.dumps([front, *made.values()])
    assert "ENGINE" not in text and "engine-adapters" not in text
    assert "--engine" not in services_of(COMPOSE)["front"]["command"] and "engine" not in services_of(COMPOSE)


def test_only_the_front_reaches_the_engine_of_compose() -> None:
    services = compose_services()
    engine, front = services["engine"], services["front"]
    assert "ports" not in engine and engine["networks"] == ["engine"]
    reaching = [name for name, service in services.items() if "engine" in service.get("networks", [])]
    assert reaching == ["front", "engine"]
    assert engine["environment"]["VLLM_API_KEY"] == front["environment"]["DEAL_ENGINE_API_KEY"]
    assert "--engine http://engine:8000" in front["command"] and "--port=8000" in engine["command"]
    for service in (engine, front):
        assert service["restart"] == "unless-stopped" and "test" in service["healthcheck"]
        assert "memory" in service["deploy"]["resources"]["limits"]
    others = {"serve", "engine"}
    assert {name for name, service in services.items() if others & {*service.get("networks", ())}} == {
        "front",
        "engine",
        "store",
    }, "the front reaches the store and the engine alone"


def start_engine(tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Start the engine of Compose with a program that prints its arguments in place of vLLM."""
    stand_in = tmp_path / "vllm"
    stand_in.write_text('#!/bin/sh\necho "$VLLM_ALLOW_RUNTIME_LORA_UPDATING" "$@"\n')
    stand_in.chmod(0o755)
    engine = compose_services()["engine"]

    def filled(text: str) -> str:
        text = re.sub(
            r"(?<!\$)\$\{(\w+)(?::-(.*?))?\}", lambda found: environment.get(found[1]) or found[2] or "", text
        )
        return text.replace("$$", "$")

    return subprocess.run(
        [*map(filled, engine["entrypoint"]), *map(filled, engine["command"])],
        env={
            "PATH": f"{tmp_path}:/usr/bin:/bin",
            **{name: filled(value) for name, value in engine["environment"].items()},
        },
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_engine_of_compose_starts_with_a_key_and_a_base_model_alone(tmp_path: Path) -> None:
    done = start_engine(tmp_path, DEAL_ENGINE_API_KEY="secret-1", DEAL_SERVE_BASE="some/model")
    assert done.stdout.startswith("True serve some/model --enable-lora --max-lora-rank=16 "), done.stderr
    assert "secret-1" not in done.stdout
    for name, given in (
        ("DEAL_ENGINE_API_KEY", {"DEAL_SERVE_BASE": "some/model"}),
        ("DEAL_SERVE_BASE", {"DEAL_ENGINE_API_KEY": "secret-1"}),
    ):
        refused = start_engine(tmp_path, **given)
        assert refused.returncode != 0 and refused.stdout == "" and name in refused.stderr


def test_the_front_of_kubernetes_reaches_every_engine_and_nobody_else_does() -> None:
    made = named("engine/engine.yaml") | named("front/front.yaml")
    engine, front = made["StatefulSet", "engine"]["spec"], made["Deployment", "front"]["spec"]
    values = made["ConfigMap", "deal-engine"]["data"]
    service = made["Service", "engine"]
    port = service["spec"]["ports"][0]["port"]
    name = service["metadata"]["name"]
    addresses = [f"http://{name}-{number}.{engine['serviceName']}:{port}" for number in range(engine["replicas"])]
    assert values["DEAL_ENGINE_URL"].split() == addresses
    assert service["spec"]["clusterIP"] == "None" and engine["serviceName"] == name, "names that last"
    policy = made["NetworkPolicy", "engine"]["spec"]
    labels = {kind: spec["template"]["metadata"]["labels"] for kind, spec in (("engine", engine), ("front", front))}
    assert policy["podSelector"]["matchLabels"] == service["spec"]["selector"] == labels["engine"]
    assert policy["ingress"] == [
        {"from": [{"podSelector": {"matchLabels": labels["front"]}}], "ports": [{"port": port}]}
    ]
    assert f"--port={port}" in engine["template"]["spec"]["containers"][0]["args"]


@needs_kustomize
def test_the_engines_of_kubernetes_read_adapters_where_the_front_writes_them(tmp_path: Path) -> None:
    made = built(overlay(tmp_path, "front", "engine"))
    mounted = {}
    for kind, name in (("StatefulSet", "engine"), ("Deployment", "front")):
        pod = made[kind, name]["spec"]["template"]["spec"]
        claims = {
            each["name"]: each["persistentVolumeClaim"]["claimName"]
            for each in pod["volumes"]
            if "persistentVolumeClaim" in each
        }
        (mount,) = [
            mount for mount in pod["containers"][0]["volumeMounts"] if claims.get(mount["name"]) == "engine-adapters"
        ]
        mounted[name] = mount
    assert mounted["engine"]["mountPath"] == mounted["front"]["mountPath"] == "/var/lib/deal/engine-adapters"
    assert mounted["engine"]["readOnly"] is True and "readOnly" not in mounted["front"]
    assert made["PersistentVolumeClaim", "engine-adapters"]["spec"]["accessModes"] == ["ReadWriteMany"]


@needs_kustomize
def test_the_overlay_changes_sizes_and_its_lines_add_front_and_engines(tmp_path: Path) -> None:
    folder = tmp_path / "kubernetes"
    shutil.copytree(INFRA / "kubernetes", folder)
    file = folder / "overlay.example" / "kustomization.yaml"
    text, _, added = file.read_text().partition("# For deal serve")
    _, component, *patches = [line.removeprefix("# ") for line in added.splitlines()]
    file.write_text("\n".join([text + "\n".join(patches), component, ""]))
    made = built(file.parent)
    for document in made.values():
        kubernetes_validate.validate(document, "1.32", strict=True)
    assert made.keys() == {key for name in PARTS for key in named(name)}
    ours = [document["spec"]["template"]["spec"] for (kind, _), document in made.items() if kind == "Deployment"]
    images = {container["image"] for pod in ours for container in containers(pod)}
    assert images == {"registry.example.com/deal-worker:cpu-0.4.0"}
    claim = made["PersistentVolumeClaim", "deal-home"]["spec"]
    assert (claim["storageClassName"], claim["resources"]["requests"]["storage"]) == ("shared-files", "1Ti")
    pool = yaml.safe_load(made["ConfigMap", "deal-pool"]["data"]["pool.yaml"])
    require_values(pool, variables_of("kubernetes"))
    replicas = made["StatefulSet", "engine"]["spec"]["replicas"]
    addresses = [f"http://engine-{number}.engine:8000" for number in range(replicas)]
    assert replicas == 2 and made["ConfigMap", "deal-engine"]["data"]["DEAL_ENGINE_URL"].split() == addresses
