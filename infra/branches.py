"""Branches of a lineage: versions that are made again, which continue no champion until one move swaps the last one in.

    branches/LINEAGE/NUMBER.json      what is made again, from which version on; written once, before anything else
    branches/LINEAGE/NUMBER.judged.json  how its result compares with the champion that it replaces
    branches/LINEAGE/NUMBER.end.json  how the branch ended

The versions of a branch name it and the version whose arrival they learn again. So what is done is read from the
versions, and a branch whose process was killed goes on. A lineage has at most one open branch: the next number is
taken with a conditional put.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from infra.deleted_inputs import UnknownRows
from infra.promotions import Move
from infra.store import keys
from infra.store.base import ObjectStore
from infra.store.stored import Stored, parse_stored, read_folder, read_stored, reading_stored, write_stored
from infra.versions import ArrivalDigests, Version

_JUDGED, _END = ".judged.json", ".end.json"
_REMEDY = "Restore it from a backup of the store. Until then nothing is learned; a server that runs serves on."


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Head(_Part):
    """What a new version of a lineage continues: its champion, or the newest version of a branch."""

    lineage: str
    branch: int | None = None
    """Number of the branch; None: the champion is continued, and a version that its gate accepts replaces it."""


class Lost(_Part):
    """An arrival that cannot be learned again."""

    version: str
    """The version that learned it."""
    task: str
    why: str


class DeletedRows(ArrivalDigests, _Part):
    """The rows without which a branch learns, and every place where they were."""

    versions: tuple[str, ...]
    """Numbers of the lineage's versions that saw the rows. Their adapters are removed after the swap."""
    others: tuple[str, ...]
    """LINEAGE/VERSION of the versions of other lineages that saw the rows. They stay."""
    places: tuple[str, ...]
    """The places that held the rows, each as a kind and an address."""


class Branch(Stored):
    """What a branch makes again. It never changes."""

    lineage: str
    number: int = Field(ge=1)
    """Counts from 1 within the lineage."""
    began: datetime = Field(default_factory=lambda: datetime.now(UTC))
    who: str
    root: str | None
    """The version that the first new version continues; None: the base model."""
    champion: str
    """The champion that the branch replaces."""
    arrivals: Mapping[str, str]
    """The arrivals that are learned, in this order: the version that learned each of them before → its task."""
    lost: tuple[Lost, ...] = ()
    base_model: str | None = None
    """Source of the new base model; None: that of each version before."""
    stops_serving: bool = False
    """Whether no version is champion until the swap."""
    deleted: DeletedRows | None = None

    @property
    def what(self) -> str:
        """What it is for, in words."""
        if self.deleted is not None:
            return f"without arrival {self.deleted.sha256[:12]} of {self.deleted.task}"
        return f"on the base model {self.base_model}"

    @property
    def why_waiting(self) -> str:
        """Why new arrivals wait for it, and what to do."""
        return (
            f"versions of '{self.lineage}' are made again {self.what} since {self.began:%Y-%m-%d %H:%M} UTC; new "
            f"arrivals wait for the end. Go on with: {self.command}; or give it up: deal lineage branch {self.lineage} "
            "--give-up"
        )

    @property
    def command(self) -> str:
        """The command that goes on with it."""
        if self.deleted is not None:
            return f"deal data delete {self.deleted.sha256[:12]} --relearn --lineage {self.lineage}"
        return f"deal lineage rebase {self.lineage} --base {shlex.quote(self.base_model or '')}"


class Remade(_Part):
    """A version that a branch made."""

    version: str
    remakes: str
    """The version whose arrival it learned."""
    task: str
    accepted: bool
    adapter_sha256: str
    """Digest of all files of its adapter together."""


class Acceptance(_Part):
    """That a person accepts a result which is worse than the champion."""

    who: str
    why: str


class Judgement(Stored):
    """How the last version of a branch compares with the champion that it replaces, on the rows that test both."""

    tip: str
    """The last version."""
    before: dict[str, float]
    """Accuracy of the champion that is replaced, by task, 0 to 1."""
    accuracies: dict[str, float]
    """Accuracy of the last version, by the same tasks."""
    num_rows: dict[str, int]
    """Test rows that both answered, by the same tasks."""
    unjudged: tuple[str, ...] = ()
    """Tasks that both know, and of which no test row judges both."""
    reasons: tuple[str, ...] = ()
    """The drops beyond the limits of the version's gate."""
    accepted: Acceptance | None = None
    """None: nobody had to accept it, or nobody has."""

    @property
    def waits(self) -> bool:
        """Whether a person has to accept the result, or give the branch up."""
        return bool(self.reasons) and self.accepted is None


class Attestation(_Part):
    """What is certain after the rows of `Branch.deleted` were deleted and what had learned from them was made again."""

    removed: tuple[str, ...]
    """The versions whose adapters are gone, from the store and from MLflow."""
    searched: tuple[str, ...]
    """The kinds of places that were searched for the rows again, at the end. No row was left."""
    exports_removed: tuple[str, ...]
    """Addresses of exports that were removed."""
    exports_left: tuple[str, ...]
    """Addresses of exports that this machine cannot remove. A person has to."""
    num_inputs: int
    """Inputs of the rows that are known, as digests. The prediction logs were searched for answers to them."""
    unknown: tuple[UnknownRows, ...]
    """The rows whose inputs could not be known. Logged answers to them may be left."""
    waits_for_mlflow: bool
    """Whether MLflow did not answer. Then its copies are removed by the next run or `deal server sync`."""
    judgement: Judgement | None = None
    """What the deletion cost. None: the champion of before never saw the rows, and stays."""


class BranchEnd(Stored):
    """How a branch ended."""

    outcome: Literal["swapped", "given up"]
    ended: datetime = Field(default_factory=lambda: datetime.now(UTC))
    who: str
    tip: str | None = None
    """The version that became champion; None: it was given up."""
    made: tuple[Remade, ...] = ()
    """What it made, in the order of its arrivals."""
    attestation: Attestation | None = None


class KnownBranch(BaseModel, frozen=True):
    """A branch, and its end if it has ended."""

    branch: Branch
    judgement: Judgement | None = None
    """None: it was not compared yet, or nothing was made."""
    end: BranchEnd | None = None


class Branches:
    """The branches of a store's lineages."""

    def __init__(self, store: ObjectStore) -> None:
        self.store = store

    def all(self, lineage: str) -> tuple[KnownBranch, ...]:
        """Return the branches of a lineage, oldest first. StoreError: one is damaged, or another release wrote it."""
        branches: dict[str, Branch] = {}
        judgements: dict[str, Judgement] = {}
        ends: dict[str, BranchEnd] = {}
        for key, content in read_folder(self.store, keys.branch_folder(lineage)).items():
            with reading_stored(self.store, key, f"a branch of '{lineage}'", _REMEDY):
                number = keys.version_number(key)
                if key.endswith(_END):
                    ends[number] = parse_stored(content, BranchEnd)
                elif key.endswith(_JUDGED):
                    judgements[number] = parse_stored(content, Judgement)
                else:
                    branches[number] = parse_stored(content, Branch)
        return tuple(
            KnownBranch(branch=branch, judgement=judgements.get(number), end=ends.get(number))
            for number, branch in branches.items()
        )

    def open(self, lineage: str) -> Branch | None:
        """Return the branch that has not ended, if there is one. Only this one is read: servers look every second."""
        keys_of = self._keys(lineage)
        ended = {keys.version_number(key) for key in keys_of if key.endswith(_END)}
        for key in keys_of:
            if not key.endswith((_JUDGED, _END)) and keys.version_number(key) not in ended:
                with reading_stored(self.store, key, f"a branch of '{lineage}'", _REMEDY):
                    return parse_stored(self.store.get_bytes(key), Branch)
        return None

    def next_number(self, lineage: str) -> int:
        """Return the number of the lineage's next branch."""
        return sum(not key.endswith((_JUDGED, _END)) for key in self._keys(lineage)) + 1

    def _keys(self, lineage: str) -> list[str]:
        return sorted(info.key for info in self.store.list(keys.branch_folder(lineage)))

    def begin(self, branch: Branch) -> bool:
        """Store a branch with the lineage's next number; False: another writer was faster, and nothing was stored."""
        return write_stored(self.store, keys.branch_key(branch.lineage, branch.number), branch, if_absent=True)

    def judgement(self, branch: Branch) -> Judgement | None:
        """Return the stored judgement of a branch, if there is one."""
        key = keys.branch_judged_key(branch.lineage, branch.number)
        return read_stored(self.store, key, Judgement, what="the judgement of a branch", remedy=_REMEDY)

    def judge(self, branch: Branch, judgement: Judgement) -> None:
        """Store how the result of a branch compares, in place of an earlier judgement."""
        write_stored(self.store, keys.branch_judged_key(branch.lineage, branch.number), judgement)

    def end(self, branch: Branch, end: BranchEnd) -> bool:
        """Store how a branch ended; False: it had ended before."""
        return write_stored(self.store, keys.branch_end_key(branch.lineage, branch.number), end, if_absent=True)


def made_by(branch: Branch, versions: Sequence[Version]) -> dict[str, Version]:
    """Return what a branch has made, by the version whose arrival was learned again."""
    return {version.remakes: version for version in versions if version.branch == branch.number and version.remakes}


def is_swapped(branch: Branch, moves: Sequence[Move]) -> bool:
    """Return whether a branch's own move was the last one of its lineage's champion. Then only its end may be missing.

    A person may make the same version champion, for example the branch's root. That is no swap: nothing was made.
    """
    changes = [move for move in moves if move.before != move.champion]
    return bool(changes) and changes[-1].branch == branch.number


def tip_of(branch: Branch, versions: Sequence[Version]) -> Version | None:
    """Return the newest accepted version of a branch, or its root; None: nothing but the base model."""
    made = made_by(branch, versions)
    accepted = [made[number] for number in branch.arrivals if number in made and made[number].accepted]
    root = next((version for version in versions if version.version == branch.root), None)
    return accepted[-1] if accepted else root
