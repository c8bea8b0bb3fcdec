"""The templates of the work pools: the configuration that Prefect makes of them, and that Kubernetes accepts it."""

from __future__ import annotations

import asyncio
import json
import uuid
from typing import Any

import kubernetes_validate
import pytest
from jsonschema import Draft202012Validator
from prefect.client.schemas.objects import FlowRun
from prefect.workers.process import ProcessJobConfiguration
from prefect_docker.worker import DockerWorkerJobConfiguration
from prefect_kubernetes.worker import KubernetesWorkerJobConfiguration

from deal_pipeline.server.deploy import pool_template, with_defaults_of

CONFIGURATIONS: dict[str, Any] = {
    "process": ProcessJobConfiguration,
    "docker": DockerWorkerJobConfiguration,
    "kubernetes": KubernetesWorkerJobConfiguration,
}

pytestmark = pytest.mark.usefixtures("prefect_api")


def configuration(name: str, **values: Any) -> Any:
    made = asyncio.run(CONFIGURATIONS[name].from_template_and_values(pool_template(name), values))
    made.prepare_for_flow_run(FlowRun(id=uuid.uuid4(), flow_id=uuid.uuid4(), name="adapt"))
    return made


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_variables_are_a_schema_and_their_defaults_fit(name: str) -> None:
    schema = pool_template(name)["variables"]
    Draft202012Validator.check_schema(schema)
    given = {key: value.get("default") for key, value in schema["properties"].items()}
    defaults = {key: value for key, value in given.items() if value is not None}
    assert list(Draft202012Validator(schema).iter_errors(defaults)) == []
    assert configuration(name, env={"A": "1"}).env["A"] == "1", "prefect.yaml names a run's variables"


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_every_placeholder_is_a_variable(name: str) -> None:
    found = pool_template(name)
    text = json.dumps(found["job_configuration"])
    used = {part.split("}}")[0].strip() for part in text.split("{{")[1:]}
    assert used == set(found["variables"]["properties"])


def test_a_new_template_keeps_what_a_person_has_set_in_the_pool() -> None:
    known = pool_template("kubernetes")
    variables = known["variables"]["properties"]
    variables["image"]["default"], variables["gpu_count"]["default"] = "registry.example/deal:7", 4
    variables["gone"] = {"type": "string", "default": "x"}
    del variables["shm_size"]
    known["job_configuration"] = {}
    made = with_defaults_of(known, pool_template("kubernetes"))
    expected = pool_template("kubernetes")
    expected["variables"]["properties"]["image"]["default"] = "registry.example/deal:7"
    expected["variables"]["properties"]["gpu_count"]["default"] = 4
    assert made == expected
    assert with_defaults_of({}, expected) == expected, "a pool without a template"


def test_kubernetes_takes_the_job() -> None:
    made = configuration("kubernetes", gpu_count=2, node_selector={"gpu": "h100"}, secret_name="ours")
    kubernetes_validate.validate(made.job_manifest, "1.32", strict=True)
    pod = made.job_manifest["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 2
    assert pod["nodeSelector"] == {"gpu": "h100"}
    assert container["envFrom"] == [{"secretRef": {"name": "ours"}}]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert {"name": "shm", "mountPath": "/dev/shm"} in container["volumeMounts"]


def test_docker_gets_its_gpus_and_shared_memory() -> None:
    one = {"Driver": "nvidia", "Count": 1, "Capabilities": [["gpu"]]}
    assert configuration("docker").container_create_kwargs["device_requests"] == [one]
    assert configuration("docker", device_requests=[]).container_create_kwargs.get("device_requests", []) == []
    made = configuration("docker", device_requests=[{**one, "Count": -1}], shm_size="8g")
    assert made.container_create_kwargs["device_requests"] == [{**one, "Count": -1}]
    assert made.container_create_kwargs["shm_size"] == "8g"
    assert made.image == "deal-worker:local"
