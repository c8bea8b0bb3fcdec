"""The driver of a job on a Ray cluster: `python -m infra.ray_driver PREFIX NUM_PROCESSES PROGRESS_FILE`.

The job is in the object store, see `infra.stored_job`. Ray Train starts the workers, and starts all of them again when
one has died; they go on from the last checkpoint. `TorchTrainer.fit` cannot be stopped from a thread, so the driver is
a process of its own. It ends with its standard input, and a driver that has ended takes its workers with it.
"""

from __future__ import annotations

import os
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

from deal_core.training.elastic import appending, end_with_input
from infra.ray_worker import work_for_ray
from infra.settings import LaunchSettings, StoreSettings

MAX_RESTARTS = 3
"""Times that the workers start again after one has died."""


def main(prefix: str, num_processes: int, progress: Path) -> None:
    """Run the workers to their end, and append their messages to a file."""
    import ray
    from ray.train import FailureConfig, RunConfig
    from ray.train.torch import TorchTrainer
    from ray.util.queue import Queue

    end_with_input()
    with appending(progress) as send, tempfile.TemporaryDirectory() as folder:
        _connect(num_processes)
        messages = Queue(actor_options={"num_cpus": 0})

        def pass_on() -> None:
            while (message := messages.get()) is not None:
                send(message)

        reader = threading.Thread(target=pass_on, daemon=True)
        reader.start()
        trainer = TorchTrainer(
            work_for_ray,
            train_loop_config={"prefix": prefix, "messages": messages},
            scaling_config=_scaling(num_processes),
            run_config=RunConfig(storage_path=folder, failure_config=FailureConfig(max_failures=MAX_RESTARTS)),
        )
        trainer.fit()
        messages.put(None)
        reader.join()
        ray.shutdown()


def _connect(num_processes: int) -> None:
    """Connect to the cluster of RAY_ADDRESS, or start one on this machine.

    Workers get the place of the store. Secrets are not sent: each node has them in its own environment.
    """
    import ray

    store = StoreSettings()
    places = {
        "DEAL_STORE_URI": store.store_uri,
        "DEAL_S3_ENDPOINT_URL": store.s3_endpoint_url,
        "DEAL_S3_REGION": store.s3_region,
    }
    environment = {"env_vars": {name: value for name, value in places.items() if value}}
    if address := os.environ.get("RAY_ADDRESS"):
        ray.init(address=address, runtime_env=environment)
    else:
        num_cpus = max(os.cpu_count() or 1, num_processes)
        ray.init(address="local", num_cpus=num_cpus, include_dashboard=False, runtime_env=environment)


def _scaling(num_processes: int) -> Any:
    """A worker takes what DEAL_RAY_RESOURCES says; without it one GPU if the cluster has one, else one CPU."""
    import ray
    from ray.train import ScalingConfig

    resources = LaunchSettings().ray_resources
    if resources is None:
        resources = {"CPU": 1.0} | ({"GPU": 1.0} if ray.cluster_resources().get("GPU") else {})
    return ScalingConfig(num_workers=num_processes, use_gpu=bool(resources.get("GPU")), resources_per_worker=resources)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
