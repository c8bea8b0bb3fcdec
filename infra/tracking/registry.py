"""Adapter versions in MLflow's model registry. Each lineage has one registered model with the lineage's name.

The facts of a version are its tags, so the registry alone has the history of the lineage.

Example:
    >>> registry = open_registry()  # doctest: +SKIP
    >>> [version.task for version in registry.versions("base")]  # doctest: +SKIP
    ['billing', 'clinic']
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from mlflow.entities.model_registry import ModelVersion, RegisteredModel
from mlflow.exceptions import MlflowException

from deal_core.adapter.files import Recorded, as_recorded, digests_of, require_undamaged
from deal_core.errors import RegistryError
from deal_core.judging_config import RolloutTerms
from deal_core.safe_text import without_secrets
from infra.settings import TrackingSettings
from infra.tracking.client import (
    FILES_SHA256,
    PAGE,
    RUN_KEY,
    all_pages,
    found_or_none,
    global_address,
    open_client,
    report_errors,
    retry_if_overtaken,
)

Alias = Literal["champion", "challenger", "previous", "rollout"]
"""champion serves, previous served before it, and challenger is the newest version that passed its run. rollout is
tried on live traffic."""
ApprovalState = Literal["awaiting", "given", "refused"]
OWNER = {"deal.kind": "lineage"}
"""Tag of the registered models that are lineages."""
DESCRIPTION = "Versions of one adapter, task by task."


@dataclass(frozen=True, kw_only=True)
class VersionFacts:
    """The facts of a version when it is registered; each field is a tag `deal.<field>`."""

    run_key: str
    task: str
    strategy: str
    base_sha256: str
    dataset_sha256: str
    config_sha256: str
    adapter_uri: str
    adapter_sha256: str
    """Digest of all files of the trained adapter together; see `sha256_together`."""
    files_sha256: Recorded | None = None
    """The digests that each file of the adapter may have, by name; None for versions of earlier releases."""
    parent_version: str | None
    accepted: bool
    reasons: tuple[str, ...]
    vetoes: tuple[Mapping[str, Any], ...] = ()
    """The reasons for programs: kind, task, value and limit of each."""
    approval: ApprovalState | None = None
    """State of a person's approval; None: no approval is needed."""
    flow_run: str | None = None
    """Id of the flow run that trained the version. A restarted run keeps its id."""
    landed_sha256: str | None = None
    """Digest of the arrival's rows, independent of the lineage's test rows; None for older versions."""
    requeued_sha256: str | None = None
    """Digest of the dataset of the version that a requeue replaced by this version."""
    rollout: RolloutTerms | None = None
    """How the version is tried on live traffic before it becomes champion; None: it is not."""
    average_accuracy: float | None
    forgetting: float | None
    backward_transfer: float | None
    forward_transfer: float | None

    @property
    def digests(self) -> frozenset[str]:
        """Digests of the arrival. Two versions of a lineage learned the same arrival if they share a digest."""
        return frozenset(filter(None, (self.dataset_sha256, self.landed_sha256, self.requeued_sha256)))

    def tags(self) -> dict[str, str]:
        """Return the facts as registry tags, without undefined facts."""
        special = {
            "gate": "accepted" if self.accepted else "rejected",
            "gate_reasons": json.dumps(self.reasons, ensure_ascii=False),
            "gate_vetoes": json.dumps(self.vetoes, ensure_ascii=False),
            "files_sha256": None if self.files_sha256 is None else files_tag(self.files_sha256),
            "rollout": None if self.rollout is None else json.dumps(asdict(self.rollout)),
        }
        plain = {field.name: getattr(self, field.name) for field in fields(VersionFacts)}
        del plain["accepted"], plain["reasons"], plain["vetoes"]
        return {f"deal.{name}": str(value) for name, value in {**plain, **special}.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class VersionInfo(VersionFacts):
    """A registered version."""

    lineage: str
    version: str
    aliases: tuple[str, ...]
    created: datetime
    tracking_id: str
    model_id: str
    promoted: str | None = None
    """Number of the newest entry of the promotion log that promoted the version; None: it was never promoted."""
    rolled_out: str | None = None
    """Number of the entry of the promotion log that began its rollout; None: none began."""
    refused_by: str | None = None
    """Who rejected the version; None: nobody, or only its gate."""
    adapter_removed: str | None = None
    """Day on which the adapter was removed; the version stays in the history."""


def open_registry(settings: TrackingSettings | None = None) -> Registry:
    """Return the registry of `settings`, or of the environment."""
    return Registry(settings or TrackingSettings())


class Registry:
    """Versions and aliases of lineages."""

    def __init__(self, settings: TrackingSettings) -> None:
        self.uri = settings.tracking_uri
        self.client = open_client(settings)

    def register(self, lineage: str, facts: VersionFacts, *, tracking_id: str, model_id: str) -> VersionInfo:
        """Register a version, or return the version that was registered with the same run key.

        MLflow's client repeats a call whose answer is lost, which may make a second version. The oldest version with a
        run key counts, here and in `find_version`.

        Args:
            lineage: Name of the registered model.
            facts: They become the version's tags.
            tracking_id: The MLflow run.
            model_id: The result of `TrackedRun.log_adapter`.

        Raises:
            RegistryError: A registered model with this name exists and is no lineage, or MLflow refuses.
        """
        known = self.find_version(facts.run_key)
        if known is not None:
            return known
        with report_errors(f"register a version of {lineage!r}", self.uri):
            self._require_lineage(lineage)
            self.make_version(lineage, facts, tracking_id=tracking_id, model_id=model_id)
            first = self.find_version(facts.run_key)
            assert first is not None, "the version was made just now"
            self.show_version(lineage, first.version, model_id)
        return first

    def make_version(
        self, lineage: str, facts: VersionFacts, *, tracking_id: str, model_id: str,
        more: Mapping[str, str] | None = None,
    ) -> str:
        """Make a version of an existing lineage; return its number, which follows the highest number.

        The arguments are those of `register`; `more` are further tags `deal.<name>`, which replace tags of the facts.
        """
        tags = facts.tags() | {f"deal.{name}": value for name, value in (more or {}).items()}
        with report_errors(f"make a version of {lineage!r}", self.uri), global_address(self.uri):
            made = self.client.create_model_version(
                lineage, source=f"models:/{model_id}", run_id=tracking_id, tags=tags, description=_describe(facts),
                model_id=model_id,
            )  # fmt: skip
        return str(made.version)

    def show_version(self, lineage: str, version: str, model_id: str) -> None:
        """Tag a logged model with its version, so that MLflow's pages of the model show the version."""
        shown = [{"name": lineage, "version": version}]
        with report_errors(f"tag the model of version {version} of {lineage!r}", self.uri):
            self.client.set_logged_model_tags(model_id, {"mlflow.modelVersions": json.dumps(shown)})

    def find_model(self, lineage: str) -> RegisteredModel | None:
        """Return the registered model with this name, if there is one."""
        with report_errors(f"read {lineage!r}", self.uri):
            return found_or_none(self.client.get_registered_model, lineage)

    def find_version(self, run_key: str) -> VersionInfo | None:
        """Return the oldest version with a run key; None: no version has it."""
        found = self._search(f"tags.`{RUN_KEY}` = '{run_key}'")
        if not found:
            return None
        return _read(found[0], self._aliases(found[0].name))

    def versions(self, lineage: str, *, newest: int | None = None) -> tuple[VersionInfo, ...]:
        """Return all or the `newest` versions of a lineage, oldest first; empty if the lineage is unknown."""
        found = self._search(f"name = '{lineage}'", newest)
        aliases = self._aliases(lineage) if found else {}
        return tuple(_read(version, aliases) for version in found)

    def champion(self, lineage: str) -> VersionInfo | None:
        """Return the lineage's champion, if it has one."""
        return self.with_alias(lineage, "champion")

    def lineages_with(self, alias: Alias) -> tuple[str, ...]:
        """Return the names of the lineages with an alias, in alphabetical order."""
        with report_errors("search lineages", self.uri):
            models = all_pages(self.client.search_registered_models, order_by=["name"])
            own = [model for model in models if OWNER.items() <= model.tags.items()]
        return tuple(model.name for model in own if alias in model.aliases)

    def with_alias(self, lineage: str, alias: Alias) -> VersionInfo | None:
        """Return the version with an alias, if there is one."""
        aliases = self._aliases(lineage)
        if alias not in aliases:
            return None
        with report_errors(f"read {lineage}@{alias}", self.uri):
            return _read(self.client.get_model_version(lineage, aliases[alias]), aliases)

    def version(self, lineage: str, number: str) -> VersionInfo | None:
        """Return the version with a number, if there is one."""
        with report_errors(f"read version {number} of {lineage!r}", self.uri):
            found = found_or_none(self.client.get_model_version, lineage, number)
        return None if found is None else _read(found, self._aliases(lineage))

    def download(self, lineage: str, version: str, folder: Path) -> None:
        """Download a version's logged model into a new folder, which appears when it is complete.

        The files are compared with the recorded digests of the logged model. A model of an earlier release has no
        recorded digests, so its files are not checked.

        Raises:
            IntegrityError: A file does not have its recorded digest.
            RegistryError: MLflow does not give the model, or the model cannot be served.
        """
        from mlflow.artifacts import download_artifacts

        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as part:
            target = Path(part) / "model"
            target.mkdir()
            with report_errors(f"fetch version {version} of {lineage!r}", self.uri), global_address(self.uri):
                fetched = Path(download_artifacts(artifact_uri=f"models:/{lineage}/{version}", dst_path=str(target)))
            if not (fetched / "MLmodel").is_file():
                raise RegistryError(
                    f"Version {version} of {lineage!r} was registered before versions could be served: MLflow has a "
                    "plain PEFT folder of it. Learn an arrival again (deal adapt … --again), which registers a new "
                    "version, or promote another one."
                )
            self._require_recorded(lineage, version, fetched)
            fetched.rename(folder)

    def _require_recorded(self, lineage: str, version: str, folder: Path) -> None:
        with report_errors(f"read the digests of version {version} of {lineage!r}", self.uri):
            source = self.client.get_model_version(lineage, version).source or ""
            model = self.client.get_logged_model(source.removeprefix("models:/"))
        recorded = as_recorded(json.loads(model.tags.get(FILES_SHA256, "{}")))
        require_undamaged(
            digests_of(folder, recorded), recorded, recorded, what=f"Version {version} of '{lineage}'",
            where=without_secrets(str(model.artifact_location)),
            remedy="Restore the folder from a backup, or go back to an earlier version: "
                   f"deal rollback --lineage {lineage} (deal history --lineage {lineage} lists the versions).",
        )  # fmt: skip

    @retry_if_overtaken
    def set_alias(self, lineage: str, alias: Alias, version: str) -> None:
        """Move an alias to a version. Of several concurrent moves, the last move wins.

        Raises:
            RegistryError: The version does not exist, or the gate rejected it.
        """
        with report_errors(f"set {lineage}@{alias}", self.uri):
            found = found_or_none(self.client.get_model_version, lineage, version)
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

    def _search(self, condition: str, newest: int | None = None) -> list[ModelVersion]:
        with report_errors("search versions", self.uri):
            versions = all_pages(
                self.client.search_model_versions, condition, max_results=min(newest or PAGE, PAGE),
                order_by=["version_number DESC"],
            )  # fmt: skip
            found = list(islice((version for version in versions if RUN_KEY in version.tags), newest))
        return sorted(found, key=lambda version: int(version.version))

    def _aliases(self, lineage: str) -> dict[str, str]:
        """Return the version number of each alias."""
        model = self.find_model(lineage)
        return {key: str(value) for key, value in model.aliases.items()} if model else {}


def require_through_gate(champion: VersionInfo) -> None:
    """Refuse to serve a champion that did not pass the gate: every user of MLflow can move the alias.

    Raises:
        RegistryError: The gate or a person rejected the version, or the version waits for approval.
    """
    lineage, number = champion.lineage, champion.version
    remedy = f"Set the alias back to the champion that deal history --moves --lineage {lineage} names"
    if not champion.accepted:
        reasons = f" ({' '.join(champion.reasons)})" if champion.reasons else ""
        found = f"did not pass its gate{reasons}"
    elif champion.approval == "refused":
        found = "was rejected by a person"
    elif champion.approval == "awaiting" and champion.promoted is None:
        found = "waits for a person's approval"
        remedy += f", or agree with: deal promote {number} --lineage {lineage}"
    else:
        return
    raise RegistryError(
        f"Version {number} of '{lineage}' is champion in MLflow but {found}: it is not served. {remedy}."
    )


def files_tag(recorded: Recorded) -> str:
    """Return the value of the tag `deal.files_sha256`."""
    return json.dumps(recorded)


def _describe(facts: VersionFacts) -> str:
    origin = f"continues version {facts.parent_version}" if facts.parent_version else "starts from the base model"
    verdict = "accepted" if facts.accepted else "rejected: " + "; ".join(facts.reasons)
    return f"Learned **{facts.task}** with {facts.strategy}; {origin}. Gate: {verdict}"[:5000]


def _read(version: ModelVersion, aliases: Mapping[str, str]) -> VersionInfo:
    tags = {key.removeprefix("deal."): value for key, value in version.tags.items()}
    created = datetime.fromtimestamp(version.creation_timestamp / 1000, UTC)
    if "created" in tags:  # a rebuilt registry has the time of the first registration as a tag
        created = datetime.fromisoformat(tags["created"])
    values: dict[str, Any] = {
        "accepted": tags.get("gate") == "accepted",
        "reasons": tuple(json.loads(tags.get("gate_reasons", "[]"))),
        "vetoes": tuple(json.loads(tags.get("gate_vetoes", "[]"))),
        "files_sha256": None,
        "rollout": RolloutTerms(**json.loads(tags["rollout"])) if "rollout" in tags else None,
    }
    if "files_sha256" in tags:
        values["files_sha256"] = {name: tuple(each) for name, each in json.loads(tags["files_sha256"]).items()}
    for name in ("parent_version", "approval", "flow_run", "landed_sha256", "requeued_sha256"):
        values[name] = tags.get(name)
    for name in ("average_accuracy", "forgetting", "backward_transfer", "forward_transfer"):
        values[name] = float(tags[name]) if name in tags else None
    values |= {field.name: tags.get(field.name, "") for field in fields(VersionFacts) if field.name not in values}
    return VersionInfo(
        **values,
        lineage=version.name,
        version=str(version.version),
        aliases=tuple(sorted(alias for alias, holder in aliases.items() if holder == str(version.version))),
        created=created,
        tracking_id=version.run_id or "",
        model_id=(version.source or "").removeprefix("models:/"),
        promoted=tags.get("promoted"),
        rolled_out=tags.get("rolled_out"),
        refused_by=tags.get("refused_by"),
        adapter_removed=tags.get("adapter_removed"),
    )
