"""Adapter versions in MLflow's model registry: one registered model per lineage, its name the lineage's.

What is known of a version lies in its tags, so that the registry alone tells the lineage's history.

Example:
    >>> registry = open_registry()  # doctest: +SKIP
    >>> [version.task for version in registry.versions("base")]  # doctest: +SKIP
    ['billing', 'clinic']
"""

from __future__ import annotations

import json
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import mlflow
from mlflow.entities.model_registry import ModelVersion, RegisteredModel
from mlflow.exceptions import MlflowException

from deal_core.adapter.files import Recorded, as_recorded, digests_of, require_undamaged
from deal_core.errors import RegistryError
from deal_core.masking import without_secrets
from infra.settings import TrackingSettings
from infra.tracking.client import FILES_SHA256, RUN_KEY, again_if_overtaken, open_client, saying

Alias = Literal["champion", "challenger", "previous"]
"""champion serves, previous did before it, challenger is the newest version that passed its run."""
ApprovalState = Literal["awaiting", "given", "refused"]
OWNER = {"deal.kind": "lineage"}
"""Tag of the registered models that are ours."""
DESCRIPTION = "Versions of one adapter, task by task."
PAGE = 1000

_global_address = threading.Lock()


@dataclass(frozen=True, kw_only=True)
class VersionFacts:
    """What is known of a version when it is registered; each field is a tag `deal.<field>`."""

    run_key: str
    task: str
    strategy: str
    base_sha256: str
    dataset_sha256: str
    config_sha256: str
    adapter_uri: str
    adapter_sha256: str
    """Digest of all files of the adapter together, as it was trained; see `sha256_together`."""
    files_sha256: Recorded | None = None
    """The digests that the adapter's files may have, by name; None of versions of earlier releases."""
    parent_version: str | None
    accepted: bool
    reasons: tuple[str, ...]
    vetoes: tuple[Mapping[str, Any], ...] = ()
    """What the reasons say, for programs: kind, task, value and limit of each."""
    approval: ApprovalState | None = None
    """Whether a person has to agree, or has; None: nobody was asked."""
    flow_run: str | None = None
    """Id of the flow run that trained it, which a run that is started again keeps."""
    landed_sha256: str | None = None
    """Digest of the arrival's rows whichever test rows the lineage knew; None of older versions."""
    requeued_sha256: str | None = None
    """Digest of the dataset of the version in whose place it was learned by a requeue."""
    average_accuracy: float | None
    forgetting: float | None
    backward_transfer: float | None
    forward_transfer: float | None

    @property
    def digests(self) -> frozenset[str]:
        """Two versions of a lineage learned the same arrival if they share one of these."""
        return frozenset(filter(None, (self.dataset_sha256, self.landed_sha256, self.requeued_sha256)))

    def tags(self) -> dict[str, str]:
        """The facts as registry tags; what is undefined is left out."""
        special = {
            "gate": "accepted" if self.accepted else "rejected",
            "gate_reasons": json.dumps(self.reasons, ensure_ascii=False),
            "gate_vetoes": json.dumps(self.vetoes, ensure_ascii=False),
            "files_sha256": None if self.files_sha256 is None else files_tag(self.files_sha256),
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
    """Number of the newest entry of the promotion log that promoted it; None: it was never promoted."""
    adapter_removed: str | None = None
    """Day on which its adapter was removed; the version stays in the history."""


def open_registry(settings: TrackingSettings | None = None) -> Registry:
    """A registry as the environment, or `settings`, describes it."""
    return Registry(settings or TrackingSettings())


class Registry:
    """Versions and aliases of lineages."""

    def __init__(self, settings: TrackingSettings) -> None:
        self.uri = settings.tracking_uri
        self.client = open_client(settings)

    def register(self, lineage: str, facts: VersionFacts, *, tracking_id: str, model_id: str) -> VersionInfo:
        """Register a version, or return the one that was registered under the same run key.

        MLflow's client sends the call that makes a version again if its answer is lost, which may make a second one:
        the oldest of a run key counts, here and in `find_version`.

        Args:
            lineage: the registered model's name.
            facts: they become the version's tags, in the call that makes it.
            tracking_id: the MLflow run.
            model_id: what `TrackedRun.log_adapter` returned.

        Raises:
            RegistryError: a registered model of that name exists that is no lineage, or MLflow refuses.
        """
        known = self.find_version(facts.run_key)
        if known is not None:
            return known
        with saying(f"register a version of {lineage!r}", self.uri):
            self._require_lineage(lineage)
            self.make_version(lineage, facts, tracking_id=tracking_id, model_id=model_id)
            first = self.find_version(facts.run_key)
            assert first is not None, "it was made just now"
            self.show_version(lineage, first.version, model_id)
        return first

    def make_version(
        self, lineage: str, facts: VersionFacts, *, tracking_id: str, model_id: str,
        more: Mapping[str, str] | None = None,
    ) -> str:
        """Make a version of a lineage that is there, and return its number: the one after the highest that there was.

        Args:
            lineage: the registered model's name.
            facts: they become the version's tags.
            tracking_id: the MLflow run.
            model_id: what `TrackedRun.log_adapter` returned.
            more: further tags `deal.<name>`, which replace those of the facts.
        """
        tags = facts.tags() | {f"deal.{name}": value for name, value in (more or {}).items()}
        with saying(f"make a version of {lineage!r}", self.uri), _addressed(self.uri):
            made = self.client.create_model_version(
                lineage, source=f"models:/{model_id}", run_id=tracking_id, tags=tags, description=_describe(facts),
                model_id=model_id,
            )  # fmt: skip
        return str(made.version)

    def show_version(self, lineage: str, version: str, model_id: str) -> None:
        """Let MLflow's pages of a logged model name the version that was made of it."""
        shown = [{"name": lineage, "version": version}]
        with saying(f"tag the model of version {version} of {lineage!r}", self.uri):
            self.client.set_logged_model_tags(model_id, {"mlflow.modelVersions": json.dumps(shown)})

    def find_model(self, lineage: str) -> RegisteredModel | None:
        """The registered model of that name, if there is one."""
        with saying(f"read {lineage!r}", self.uri):
            try:
                return self.client.get_registered_model(lineage)
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                return None

    def find_version(self, run_key: str) -> VersionInfo | None:
        """The version that was registered under a run key, the oldest if it was doubled; None: there is none."""
        found = self._search(f"tags.`{RUN_KEY}` = '{run_key}'")
        if not found:
            return None
        return _read(found[0], self._aliases(found[0].name))

    def versions(self, lineage: str, *, newest: int | None = None) -> tuple[VersionInfo, ...]:
        """Versions of a lineage, all or so many of the newest ones, oldest first; none if the lineage is unknown."""
        found = self._search(f"name = '{lineage}'", newest)
        aliases = self._aliases(lineage) if found else {}
        return tuple(_read(version, aliases) for version in found)

    def champion(self, lineage: str) -> VersionInfo | None:
        """The version that serves, if the lineage has one."""
        return self.with_alias(lineage, "champion")

    def lineages_with(self, alias: Alias) -> tuple[str, ...]:
        """Names of the lineages of which a version carries an alias, in alphabetical order."""
        names: list[str] = []
        token = None
        with saying("search lineages", self.uri):
            while True:
                page = self.client.search_registered_models(max_results=PAGE, order_by=["name"], page_token=token)
                own = [model for model in page if OWNER.items() <= model.tags.items()]
                names += [model.name for model in own if alias in model.aliases]
                token = page.token
                if not token:
                    return tuple(names)

    def with_alias(self, lineage: str, alias: Alias) -> VersionInfo | None:
        """The version that carries an alias, if one does."""
        aliases = self._aliases(lineage)
        if alias not in aliases:
            return None
        with saying(f"read {lineage}@{alias}", self.uri):
            return _read(self.client.get_model_version(lineage, aliases[alias]), aliases)

    def version(self, lineage: str, number: str) -> VersionInfo | None:
        """A version by its number, if there is one."""
        with saying(f"read version {number} of {lineage!r}", self.uri):
            found = self._find(lineage, number)
        return None if found is None else _read(found, self._aliases(lineage))

    def _find(self, lineage: str, number: str) -> ModelVersion | None:
        try:
            return self.client.get_model_version(lineage, number)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None

    def download(self, lineage: str, version: str, folder: Path) -> None:
        """Fetch a version's logged model into a folder, which appears complete or not at all.

        The files are compared with the digests that the logged model had when it was made. A model that an earlier
        release made has none; its files are taken as they are.

        Raises:
            IntegrityError: the bytes of a file are not the recorded ones.
            RegistryError: MLflow does not give it, or it is no model that MLflow can serve.
        """
        from mlflow.artifacts import download_artifacts

        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as part:
            target = Path(part) / "model"
            target.mkdir()
            with saying(f"fetch version {version} of {lineage!r}", self.uri), _addressed(self.uri):
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
        with saying(f"read the digests of version {version} of {lineage!r}", self.uri):
            source = self.client.get_model_version(lineage, version).source or ""
            model = self.client.get_logged_model(source.removeprefix("models:/"))
        recorded = as_recorded(json.loads(model.tags.get(FILES_SHA256, "{}")))
        require_undamaged(
            digests_of(folder, recorded), recorded, recorded, what=f"Version {version} of '{lineage}'",
            where=without_secrets(str(model.artifact_location)),
            remedy="Restore the folder from a backup, or go back to an earlier version: "
                   f"deal rollback --lineage {lineage} (deal history --lineage {lineage} lists the versions).",
        )  # fmt: skip

    @again_if_overtaken
    def set_alias(self, lineage: str, alias: Alias, version: str) -> None:
        """Move an alias to a version; of several that move it at once, the last one wins.

        Raises:
            RegistryError: there is no such version, or the gate rejected it.
        """
        with saying(f"set {lineage}@{alias}", self.uri):
            found = self._find(lineage, version)
            if found is None:
                raise RegistryError(f"Lineage {lineage!r} has no version {version}; look into its history.")
            if found.tags.get("deal.gate") != "accepted":
                raise RegistryError(
                    f"Version {version} of {lineage!r} did not pass its gate ({found.tags.get('deal.gate_reasons')}); "
                    f"it cannot become {alias}."
                )
            self.client.set_registered_model_alias(lineage, alias, version)

    def drop_alias(self, lineage: str, alias: Alias) -> None:
        """Take an alias away from whichever version has it."""
        with saying(f"drop {lineage}@{alias}", self.uri):
            self.client.delete_registered_model_alias(lineage, alias)

    @again_if_overtaken
    def tag_version(self, lineage: str, version: str, tags: Mapping[str, str]) -> None:
        """Add tags `deal.<name>` to a version; a later value replaces an earlier one."""
        with saying(f"tag version {version} of {lineage!r}", self.uri):
            for name, value in tags.items():
                self.client.set_model_version_tag(lineage, version, f"deal.{name}", value)

    def _require_lineage(self, name: str) -> None:
        """Make the registered model if it is new; refuse one that somebody else made."""
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
        found: list[ModelVersion] = []
        token = None
        with saying("search versions", self.uri):
            while True:
                page = self.client.search_model_versions(
                    condition, min(newest or PAGE, PAGE), order_by=["version_number DESC"], page_token=token
                )
                found += [version for version in page if RUN_KEY in version.tags]
                token = page.token
                if not token or (newest is not None and len(found) >= newest):
                    return sorted(found, key=lambda version: int(version.version))[-(newest or 0) :]

    def _aliases(self, lineage: str) -> dict[str, str]:
        """Alias to version number."""
        model = self.find_model(lineage)
        return {key: str(value) for key, value in model.aliases.items()} if model else {}


def require_through_gate(champion: VersionInfo) -> None:
    """Refuse to serve a version that has the alias champion by hand alone: in MLflow anybody can move it.

    Raises:
        RegistryError: the gate or a person rejected the version, or a person has yet to agree to it.
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
    """The value of the tag `deal.files_sha256`."""
    return json.dumps(recorded)


@contextmanager
def _addressed(uri: str) -> Iterator[None]:
    """Make `uri` MLflow's global address for a moment: a database store looks a logged model up through that."""
    with _global_address:
        if mlflow.get_tracking_uri() == uri:  # as MLFLOW_TRACKING_URI has it: setting it would outlive the variable
            yield
            return
        before = mlflow.get_tracking_uri() if mlflow.is_tracking_uri_set() else None  # type: ignore[no-untyped-call]
        mlflow.set_tracking_uri(uri)
        try:
            yield
        finally:
            mlflow.set_tracking_uri(before)  # type: ignore[arg-type]


def _describe(facts: VersionFacts) -> str:
    origin = f"continues version {facts.parent_version}" if facts.parent_version else "starts from the base model"
    verdict = "accepted" if facts.accepted else "rejected: " + "; ".join(facts.reasons)
    return f"Learned **{facts.task}** with {facts.strategy}; {origin}. Gate: {verdict}"[:5000]


def _created(version: ModelVersion, tags: Mapping[str, str]) -> datetime:
    """When it was registered; of a version that was registered again, the first time."""
    if "created" in tags:
        return datetime.fromisoformat(tags["created"])
    return datetime.fromtimestamp(version.creation_timestamp / 1000, UTC)


def _read(version: ModelVersion, aliases: Mapping[str, str]) -> VersionInfo:
    tags = {key.removeprefix("deal."): value for key, value in version.tags.items()}

    def number(name: str) -> float | None:
        return float(tags[name]) if name in tags else None

    values: dict[str, Any] = {
        "parent_version": tags.get("parent_version"),
        "accepted": tags.get("gate") == "accepted",
        "reasons": tuple(json.loads(tags.get("gate_reasons", "[]"))),
        "vetoes": tuple(json.loads(tags.get("gate_vetoes", "[]"))),
        "files_sha256": _files_of(tags),
        "approval": tags.get("approval"),
        "flow_run": tags.get("flow_run"),
        "landed_sha256": tags.get("landed_sha256"),
        "requeued_sha256": tags.get("requeued_sha256"),
        **{name: number(name) for name in ("average_accuracy", "forgetting", "backward_transfer", "forward_transfer")},
    }
    values |= {field.name: tags.get(field.name, "") for field in fields(VersionFacts) if field.name not in values}
    return VersionInfo(
        **values,
        lineage=version.name,
        version=str(version.version),
        aliases=tuple(sorted(alias for alias, holder in aliases.items() if holder == str(version.version))),
        created=_created(version, tags),
        tracking_id=version.run_id or "",
        model_id=(version.source or "").removeprefix("models:/"),
        promoted=tags.get("promoted"),
        adapter_removed=tags.get("adapter_removed"),
    )


def _files_of(tags: Mapping[str, str]) -> Recorded | None:
    if "files_sha256" not in tags:
        return None
    return {name: tuple(digests) for name, digests in json.loads(tags["files_sha256"]).items()}
