"""Trainings over several machines on Kubernetes: what `deal server manifest` writes fits the operators' schemas."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from jsonschema import Draft202012Validator
from typer.testing import CliRunner

from deal_core.errors import ConfigError
from deal_pipeline.cli.app import app
from deal_pipeline.server.deploy import (
    CLUSTER_JOBS,
    make_manifests,
    pool_template,
    require_values,
    variables_of,
    with_defaults,
)
from tests.in_process import put_back

SCHEMAS = json.loads((Path(__file__).parents[3] / "data" / "kubernetes_schemas.json").read_text())
KINDS: tuple[Any, ...] = ("train-job", "ray-cluster")
VALUES: dict[str, Any] = {
    "image": "registry.example/deal:7",
    "gpu_count": 8,
    "num_nodes": 3,
    "node_selector": {"gpu": "h100"},
    "tolerations": [{"key": "gpu", "operator": "Exists"}],
    "secret_name": "ours",
    "namespace": "team",
    "job": "runs/7",
    "scratch_size": "1Ti",
    "cpu_limit": "64",
}


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """Undo what a command sets in this process."""
    with put_back():
        yield


def named(kind: Any, values: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {each["kind"]: each for each in make_manifests(kind, values)}


def pods(kind: Any, values: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The templates of the pods that an operator makes of a manifest."""
    made = named(kind, values)
    if kind == "train-job":
        for job in made["TrainingRuntime"]["spec"]["template"]["spec"]["replicatedJobs"]:
            yield job["template"]["spec"]["template"]
        return
    spec = made["RayCluster"]["spec"]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        yield group["template"]


@pytest.mark.parametrize("values", [{"job": "runs/7"}, VALUES], ids=["defaults", "values"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_cluster_takes_the_manifests(kind: Any, values: dict[str, Any]) -> None:
    for document in make_manifests(kind, values):
        if document["kind"] in SCHEMAS:
            Draft202012Validator(SCHEMAS[document["kind"]]).validate(document)
        else:
            kubernetes_validate.validate(document, "1.32", strict=True)
    for pod in pods(kind, values):
        wrapped = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}, "template": pod}
        kubernetes_validate.validate(wrapped, "1.32", strict=True)


def test_a_job_of_the_runtime_is_one_of_kubernetes() -> None:
    (job,) = named("train-job", VALUES)["TrainingRuntime"]["spec"]["template"]["spec"]["replicatedJobs"]
    wrapped = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, "spec": job["template"]["spec"]}
    kubernetes_validate.validate(wrapped, "1.32", strict=True)
    # the operator finds the container of the training by these three names
    assert job["template"]["metadata"]["labels"] == {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
    assert job["name"] == "node" == job["template"]["spec"]["template"]["spec"]["containers"][0]["name"]


def test_a_train_job_starts_the_one_entry_on_every_machine() -> None:
    made = named("train-job", VALUES)
    spec = made["TrainJob"]["spec"]
    assert spec["runtimeRef"]["name"] == made["TrainingRuntime"]["metadata"]["name"]
    trainer = spec["trainer"]
    assert trainer["command"] == ["torchrun", "-m", "infra.stored_job", "runs/7"]
    assert (trainer["numNodes"], trainer["numProcPerNode"]) == (3, 8)
    assert trainer["resourcesPerNode"]["limits"] == {"cpu": "64", "memory": "32Gi", "nvidia.com/gpu": 8}


def test_a_ray_cluster_has_a_worker_for_each_machine_and_no_gpu_at_its_head() -> None:
    spec = named("ray-cluster", VALUES)["RayCluster"]["spec"]
    (head,) = spec["headGroupSpec"]["template"]["spec"]["containers"]
    (group,) = spec["workerGroupSpecs"]
    (worker,) = group["template"]["spec"]["containers"]
    assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (3, 3, 3)
    assert worker["resources"]["limits"]["nvidia.com/gpu"] == 8
    assert "nvidia.com/gpu" not in head["resources"]["limits"] and spec["headGroupSpec"]["rayStartParams"] == {
        "num-cpus": "0",
        "num-gpus": "0",
    }


def test_no_probe_of_a_ray_cluster_is_left_to_the_operator() -> None:
    """Those of KubeRay need wget, which the image lacks."""
    for pod in pods("ray-cluster", VALUES):
        (container,) = pod["spec"]["containers"]
        for name in ("readinessProbe", "livenessProbe"):
            assert container[name]["exec"]["command"][:2] == ["ray", "health-check"]


@pytest.mark.parametrize("kind", KINDS)
def test_values_reach_every_pod(kind: Any) -> None:
    for document in make_manifests(kind, VALUES):
        assert document["metadata"]["namespace"] == "team"
    for pod in pods(kind, VALUES):
        (container,) = pod["spec"]["containers"]
        assert container["image"] == "registry.example/deal:7"
        assert container["envFrom"] == [{"secretRef": {"name": "ours"}}]
        if container["name"] != "ray-head":
            assert pod["spec"]["nodeSelector"] == {"gpu": "h100"}
            assert pod["spec"]["tolerations"] == VALUES["tolerations"]


@pytest.mark.parametrize("kind", KINDS)
def test_no_pod_shares_a_volume_or_has_rights(kind: Any) -> None:
    for pod in pods(kind, VALUES):
        assert [each["emptyDir"]["sizeLimit"] for each in pod["spec"]["volumes"]] == ["2Gi", "1Ti"]
        assert pod["spec"]["securityContext"]["runAsNonRoot"] is True
        assert pod["spec"]["automountServiceAccountToken"] is False
        for container in pod["spec"]["containers"]:
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}


def test_only_the_namespace_and_the_operator_reach_a_ray_cluster() -> None:
    made = named("ray-cluster", VALUES)
    policy = made["NetworkPolicy"]["spec"]
    for pod in pods("ray-cluster", VALUES):
        assert policy["podSelector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
    (rule,) = policy["ingress"]
    assert policy["policyTypes"] == ["Ingress"] and {"podSelector": {}} in rule["from"]
    assert [each["podSelector"]["matchLabels"] for each in rule["from"] if "namespaceSelector" in each] == [
        {"app.kubernetes.io/name": "kuberay-operator"}
    ]


def test_values_are_the_pools_variables_and_must_fit() -> None:
    variables = variables_of("kubernetes")
    own = yaml.safe_load(CLUSTER_JOBS.read_text())["variables"]
    pool = pool_template("kubernetes")["variables"]["properties"]
    assert variables.keys() == pool.keys() | own.keys() and not pool.keys() & own.keys(), "one meaning for a name"
    with pytest.raises(ConfigError, match=r"There is no value 'gpus'; give some of: .*gpu_count"):
        require_values({"gpus": 8}, variables)
    with pytest.raises(ConfigError, match=r"The value gpu_count does not fit: -1 is less than the minimum of 0"):
        require_values({"gpu_count": -1}, variables)
    with pytest.raises(ConfigError, match=r"The value node_selector.gpu does not fit"):
        require_values({"node_selector": {"gpu": 1}}, variables)
    with pytest.raises(ConfigError, match="The value 'job' is missing: Prefix of a TrainJob's job in the store"):
        make_manifests("train-job", {})
    with pytest.raises(ConfigError, match="There is no value 'num_nodes'"):
        require_values({"num_nodes": 2}, variables_of("process"))


def test_values_become_the_pools_defaults() -> None:
    made = with_defaults(pool_template("kubernetes"), VALUES)["variables"]["properties"]
    plain = pool_template("kubernetes")["variables"]["properties"]
    changed = {name: made[name]["default"] for name in made if made[name] != plain[name]}
    assert changed == {name: value for name, value in VALUES.items() if name in plain}


def test_the_command_writes_what_kubectl_takes(tmp_path: Path) -> None:
    values, out = tmp_path / "pool.yaml", tmp_path / "ray.yaml"
    values.write_text(yaml.safe_dump(VALUES))
    given = ["server", "manifest", "ray-cluster", "--values", str(values), "--out", str(out), "--json"]
    done = CliRunner().invoke(app, given)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == {"file": str(out), "objects": ["RayCluster deal-ray", "NetworkPolicy deal-ray"]}
    assert list(yaml.safe_load_all(out.read_text())) == make_manifests("ray-cluster", VALUES)
