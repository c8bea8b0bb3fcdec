"""The versions of a lineage: one object each in the store, which says everything about the version and never changes.

    versions/LINEAGE/NUMBER.json           the version
    versions/LINEAGE/NUMBER.files.json     the digests of its files since `deal data delete` replaced some
    versions/LINEAGE/NUMBER.removed.json   the day on which `deal data gc` removed its adapter

Which version serves, waits or was rejected by a person is in the promotion log. `Versions` reads both, and gives each
version what became of it as `since`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from deal_core.adapter.files import Recorded
from deal_core.errors import RegistryError, StoreError
from deal_core.evaluation.arrival_check import ArrivalScore
from deal_core.judging_config import RolloutTerms
from deal_core.safe_text import without_secrets
from deal_core.shown import Shown
from infra.outcomes import Outcome, Standing
from infra.promotions import ENDING, UNTIL_THEN, Change, Move, PromotionLog, rollout_of
from infra.store import keys
from infra.store.base import ObjectStore
from infra.store.stored import Stored, parse_stored, read_folder, reading_stored, write_stored

Alias = Literal["champion", "challenger", "previous", "rollout"]
"""champion serves, previous served before it, and challenger is the newest version that was accepted and not rolled
back. rollout is tried on live traffic."""
ApprovalState = Literal["awaiting", "given", "refused"]
SCORES = ("average_accuracy", "forgetting", "backward_transfer", "forward_transfer")
ROLLOUT = "rollout"
"""The name in the promotion log for an end of a rollout without a person."""
UNREGISTERED = "0"


class LearnedArrival(BaseModel):
    """An arrival that a version was trained on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    task: str
    dataset_sha256: str
    rows: Literal["all", "kept"] = "all"
    """kept: only those that the method had kept of its task."""


class ArrivalDigests(BaseModel, frozen=True):
    """What names an arrival, wherever its rows are."""

    task: str
    sha256: str
    """Digest of the dataset, or of the file if it gave no dataset."""
    files: tuple[str, ...] = ()
    """Digests of the files that landed, including a test file."""
    splits: tuple[str, ...] = ()
    """Digests of other datasets with the same landed rows but another split."""
    landed: tuple[str, ...] = ()
    """Digests of the landed rows, without the split."""


class Rollback(BaseModel, frozen=True, from_attributes=True):
    """The rollback that took a version out of the champion's line."""

    champion: str | None
    """The version that became champion again."""
    when: datetime
    who: str
    why: str

    def describe(self) -> str:
        """Return it in one line."""
        to = "" if self.champion is None else f" to version {self.champion}"
        return f"rolled back{to} on {self.when:%Y-%m-%d} by {self.who}: {self.why}"


class Since(BaseModel):
    """What became of a version after it was registered, by the promotion log and by later notes about it."""

    model_config = ConfigDict(frozen=True)

    aliases: tuple[Alias, ...] = ()
    approval: ApprovalState | None = None
    promoted: int | None = None
    """Number of the newest entry of the promotion log that promoted it; None: it was never promoted."""
    rolled_out: int | None = None
    """Number of the entry that began its rollout; None: none began."""
    refused_by: str | None = None
    rolled_back: Rollback | None = None
    """None: it was never rolled back, or serves again since, itself or in a version that continues it."""
    adapter: str = ""
    """Full address of its PEFT folder."""
    adapter_removed: str | None = None
    """The day on which its adapter was removed."""
    standing: Standing = "left behind"


class Version(Stored):
    """A version of a lineage: an adapter, its origin, its scores, the decision of the gate, and what became of it.

    This is the one model of a version: what is stored of it, what `--json` prints, and what a person sees. A table has
    the fields that have a `Shown`, in this order. Scores and accuracies are 0 to 1 (points of forgetting and transfer
    divided by 100), None where a lineage has too few tasks for them.
    """

    NOT_STORED: ClassVar = frozenset({"since"})

    lineage: str
    version: Annotated[str, Shown()] = UNREGISTERED
    """Its number as text, as commands name it."""
    kind: Literal["adaptation", "consolidation"] = "adaptation"
    """An adaptation has learned one arrival. A consolidation has learned all that is left of all arrivals together."""
    parent_version: Annotated[str | None, Shown("parent", words={None: "base"})]
    """The version that it continues; None: it starts from the base model. A consolidation is judged against it."""
    starts_from_base: bool = False
    """Whether it is a consolidation whose weights start from the base model, not from its parent's."""
    task: Annotated[str, Shown("task", of="learned")]
    """The task that it learned; of a consolidation the task that its parent learned last."""
    arrivals: tuple[LearnedArrival, ...] = ()
    """The arrivals that a consolidation learned, oldest first; empty for an adaptation."""
    average_accuracy: Annotated[float | None, Shown("accuracy", unit="%")]
    """Mean accuracy on all tasks that it knows."""
    forgetting: Annotated[float | None, Shown(unit="%")]
    """Mean of what the earlier tasks have lost since their best version; below 0: a gain."""
    backward_transfer: float | None
    """Mean of what the earlier tasks have gained since they were learned."""
    forward_transfer: float | None
    """Mean of what a task had gained over the base model before it was learned."""
    debts: Annotated[
        Mapping[str, float],
        Shown("debt", unit="points", of="most_lost", spare=1, only="table"),
        Shown("lost since it was learned", unit="points", only="facts"),
    ] = {}
    """Points that each task has lost since it was learned, over all versions together; below 0: gained."""
    arrival: Annotated[ArrivalScore | None, Shown("on arrival", unit="%", format=ArrivalScore.score, spare=4)] = None
    """What the version before it scored on the arrival before anything was trained on it; None: the task was new, or no
    row could be asked."""
    general: Annotated[Mapping[str, float], Shown("general ability", unit="%", only="facts")] = {}
    """Its score on each suite of general ability that is on, 0 to 1."""
    base_divergence: Annotated[
        float | None, Shown("KL to the base model", unit="nats a token", format=".3f", only="facts")
    ] = None
    """How far it is from the base model on test rows of the task that it learned: KL(base ‖ version) in nats per answer
    token; None: not measured."""
    accuracies: Mapping[str, float]
    """Its row of the accuracy matrix, by task. The whole matrix is in its record."""
    strategy: Annotated[str, Shown(spare=2)]
    branch: Annotated[int | None, Shown(spare=5)] = None
    """The branch that made it (deal lineage branch); None: it was made to continue the champion."""
    remakes: str | None = None
    """The version whose arrival it learned again, if a branch made it."""
    accepted: Annotated[bool, Shown("state", of="state", is_state=True)]
    """Whether its gate accepted it."""
    reasons: tuple[str, ...] = ()
    """Why the gate rejected it."""
    failed_checks: tuple[Mapping[str, Any], ...] = ()
    """The reasons for programs: kind, task, value and limit of each."""
    unsure: tuple[str, ...] = ()
    """If its gate accepted it: the tasks on which the gate could not have seen a drop of gate.max_drop_points, and
    what it could have seen."""
    needs_approval: bool = False
    """Whether a person has to approve it before it becomes champion."""
    rollout: RolloutTerms | None = None
    """How it is tried on live traffic before it becomes champion; None: it is not."""
    since: Annotated[Since, Shown("alias", of="aliases")] = Since()
    """What became of it."""
    created: Annotated[
        datetime, Shown("when", format="%m-%d %H:%M", spare=3, only="table"), Shown("when", only="facts")
    ] = Field(default_factory=lambda: datetime.now(UTC))
    moves_before: int = 0
    """Number of the newest entry of the promotion log when it was registered; 0: the log had none."""
    dataset_sha256: Annotated[str, Shown("dataset", format=".12", only="facts")]
    """Digest of the dataset that it learned."""
    landed_sha256: str
    """Digest of the arrival's rows, independent of the lineage's test rows."""
    requeued_sha256: str | None = None
    """Digest of the dataset of the version that a requeue replaced by this version."""
    base_sha256: str
    config_sha256: str
    run_key: str
    """Key of its adaptation. At most one version has it."""
    flow_run: str | None = None
    """Id of the flow run that trained it. A restarted run keeps its id."""
    train_seconds: float
    launch: str = "local"
    """What started the processes of its training, as DEAL_LAUNCH."""
    shard: str = "none"
    """What they shared of the base model, as DEAL_SHARD."""
    adapter_uri: str
    """Its PEFT folder, relative to the store."""
    adapter_sha256: str
    """Digest of all files of the trained adapter together; see `sha256_together`."""
    files_sha256: Recorded
    """The digests that each file of the adapter may have, by name."""

    @property
    def short_key(self) -> str:
        """The part of the run's key that folder names use."""
        return keys.short_run(self.run_key)

    @property
    def digests(self) -> frozenset[str]:
        """Digests of the arrival. Two versions of a lineage learned the same arrival if they share a digest."""
        return frozenset(filter(None, (self.dataset_sha256, self.landed_sha256, self.requeued_sha256)))

    @property
    def is_consolidation(self) -> bool:
        """Whether it learned many arrivals together."""
        return self.kind == "consolidation"

    @property
    def trained_on(self) -> tuple[LearnedArrival, ...]:
        """The arrivals that it was trained on: its own, or those of a consolidation."""
        if self.is_consolidation:
            return self.arrivals
        return (LearnedArrival(task=self.task, dataset_sha256=self.dataset_sha256),)

    @property
    def learned(self) -> str:
        """What it learned, in a few words."""
        return f"{len(self.arrivals)} arrivals together" if self.is_consolidation else self.task

    @property
    def most_lost(self) -> float | None:
        """The points that the task has lost which has lost most since it was learned; None: no task has lost any."""
        lost = max(self.debts.values(), default=0.0)
        return lost if lost > 0 else None

    @property
    def parent(self) -> str:
        """Its parent, in words."""
        return f"version {self.parent_version}" if self.parent_version else "the base model"

    @property
    def origin(self) -> str:
        """What it continues, in words."""
        if self.starts_from_base:
            return f"starts from the base model, in place of {self.parent}"
        return f"continues {self.parent}" if self.parent_version else "starts from the base model"

    @property
    def approval(self) -> ApprovalState | None:
        """State of a person's approval; None: none is needed, and nobody has decided about it."""
        return self.since.approval

    @property
    def aliases(self) -> tuple[Alias, ...]:
        """The names that it has in its lineage."""
        return self.since.aliases

    @property
    def standing(self) -> Standing:
        """What it is now."""
        return self.since.standing

    @property
    def state(self) -> str:
        """Its standing, and whether its gate could not have seen a drop."""
        return f"{self.standing}, unsure" if self.unsure and self.accepted else self.standing

    @property
    def is_rejected(self) -> bool:
        """Whether its gate, its rollout or a person rejected it."""
        return not self.accepted or self.approval == "refused"

    @property
    def outcome(self) -> Outcome:
        """How its run ended, or that it was promoted since, or rejected."""
        if self.is_rejected:
            return "rejected"
        if self.since.promoted is not None:
            return "promoted"
        if self.branch is not None:
            return "remade"
        if self.approval == "awaiting":
            return "awaiting approval"
        return "promoted" if self.rollout is None else "rollout"


class Decision(Change):
    """A move of the champion or a rejection, and what it leaves behind."""

    left_behind: tuple[Version, ...] = ()
    """Versions whose arrivals only the earlier champion had learned; `deal version requeue` learns them again."""


class _Files(Stored):
    files_sha256: Recorded


class _Removed(Stored):
    day: str


class Versions:
    """The versions of a store's lineages."""

    def __init__(self, store: ObjectStore) -> None:
        self.store = store

    def all(self, lineage: str) -> tuple[Version, ...]:
        """Return the versions of a lineage, oldest first; empty if the lineage is unknown.

        Raises:
            StoreError: A version or an entry of the promotion log is damaged, or another release wrote it; the log
                names a version that is missing; or a version names an entry of the log that is missing. Without its
                champion, a lineage would learn from the base model again.
        """
        log = PromotionLog(self.store)
        moves = log.moves(lineage)  # before the versions: a move names a version that is stored
        versions: dict[str, Version] = {}
        replaced: dict[str, Recorded] = {}
        removed: dict[str, str] = {}
        for key, content in read_folder(self.store, keys.version_folder(lineage)).items():
            number, entry = keys.version_number(key), self.parse(key, content)
            if isinstance(entry, Version):
                versions[number] = entry
            elif isinstance(entry, _Files):
                replaced[number] = entry.files_sha256
            elif isinstance(entry, _Removed):
                removed[number] = entry.day
        for move in moves:
            if move.version not in versions:
                folder = without_secrets(self.store.uri_of(keys.version_folder(lineage)))
                what, remedy = _named(lineage, move.version)
                raise StoreError(f"{folder} lacks {what}, which the promotion log names. {remedy}")
        last = max([move.number for move in moves] + [version.moves_before for version in versions.values()], default=0)
        if last > len(moves):
            if last <= len(log.moves(lineage)):  # entries were written while these files were read
                return self.all(lineage)
            folder = without_secrets(self.store.uri_of(keys.promotion_folder(lineage)))
            raise StoreError(
                f"{folder}, the promotion log of '{lineage}', has {len(moves)} of at least {last} entries. Restore the "
                f"folder from a backup of the store. {UNTIL_THEN}",
                code="moves-lost",
            )
        since = _since(tuple(versions.values()), moves, removed, self.store.uri_of)
        return tuple(
            version.model_copy(
                update={"since": since[number], "files_sha256": replaced.get(number, version.files_sha256)}
            )
            for number, version in versions.items()
        )

    def parse(self, key: str, content: bytes) -> Stored:
        """Return the entry with a key: a version, or a later note about one.

        Raises:
            StoreError: The entry is damaged, is that of another version, or another release wrote it.
        """
        lineage, number = keys.lineage_of(key), keys.version_number(key)
        model = _Files if key.endswith(".files.json") else _Removed if key.endswith(".removed.json") else Version
        with reading_stored(self.store, key, *_named(lineage, number)):
            entry = parse_stored(content, model)
            if isinstance(entry, Version) and (entry.lineage, entry.version) != (lineage, number):
                raise ValueError(f"it is that of version {entry.version} of '{entry.lineage}'")
            return entry

    def find(self, lineage: str, version: str) -> Version | None:
        """Return the version with a number, if there is one."""
        return next((stored for stored in self.all(lineage) if stored.version == version), None)

    def champion(self, lineage: str) -> Version | None:
        """Return the lineage's champion, if it has one."""
        return champion_of(self.all(lineage))

    def with_run_key(self, lineage: str, run_key: str) -> Version | None:
        """Return the version that a run registered, if it did."""
        return next((version for version in self.all(lineage) if version.run_key == run_key), None)

    def lineages(self) -> tuple[str, ...]:
        """Return the names of the lineages with a version, in alphabetical order."""
        versions = (info.key for info in self.store.list(keys.VERSIONS) if info.key.count("/") == 2)
        return tuple(sorted({keys.lineage_of(key) for key in versions}))

    def register(self, version: Version) -> Version:
        """Give a version the next number and store it; return the version of the same run if there is one already.

        Of several processes at once each gets another number: the put of a number that is taken stores nothing.
        """
        assert version.version == UNREGISTERED, "a version is registered once"
        while True:
            versions = self.all(version.lineage)
            for registered in versions:
                if registered.run_key == version.run_key:
                    return registered
            number = int(versions[-1].version) + 1 if versions else 1
            last = PromotionLog(self.store).last(version.lineage)
            numbered = version.model_copy(
                update={
                    "version": str(number),
                    "created": datetime.now(UTC),
                    "moves_before": last.number if last else 0,
                }
            )
            if write_stored(self.store, keys.version_key(version.lineage, number), numbered, if_absent=True):
                return next(stored for stored in self.all(version.lineage) if stored.version == numbered.version)

    def note_files(self, version: Version, files_sha256: Recorded) -> None:
        """Write down which digests the files of a version's adapter may have from now on."""
        key = keys.version_note_key(version.lineage, int(version.version), "files")
        write_stored(self.store, key, _Files(files_sha256=files_sha256))

    def note_removed(self, lineage: str, version: str, day: str) -> bool:
        """Write down that a version's adapter is removed; False: it is known. The version stays in the history.

        The note comes before the files go. Who makes a version champion looks for its note after the move, so of a
        removal and a move at once one sees the other.
        """
        key = keys.version_note_key(lineage, int(version), "removed")
        return write_stored(self.store, key, _Removed(day=day), if_absent=True)

    def keep_after_all(self, lineage: str, version: str) -> None:
        """Take back the note that a version's adapter is removed. Its files must all be there."""
        self.store.delete(keys.version_note_key(lineage, int(version), "removed"))


def champion_of(versions: Sequence[Version]) -> Version | None:
    """Return the champion among the versions of a lineage."""
    return next((version for version in versions if "champion" in version.aliases), None)


def descent(versions: Sequence[Version], version: Version | None) -> tuple[Version, ...]:
    """Return a version and its ancestors, newest first. Without a version the result is empty."""
    by_number = {entry.version: entry for entry in versions}
    line: list[Version] = []
    while version is not None:
        line.append(version)
        version = by_number.get(version.parent_version or "")
    return tuple(line)


def require_adapter(version: Version) -> None:
    """Raise RegistryError if the adapter of a version was removed."""
    if day := version.since.adapter_removed:
        raise RegistryError(
            f"The adapter of version {version.version} of '{version.lineage}' was removed on {day} (deal data gc, or "
            "deal data delete --relearn); its history is left. Name another version."
        )


def remedy_for(version: Version) -> str:
    """Return the remedy for a damaged adapter."""
    lineage, parent = version.lineage, version.parent_version
    back = f", or go back to an earlier version: deal version rollback {parent} --lineage {lineage}" if parent else ""
    return f"Restore the folder from a backup{back} (deal version list --lineage {lineage} lists the versions)."


def _named(lineage: str, number: str) -> tuple[str, str]:
    """The name of a version's file, and the remedy if it is damaged."""
    return (
        f"the entry of version {number} of '{lineage}'",
        "Restore it from a backup of the store. Until then nothing is learned, and the lineage's history cannot be "
        "read.",
    )


def _since(
    versions: Sequence[Version], moves: Sequence[Move], removed: Mapping[str, str], uri_of: Callable[[str], str]
) -> dict[str, Since]:
    """What became of each version, by its number. Both sequences are oldest first."""
    promoted: dict[str, int] = {}
    rolled_out: dict[str, int] = {}
    refused_by: dict[str, str] = {}
    rolled_back: dict[str, Rollback] = {}
    by_number = {version.version: version for version in versions}
    approval: dict[str, ApprovalState | None] = {
        version.version: "awaiting" if version.accepted and version.needs_approval else None for version in versions
    }
    for move in moves:
        if move.action == "rejected":
            approval[move.version], refused_by[move.version] = "refused", move.who
        elif move.action in ("promoted", "rollout"):
            (promoted if move.action == "promoted" else rolled_out)[move.version] = move.number
            if move.run is None and move.branch is None:  # a person decided
                approval[move.version] = "given"
        if move.action == "rolled back" or (move.action in ENDING and rolled_back):
            line = {version.version for version in descent(versions, by_number.get(move.champion or ""))}
            if move.action == "rolled back":
                before = {version.version for version in descent(versions, by_number.get(move.before or ""))}
                rolled_back |= dict.fromkeys(before, Rollback.model_validate(move))
            rolled_back = {number: rollback for number, rollback in rolled_back.items() if number not in line}
    good = [
        number
        for number, version in by_number.items()
        if version.accepted and approval[number] != "refused" and number not in rolled_back
    ]
    swapped = {move.branch for move in moves}
    changes = [move.before for move in moves if move.before is not None and move.before != move.champion]
    tried = rollout_of(moves)
    aliases: dict[Alias, str | None] = {
        "challenger": good[-1] if good else None,
        "champion": moves[-1].champion if moves else None,
        "previous": changes[-1] if changes else None,
        "rollout": tried.version if tried else None,
    }
    champion = by_number.get(aliases["champion"] or "")
    learned = {version.version for version in descent(versions, champion)}
    since = {}
    for version in versions:
        number = version.version
        standing: Standing = "left behind"
        if not version.accepted:
            standing = "rejected by the gate"
        elif approval[number] == "refused":
            standing = "rejected by its rollout" if refused_by[number] == ROLLOUT else "rejected by a person"
        elif number in learned:
            standing = "learned"
        elif number == aliases["rollout"]:
            standing = "rollout"
        elif version.branch is not None and version.branch not in swapped:
            standing = "remade"
        elif approval[number] == "awaiting" and version.parent_version == aliases["champion"]:
            standing = "awaiting approval"
        since[number] = Since(
            aliases=tuple(alias for alias, named in aliases.items() if named == number),
            approval=approval[number],
            promoted=promoted.get(number),
            rolled_out=rolled_out.get(number),
            refused_by=refused_by.get(number),
            rolled_back=rolled_back.get(number),
            adapter=uri_of(version.adapter_uri),
            adapter_removed=removed.get(number),
            standing=standing,
        )
    return since
