"""MLflow runs: one per adaptation, found again by its key when it is continued, and always ended.

Everything goes through clients with an explicit address; MLflow's global state is left as it is.

Example:
    >>> tracker = open_tracker()  # doctest: +SKIP
    >>> with tracker.start("base", run_key, name="billing", params={"strategy": "deal"}) as run:  # doctest: +SKIP
    ...     run.log(1, {"loss": 2.3})
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlflow.entities import ViewType
from mlflow.exceptions import MlflowException

from deal_core.errors import ConfigError, RegistryError
from deal_core.masking import holds_secret, without_secrets
from infra.settings import TrackingSettings
from infra.tracking.client import RUN_KEY, open_client, saying
from infra.tracking.tracked_run import TrackedRun

__all__ = ["TrackedRun", "Tracker", "open_tracker"]


def open_tracker(settings: TrackingSettings | None = None) -> Tracker:
    """A tracker as the environment, or `settings`, describes it."""
    return Tracker(settings or TrackingSettings())


class Tracker:
    """Finds and starts the runs of lineages; each lineage has one experiment, `deal/<lineage>`.

    Raises:
        ConfigError: the address of the artifacts holds a password.
    """

    def __init__(self, settings: TrackingSettings) -> None:
        if holds_secret(settings.artifact_uri):
            raise ConfigError(
                f"DEAL_ARTIFACT_URI is {settings.artifact_uri}: its user, password or token would be kept in MLflow's "
                "database; leave it out, and give credentials as the variables of that kind of store, such as AWS_*."
            )
        self.uri = settings.tracking_uri
        self.artifact_uri = settings.artifact_uri
        self.client = open_client(settings)

    def start(
        self,
        lineage: str,
        run_key: str,
        *,
        name: str,
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> TrackedRun:
        """The run of an adaptation: a new one, or the one that `run_key` was started with before.

        Args:
            lineage: whose run it is.
            run_key: identity of the adaptation.
            name: what people see.
            params: settings, nested as they come; those that the run has already are left as they are.
            tags: set anew each time.
        """
        with saying("start a run", self.uri):
            experiment_id = self._experiment(lineage)
            own_run = f"tags.`{RUN_KEY}` = '{run_key}'"
            found = self.client.search_runs([experiment_id], own_run, ViewType.ACTIVE_ONLY, max_results=1)
            if found:
                run_id = found[0].info.run_id
                self.client.update_run(run_id, status="RUNNING")
            else:
                own = {RUN_KEY: run_key, "deal.lineage": lineage}
                run_id = self.client.create_run(experiment_id, tags=own, run_name=name).info.run_id
        run = TrackedRun(self.client, run_id)
        run.log_params(params or {})
        run.set_tags(tags or {})
        return run

    def run(self, run_id: str) -> TrackedRun:
        """A run that was started before, by its id."""
        return TrackedRun(self.client, run_id)

    def _experiment(self, lineage: str) -> str:
        name = f"deal/{lineage}"
        for _ in range(2):
            experiment = self.client.get_experiment_by_name(name)
            if experiment is not None:
                if experiment.lifecycle_stage != "active":
                    self.client.restore_experiment(experiment.experiment_id)
                return str(experiment.experiment_id)
            try:
                return str(self.client.create_experiment(name, artifact_location=self._artifact_location(lineage)))
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":  # else another process was first
                    raise
        where = without_secrets(self.uri)
        raise RegistryError(f"MLflow at {where} neither finds nor makes the experiment {name!r}; look into its UI.")

    def _artifact_location(self, lineage: str) -> str | None:
        """Where a database's artifacts go (MLflow's default is the working directory); None: the server decides."""
        is_server = self.uri.startswith(("http://", "https://"))
        return None if is_server else f"{self.artifact_uri.rstrip('/')}/{lineage}"
