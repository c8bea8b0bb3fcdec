"""Adapter versions in MLflow's model registry. Each lineage has one registered model with the lineage's name.

The facts of a version are its tags, so the registry alone has the history of the lineage. What changes the registry is
here; `infra.tracking.facts` has what reads it.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import LoggedModel
from mlflow.exceptions import MlflowException

from deal_core.adapter.files import as_recorded, digests_of, require_undamaged
from deal_core.errors import RegistryError
from deal_core.safe_text import without_secrets
from infra.settings import TrackingSettings
from infra.tracking.client import (
    FILES_SHA256,
    global_address,
    open_client,
    report_errors,
    retry_if_overtaken,
)
from infra.tracking.database import open_reader
from infra.tracking.facts import (
    OWNER,
    REBUILDING,
    Alias,
    ModelRow,
    RegistryReader,
    VersionFacts,
    VersionInfo,
    VersionRow,
)

DESCRIPTION = "Versions of one adapter, task by task."


def open_registry(settings: TrackingSettings | None = None) -> Registry:
    """Return the registry of `settings`, or of the environment."""
    return Registry(settings or TrackingSettings())


class Registry(RegistryReader):
    """Versions and aliases of lineages. MLflow's client writes them; they are read as by `open_reader`."""

    def __init__(self, settings: TrackingSettings) -> None:
        self.uri = settings.tracking_uri
        self._settings = settings
        self._reader = open_reader(settings)

    @cached_property
    def client(self) -> MlflowClient:
        """MLflow's client, which is opened for the first write."""
        return open_client(self._settings)

    def register(self, lineage: str, facts: VersionFacts, *, tracking_id: str, model_id: str) -> VersionInfo:
        """Register a version, or return the version that was registered with the same run key.

        `tracking_id` names the MLflow run, and `model_id` is the result of `TrackedRun.log_adapter`.

        MLflow's client repeats a call whose answer is lost, which may make a second version. The oldest version with a
        run key counts, here and in `find_version`.

        Raises:
            RegistryError: A registered model with this name exists and is no lineage, or MLflow refuses.
        """
        known = self.find_version(facts.run_key)
        if known is not None:
            return known
        with report_errors(f"register a version of {lineage!r}", self.uri):
            self._require_lineage(lineage)
            self.make_version(lineage, facts, tracking_id, model_id)
            first = self.find_version(facts.run_key)
            assert first is not None, "the version was made just now"
            self.show_version(lineage, first.version, model_id)
        return first

    def make_version(
        self, lineage: str, facts: VersionFacts, tracking_id: str, model_id: str, more: Mapping[str, str] | None = None
    ) -> int:
        """Make a version of an existing lineage; return its number, which follows the highest number.

        The arguments are those of `register`; `more` are further tags `deal.<name>`, which replace tags of the facts.
        """
        tags = facts.tags() | {f"deal.{name}": value for name, value in (more or {}).items()}
        with report_errors(f"make a version of {lineage!r}", self.uri), global_address(self.uri):
            made = self.client.create_model_version(
                lineage,
                source=f"models:/{model_id}",
                run_id=tracking_id,
                tags=tags,
                description=_describe(facts),
                model_id=model_id,
            )
        return int(made.version)

    def show_version(self, lineage: str, version: str, model_id: str) -> None:
        """Tag a logged model with its version, so that MLflow's pages of the model show the version."""
        shown = [{"name": lineage, "version": version}]
        with report_errors(f"tag the model of version {version} of {lineage!r}", self.uri):
            self.client.set_logged_model_tags(model_id, {"mlflow.modelVersions": json.dumps(shown)})

    def find_model(self, lineage: str) -> ModelRow | None:
        """Return the registered model with this name, if there is one."""
        return self._reader.find_model(lineage)

    def _models(self) -> Iterable[ModelRow]:
        return self._reader._models()

    def _versions(self, lineage: str, at_most: int | None) -> Iterable[VersionRow]:
        return self._reader._versions(lineage, at_most)

    def _version(self, lineage: str, number: str) -> VersionRow | None:
        return self._reader._version(lineage, number)

    def _with_run_key(self, run_key: str) -> Iterable[VersionRow]:
        return self._reader._with_run_key(run_key)

    def download(self, lineage: str, version: str, folder: Path) -> None:
        """Download a version's logged model into a new folder, which appears when it is complete.

        The files are compared with the recorded digests of the logged model.

        Raises:
            IntegrityError: A file does not have its recorded digest.
            RegistryError: MLflow does not give the model, or the model cannot be served.
        """
        from mlflow.artifacts import download_artifacts

        model = self._logged_model(lineage, version)
        location = "" if model is None else str(model.artifact_location)
        if location.startswith("mlflow-artifacts:") and not self.uri.startswith("http"):
            raise RegistryError(
                f"The files of version {version} of {lineage!r} are kept by an MLflow server, such as that of deal up, "
                "and none is set here. Give deal up first, or name the server in MLFLOW_TRACKING_URI."
            )
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as part:
            target = Path(part) / "model"
            target.mkdir()
            with report_errors(f"fetch version {version} of {lineage!r}", self.uri), global_address(self.uri):
                fetched = Path(download_artifacts(artifact_uri=f"models:/{lineage}/{version}", dst_path=str(target)))
            if model is not None and not any(fetched.iterdir()):
                raise RegistryError(
                    f"Version {version} of {lineage!r} has no files where MLflow says: {without_secrets(location)}. If "
                    "the home was moved or copied, move its mlflow.db* away and give: deal lineage rebuild "
                    f"{lineage}. Else restore the folder from a backup."
                )
            if model is None or not (fetched / "MLmodel").is_file():
                raise RegistryError(
                    f"MLflow has no model of version {version} of {lineage!r} that can be served. Learn an arrival "
                    "again (deal adapt … --again), which registers a new version, or promote another one."
                )
            _require_recorded(lineage, version, fetched, model)
            fetched.rename(folder)

    def _logged_model(self, lineage: str, version: str) -> LoggedModel | None:
        """Return what MLflow knows of a version's files; None: it knows nothing."""
        with report_errors(f"find version {version} of {lineage!r}", self.uri):
            source = self.client.get_model_version(lineage, version).source or ""
            is_logged = source.startswith("models:/")
            return self.client.get_logged_model(source.removeprefix("models:/")) if is_logged else None

    @retry_if_overtaken
    def set_alias(self, lineage: str, alias: Alias, version: str) -> None:
        """Move an alias to a version. Of several concurrent moves, the last move wins.

        Raises:
            RegistryError: The version does not exist, or the gate rejected it.
        """
        with report_errors(f"set {lineage}@{alias}", self.uri):
            found = self._version(lineage, version)
            if found is None:
                raise RegistryError(f"Lineage {lineage!r} has no version {version}; look into its history.")
            if found.tags.get("deal.gate") != "accepted":
                raise RegistryError(
                    f"Version {version} of {lineage!r} did not pass its gate ({found.tags.get('deal.gate_reasons')}); "
                    f"it cannot become {alias}."
                )
            self.client.set_registered_model_alias(lineage, alias, version)

    @retry_if_overtaken
    def drop_alias(self, lineage: str, alias: Alias) -> None:
        """Remove an alias, if there is one."""
        with report_errors(f"remove {lineage}@{alias}", self.uri):
            self.client.delete_registered_model_alias(lineage, alias)

    @retry_if_overtaken
    def tag_version(self, lineage: str, version: str, tags: Mapping[str, str]) -> None:
        """Add tags `deal.<name>` to a version, or replace their values."""
        with report_errors(f"tag version {version} of {lineage!r}", self.uri):
            for name, value in tags.items():
                self.client.set_model_version_tag(lineage, version, f"deal.{name}", value)

    def _require_lineage(self, name: str) -> None:
        """Make the registered model if it is new; refuse a registered model of another program."""
        try:
            self.client.create_registered_model(name, tags=OWNER, description=DESCRIPTION)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            tags = self.client.get_registered_model(name).tags
            if not OWNER.items() <= tags.items():
                raise RegistryError(
                    f"MLflow at {without_secrets(self.uri)} has a registered model {name!r} that is no lineage of "
                    "this pipeline; give the lineage another name."
                ) from None


class LineageRebuild:
    """Registers the versions of a lost registry again, with their old numbers. The caller must hold the lineage's lock.

    MLflow gives numbers in order, and no number twice while the registered model exists. A number whose version is
    unknown is used up by a version that is deleted at once.
    """

    def __init__(self, registry: Registry, lineage: str) -> None:
        self._registry = registry
        self._client = registry.client
        self._lineage = lineage

    def refuse_what_is_known(self) -> None:
        """Raise RegistryError if the registry has versions of the lineage, or the registered model is no lineage."""
        where = without_secrets(self._registry.uri)
        model = self._registry.find_model(self._lineage)
        if model is None or REBUILDING in model.tags:
            return
        if not OWNER.items() <= model.tags.items():
            raise RegistryError(
                f"MLflow at {where} has a registered model {self._lineage!r} that is no lineage of this pipeline; "
                "nothing was changed. Check MLFLOW_TRACKING_URI."
            )
        with report_errors("search versions", self._registry.uri):
            found = self._client.search_model_versions(f"name = '{self._lineage}'")
        if found:
            raise RegistryError(
                f"MLflow at {where} knows versions of lineage '{self._lineage}' (the newest is "
                f"{max(int(each.version) for each in found)}), so no rebuild is needed; nothing was changed. See: deal "
                f"history --lineage {self._lineage}"
            )

    def begin(self) -> None:
        """Make a new registered model, whose numbers start at 1. It replaces the result of an interrupted rebuild.

        Errors are those of `refuse_what_is_known`.
        """
        self.refuse_what_is_known()
        with report_errors(f"make {self._lineage!r} again", self._registry.uri):
            if self._registry.find_model(self._lineage) is not None:  # without a version, or rebuilt in part
                self._client.delete_registered_model(self._lineage)
            self._client.create_registered_model(
                self._lineage, tags={**OWNER, REBUILDING: "begun"}, description=DESCRIPTION
            )

    def make(
        self, number: int, facts: VersionFacts, *, tracking_id: str, model_id: str, more: Mapping[str, str]
    ) -> None:
        """Make a version with its old number. Smaller numbers without a version are used up.

        Raises:
            RegistryError: MLflow has used this number already.
        """
        while (made := self._registry.make_version(self._lineage, facts, tracking_id, model_id, more)) < number:
            self._delete(made)
        if made > number:
            raise RegistryError(
                f"MLflow gave the number {made} to version {number} of '{self._lineage}', probably because an answer "
                f"was lost; begin the rebuild again: deal lineage rebuild {self._lineage}"
            )
        self._registry.show_version(self._lineage, str(number), model_id)

    def leave_out(self, made: int, last: int, facts: VersionFacts, *, tracking_id: str, model_id: str) -> None:
        """Use up the numbers after `made` up to `last`, so that no later version gets them.

        `facts` are those of any version, and `tracking_id` and `model_id` name its MLflow run and its logged model.
        """
        while made < last:
            made = self._registry.make_version(self._lineage, facts, tracking_id, model_id)
            self._delete(made)

    def end(self, aliases: Mapping[Alias, str]) -> None:
        """Set the aliases and end the rebuild."""
        for alias, version in aliases.items():
            self._registry.set_alias(self._lineage, alias, version)
        with report_errors(f"end the rebuild of {self._lineage!r}", self._registry.uri):
            self._client.delete_registered_model_tag(self._lineage, REBUILDING)

    def _delete(self, number: int) -> None:
        with report_errors(f"leave out version {number} of {self._lineage!r}", self._registry.uri):
            self._client.delete_model_version(self._lineage, str(number))


def _describe(facts: VersionFacts) -> str:
    origin = f"continues version {facts.parent_version}" if facts.parent_version else "starts from the base model"
    verdict = "accepted" if facts.accepted else "rejected: " + "; ".join(facts.reasons)
    return f"Learned **{facts.task}** with {facts.strategy}; {origin}. Gate: {verdict}"[:5000]


def _require_recorded(lineage: str, version: str, folder: Path, model: LoggedModel) -> None:
    recorded = as_recorded(json.loads(model.tags.get(FILES_SHA256, "{}")))
    require_undamaged(
        digests_of(folder, recorded),
        recorded,
        recorded,
        what=f"Version {version} of '{lineage}'",
        where=without_secrets(str(model.artifact_location)),
        remedy="Restore the folder from a backup, or go back to an earlier version: "
        f"deal rollback --lineage {lineage} (deal history --lineage {lineage} lists the versions).",
    )
