"""What is known of a registered version, as a record without MLflow: importing MLflow takes more than a second."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from typing import Any, Literal

from deal_core.adapter.files import Recorded
from deal_core.errors import RegistryError
from deal_core.judging_config import RolloutTerms

RUN_KEY = "deal.run_key"
"""Tag of a run, a model and a version: the key of their adaptation."""
Alias = Literal["champion", "challenger", "previous", "rollout"]
"""champion serves, previous served before it, and challenger is the newest version that passed its run. rollout is
tried on live traffic."""
ApprovalState = Literal["awaiting", "given", "refused"]


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
