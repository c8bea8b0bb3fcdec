"""What the model registry knows of versions, wherever it is read from: from MLflow, or from the file of its database.

This module does not import MLflow, because that takes more than a second.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from itertools import islice
from typing import Any, Literal, NamedTuple

from deal_core.adapter.files import Recorded
from deal_core.errors import RegistryError
from deal_core.judging_config import RolloutTerms
from deal_core.safe_text import without_secrets

RUN_KEY = "deal.run_key"
"""Tag of a run, a model and a version: the key of their adaptation."""
OWNER = {"deal.kind": "lineage"}
"""Tag of the registered models that are lineages."""
REBUILDING = "deal.rebuilding"
"""Tag of a registered model during its rebuild."""
Alias = Literal["champion", "challenger", "previous", "rollout"]
"""champion serves, previous served before it, and challenger is the newest version that passed its run. rollout is
tried on live traffic."""
ApprovalState = Literal["awaiting", "given", "refused"]
SCORES = ("average_accuracy", "forgetting", "backward_transfer", "forward_transfer")
NUMBERS = (*SCORES, "arrival_accuracy", "train_seconds")


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
    files_sha256: Recorded
    """The digests that each file of the adapter may have, by name."""
    parent_version: str | None
    accepted: bool
    reasons: tuple[str, ...]
    vetoes: tuple[Mapping[str, Any], ...] = ()
    """The reasons for programs: kind, task, value and limit of each."""
    approval: ApprovalState | None = None
    """State of a person's approval; None: no approval is needed."""
    flow_run: str | None = None
    """Id of the flow run that trained the version. A restarted run keeps its id."""
    landed_sha256: str
    """Digest of the arrival's rows, independent of the lineage's test rows."""
    requeued_sha256: str | None = None
    """Digest of the dataset of the version that a requeue replaced by this version."""
    rollout: RolloutTerms | None = None
    """How the version is tried on live traffic before it becomes champion; None: it is not."""
    arrival_accuracy: float | None = None
    """The champion's accuracy on the arrival's rows before anything was trained on them; None: it was not asked."""
    train_seconds: float
    """Seconds of the training."""
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
            "files_sha256": files_tag(self.files_sha256),
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


class ModelRow(NamedTuple):
    """A registered model."""

    name: str
    tags: Mapping[str, str]
    aliases: Mapping[str, str]
    """Number of the version of each alias."""


class VersionRow(NamedTuple):
    """A version of a registered model, as MLflow keeps it."""

    name: str
    number: str
    run_id: str | None
    source: str | None
    created_ms: int
    """Milliseconds since 1970."""
    tags: Mapping[str, str]


class RegistryReader(ABC):
    """Reads versions and aliases of lineages."""

    uri: str
    """Address of the registry."""

    @abstractmethod
    def find_model(self, lineage: str) -> ModelRow | None:
        """Return the registered model with this name, if there is one."""

    @abstractmethod
    def _models(self) -> Iterable[ModelRow]:
        """Return all registered models, in the order of their names."""

    @abstractmethod
    def _versions(self, lineage: str, at_most: int | None) -> Iterable[VersionRow]:
        """Return the versions of a registered model, newest first. A page may have `at_most` of them."""

    @abstractmethod
    def _version(self, lineage: str, number: str) -> VersionRow | None:
        """Return one version of a registered model, if there is one."""

    @abstractmethod
    def _with_run_key(self, run_key: str) -> Iterable[VersionRow]:
        """Return the versions with a run key, of whatever registered model."""

    def versions(self, lineage: str, *, newest: int | None = None) -> tuple[VersionInfo, ...]:
        """Return all or the `newest` versions of a lineage, oldest first; empty if the lineage is unknown."""
        own = (row for row in self._versions(lineage, newest) if RUN_KEY in row.tags)
        found = sorted(islice(own, newest), key=lambda row: int(row.number))
        aliases = self._aliases(lineage) if found else {}
        return tuple(as_version(row, aliases) for row in found)

    def champion(self, lineage: str) -> VersionInfo | None:
        """Return the lineage's champion, if it has one."""
        return self.with_alias(lineage, "champion")

    def lineages_with(self, alias: Alias) -> tuple[str, ...]:
        """Return the names of the lineages with an alias, in alphabetical order."""
        own = (model for model in self._models() if OWNER.items() <= model.tags.items())
        return tuple(model.name for model in own if alias in model.aliases)

    def with_alias(self, lineage: str, alias: Alias) -> VersionInfo | None:
        """Return the version with an alias, if there is one."""
        aliases = self._aliases(lineage)
        if alias not in aliases:
            return None
        found = self._version(lineage, aliases[alias])
        if found is None:
            raise RegistryError(
                f"Version {aliases[alias]}, {alias} of '{lineage}', was deleted at {without_secrets(self.uri)}."
            )
        return as_version(found, aliases)

    def version(self, lineage: str, number: str) -> VersionInfo | None:
        """Return the version with a number, if there is one."""
        found = self._version(lineage, number)
        return None if found is None else as_version(found, self._aliases(lineage))

    def find_version(self, run_key: str) -> VersionInfo | None:
        """Return the oldest version with a run key; None: no version has it."""
        oldest = min(self._with_run_key(run_key), key=lambda row: int(row.number), default=None)
        return None if oldest is None else as_version(oldest, self._aliases(oldest.name))

    def _aliases(self, lineage: str) -> Mapping[str, str]:
        """Return the version number of each alias."""
        model = self.find_model(lineage)
        return model.aliases if model else {}


def is_being_rebuilt(registry: RegistryReader, lineage: str) -> bool:
    """Return whether a rebuild of the lineage was begun and has not ended."""
    model = registry.find_model(lineage)
    return model is not None and REBUILDING in model.tags


def as_version(version: VersionRow, aliases: Mapping[str, str]) -> VersionInfo:
    """Return the facts of a version. `aliases` are those of its registered model."""
    tags = {key.removeprefix("deal."): value for key, value in version.tags.items() if key.startswith("deal.")}
    values: dict[str, Any] = {field.name: tags.get(field.name) for field in fields(VersionInfo)}
    values |= {each.name: tags.get(each.name, "") for each in fields(VersionFacts) if each.type == "str"}
    values |= {name: float(tags[name]) for name in NUMBERS if name in tags}
    values |= {
        "accepted": tags.get("gate") == "accepted",
        "reasons": tuple(json.loads(tags.get("gate_reasons", "[]"))),
        "vetoes": tuple(json.loads(tags.get("gate_vetoes", "[]"))),
        "lineage": version.name,
        "version": version.number,
        "aliases": tuple(sorted(alias for alias, holder in aliases.items() if holder == version.number)),
        "created": datetime.fromtimestamp(version.created_ms / 1000, UTC),
        "tracking_id": version.run_id or "",
        "model_id": (version.source or "").removeprefix("models:/"),
    }
    values["files_sha256"] = {name: tuple(each) for name, each in json.loads(tags.get("files_sha256", "{}")).items()}
    if "rollout" in tags:
        values["rollout"] = RolloutTerms(**json.loads(tags["rollout"]))
    if "created" in tags:  # a rebuilt registry has the time of the first registration as a tag
        values["created"] = datetime.fromisoformat(tags["created"])
    return VersionInfo(**values)
