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
from flows.server.deploy import require_values, variables_of
from infra.settings import StoreSettings
from infra.store.s3 import make_client
from tests.s3 import ThreadedMotoServer

INFRA = Path(__file__).parents[3] / "infra"
COMPOSE = INFRA / "docker" / "compose.yaml"
MANIFESTS = ("base/deal.yaml", "serve/serve.yaml", "prefect-home.yaml", "secrets.example.yaml")
KINDS_OF_PODS = ("Deployment", "StatefulSet", "Job")


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((INFRA / "kubernetes" / name).read_text()))


def named(name: str) -> dict[tuple[str, str], dict[str, Any]]:
    return {(each["kind"], each["metadata"]["name"]): each for each in documents(name)}


def pods() -> list[dict[str, Any]]:
    both = [*documents("base/deal.yaml"), *documents("serve/serve.yaml")]
    return [each["spec"]["template"]["spec"] for each in both if each["kind"] in KINDS_OF_PODS]


@pytest.mark.parametrize("name", MANIFESTS)
def test_kubernetes_takes_the_manifests(name: str) -> None:
    for document in documents(name):
        kubernetes_validate.validate(document, "1.32", strict=True)


def test_every_container_is_given_a_command_that_there_is() -> None:
    given = [container["args"] for pod in pods() for container in pod["containers"]]
    services = yaml.safe_load(COMPOSE.read_text())["services"].values()
    given += [shlex.split(service["command"]) for service in services if isinstance(service.get("command"), str)]
    commands = [words[1:] for words in given if words[0] == "deal"]
    assert sorted(words[0] for words in commands) == ["serve", "serve", "server", "server"]
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
            assert theirs["image"] == "registry.example.com/deal-worker:cpu-0.4.0"
            theirs["image"] = ours["image"]
    claim = made["PersistentVolumeClaim", "deal-home"]["spec"]
    assert (claim.pop("storageClassName"), claim["resources"]["requests"]["storage"]) == ("shared-files", "1Ti")
    claim["resources"]["requests"]["storage"] = "200Gi"
    limits = made["Deployment", "worker-cpu"]["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert limits == {"memory": "8Gi"}
    limits["memory"] = "4Gi"
    values = yaml.safe_load(made["ConfigMap", "deal-pool"]["data"].pop("pool.yaml"))
    require_values(values, variables_of("kubernetes"))
    assert (
        values["gpu_count"] == 8 and yaml.safe_load(expected["ConfigMap", "deal-pool"]["data"].pop("pool.yaml")) == {}
    )
    assert made == expected


def test_pods_have_no_more_rights_than_the_namespace_allows() -> None:
    assert len(pods()) == 5
    for pod in pods():
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
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
    optional = {"DEAL_POOL_TYPE", "PREFECT_UI_API_URL", "PREFECT_UI_URL", "TORCH_INDEX", "DEAL_LINEAGE", "HF_TOKEN"}
    optional |= {"DEAL_LOG_PREDICTIONS", "DEAL_SERVE_GPU", "DEAL_SERVE_MAX_LORA_RANK"}
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
    values = dict(line.split("=") for line in lines if line and not line.startswith("#"))
    no_secrets = {"MLFLOW_ADMIN_USERNAME", "DEAL_SERVE_BASE"}
    assert {name for name, value in values.items() if "change-me" not in value} == no_secrets
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
    pages = "".join(path.read_text() for path in (INFRA.parent / "docs").glob("*.md"))
    assert [image for image in sorted(pulled) if f"| `{image}` |" not in pages] == [], "a page says when it was seen"


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


def compose_services() -> dict[str, Any]:
    return dict(yaml.safe_load(COMPOSE.read_text())["services"])


def test_a_stack_without_the_profile_starts_as_before() -> None:
    """Compose wants a value for ${NAME:?} of every service, whatever the profile."""
    services = compose_services()
    serving = {name: service for name, service in services.items() if "profiles" in service}
    assert {name: service["profiles"] for name, service in serving.items()} == {
        "front": ["serve"],
        "engine": ["serve"],
    }
    others = [service for name, service in services.items() if name not in serving]
    assert not [service for service in others if serving.keys() & service.get("depends_on", {}).keys()]
    required = re.compile(r"(?<!\$)\$\{(\w+):\?")
    needed = set(required.findall(json.dumps(list(serving.values()))))
    assert needed <= set(required.findall(json.dumps(others)))


def test_only_the_front_reaches_the_engine_of_compose() -> None:
    services = compose_services()
    engine, front = services["engine"], services["front"]
    assert "ports" not in engine and engine["networks"] == ["engine"]
    assert [name for name, service in services.items() if "engine" in service.get("networks", [])] == [
        "front",
        "engine",
    ]
    assert engine["environment"]["VLLM_API_KEY"] == front["environment"]["DEAL_ENGINE_API_KEY"]
    assert "--engine http://engine:8000" in front["command"] and "--port=8000" in engine["command"]
    for service in (engine, front):
        assert service["restart"] == "unless-stopped" and "test" in service["healthcheck"]
        assert "memory" in service["deploy"]["resources"]["limits"]
    secrets = {name for name in front["environment"] if "MLFLOW" in name or "PREFECT" in name}
    assert secrets == set(), "the front needs the store alone"


def test_the_engine_of_compose_reads_adapters_where_the_front_writes_them() -> None:
    services = compose_services()
    (home,) = services["front"]["volumes"]
    source, _, target = home.partition(":")
    dockerfile = (INFRA / "docker" / "Dockerfile").read_text()
    assert f"DEAL_HOME={target} DEAL_CACHE_DIR={target}/cache" in dockerfile
    made = re.findall(r"^.*install --directory.*$", dockerfile, re.MULTILINE)[0].split()
    mounts = {mount["target"]: mount for mount in services["engine"]["volumes"] if isinstance(mount, dict)}
    assert set(mounts) == {f"{target}/engine-adapters", f"{target}/cache"}, "the default of DEAL_ENGINE_ADAPTER_DIR"
    for path, mount in mounts.items():
        assert (mount["source"], mount["read_only"]) == (source, True)
        assert f"{target}/{mount['volume']['subpath']}" == path and path in made, "a part that is missing is no mount"
    assert "front" in services["engine"]["depends_on"], "the image of the front makes these folders"


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
    made = named("serve/serve.yaml")
    engine, front = made["StatefulSet", "engine"]["spec"], made["Deployment", "front"]["spec"]
    values = made["ConfigMap", "deal-serve"]["data"]
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


def test_the_engines_of_kubernetes_read_adapters_where_the_front_writes_them() -> None:
    made = named("serve/serve.yaml")
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


def test_the_front_of_kubernetes_has_its_secrets_and_answers_its_probes() -> None:
    made, secret = named("serve/serve.yaml"), named("secrets.example.yaml")["Secret", "deal-serve"]["stringData"]
    (engine,) = made["StatefulSet", "engine"]["spec"]["template"]["spec"]["containers"]
    (front,) = made["Deployment", "front"]["spec"]["template"]["spec"]["containers"]
    keys = {}
    for container in (engine, front):
        for each in container["env"]:
            if "secretKeyRef" in each.get("valueFrom", {}):
                assert each["valueFrom"]["secretKeyRef"]["name"] == "deal-serve"
                keys[each["name"]] = each["valueFrom"]["secretKeyRef"]["key"]
    assert keys["VLLM_API_KEY"] == keys["DEAL_ENGINE_API_KEY"] == "DEAL_ENGINE_API_KEY"
    assert set(keys.values()) == secret.keys()
    for name in ("startupProbe", "livenessProbe", "readinessProbe"):
        asked = front[name]["httpGet"]
        assert asked["path"] == "/health" and asked["httpHeaders"] == [{"name": "Host", "value": "localhost"}]
        assert engine[name]["httpGet"]["path"] == "/health"


@pytest.mark.skipif(shutil.which("kustomize") is None, reason="kustomize is not installed")
def test_the_lines_of_the_overlay_add_front_and_engines(tmp_path: Path) -> None:
    folder = tmp_path / "kubernetes"
    shutil.copytree(INFRA / "kubernetes", folder)
    file = folder / "overlay.example" / "kustomization.yaml"
    text, _, added = file.read_text().partition("# For deal serve")
    _, component, *patches = [line.removeprefix("# ") for line in added.splitlines()]
    file.write_text("\n".join([text + "\n".join(patches), component, ""]))
    done = subprocess.run(["kustomize", "build", str(file.parent)], capture_output=True, text=True, check=True)
    made = {(each["kind"], each["metadata"]["name"]): each for each in yaml.safe_load_all(done.stdout)}
    for document in made.values():
        kubernetes_validate.validate(document, "1.32", strict=True)
    assert made.keys() == named("base/deal.yaml").keys() | named("serve/serve.yaml").keys()
    (front,) = made["Deployment", "front"]["spec"]["template"]["spec"]["containers"]
    assert front["image"] == "registry.example.com/deal-worker:cpu-0.4.0"
    replicas = made["StatefulSet", "engine"]["spec"]["replicas"]
    addresses = [f"http://engine-{number}.engine:8000" for number in range(replicas)]
    assert replicas == 2 and made["ConfigMap", "deal-serve"]["data"]["DEAL_ENGINE_URL"].split() == addresses


def test_docker_and_kubernetes_start_one_release_of_vllm_with_the_same_options() -> None:
    ours = compose_services()["engine"]
    (theirs,) = named("serve/serve.yaml")["StatefulSet", "engine"]["spec"]["template"]["spec"]["containers"]
    assert ours["image"] == theirs["image"]
    assert ours["environment"]["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "True"
    assert {"name": "VLLM_ALLOW_RUNTIME_LORA_UPDATING", "value": "True"} in theirs["env"]

    def fixed(options: list[str]) -> list[str]:
        return [option for option in options if "$" not in option]

    assert fixed(ours["command"]) == fixed(theirs["args"])
