"""Grow a branch: learn arrivals again, one after another, on versions that continue no champion."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Literal

from prefect import flow
from pydantic import BaseModel

from deal_core.errors import ConfigError, DataValidationError, RegistryError, StoreError, in_one_line
from flows.adapt import learn
from flows.forget import forget
from flows.lock import lock_lineage
from flows.mlflow import mirror
from infra.branches import (
    Attestation,
    Branch,
    BranchEnd,
    Branches,
    Head,
    KnownBranch,
    Lost,
    Remade,
    is_swapped,
    made_by,
    tip_of,
)
from infra.promotions import PromotionLog
from infra.run_journal import RunJournal
from infra.store.base import ObjectStore
from infra.store.opening import open_store
from infra.versions import Version, Versions
from tasks.adaptation.ingest import needs_retained_rows
from tasks.adaptation.resume import finish_newest, read_findings
from tasks.lineage.branch import require_no_branch, require_unmoved, serve_again
from tasks.lineage.history import find_version
from tasks.lineage.record import read_record
from tasks.lineage.tombstones import find_tombstone
from tasks.progress import reporter, to_the_end
from tasks.spec import AdaptSpec, parse


class BranchPlan(BaseModel, frozen=True):
    """What a branch would learn, and how long that took before."""

    branch: Branch
    seconds: float
    """Sum of the times of the runs that are repeated."""


class BranchResult(BaseModel, frozen=True):
    """How far a branch has come."""

    lineage: str
    status: Literal["swapped", "stopped"]
    """swapped: the versions made again serve. stopped: nothing was swapped, and the same command goes on."""
    message: str
    """The outcome in one sentence."""
    branch: Branch
    made: tuple[Remade, ...]
    champion: str | None
    attestation: Attestation | None = None
    """None: no rows were deleted, or it is not over."""
    before: dict[str, float] = {}
    """Accuracy of the champion that is replaced, by task; empty: it was not compared."""
    accuracies: dict[str, float] = {}
    """Accuracy of the last version that was made, by task, on the same test rows."""
    num_rows: dict[str, int] = {}
    """These test rows, by task."""


def find_relearnable(
    store: ObjectStore,
    line: Sequence[Version],
    *,
    root: str | None = None,
    without: Collection[str] = (),
    files: Collection[str] = (),
) -> tuple[dict[str, str], tuple[Lost, ...], float]:
    """Return what can be learned again of a line of versions, oldest first, what cannot, and how long it took before.

    An arrival whose file is gone is learned from the rows that the store retains, if it does.

    Args:
        store: The store.
        line: The champion and its ancestors.
        root: The version after which it is learned again; None: from the first on.
        without: Digests of datasets that are left out.
        files: Digests of files that are about to be deleted.
    """
    numbers = [version.version for version in line]
    num_before = numbers.index(root) + 1 if root else 0
    known = {version.task for version in line[:num_before]}
    arrivals: dict[str, str] = {}
    lost, seconds, journal = [], 0.0, RunJournal(store)
    for version in line[num_before:]:
        # The arrivals that a consolidation learned together are in the line too, each by itself.
        if version.is_consolidation or version.dataset_sha256 in without:
            continue
        try:
            needs_retained_rows(store, version, knows_task=version.task in known, deleted=files)
        except (DataValidationError, StoreError) as error:
            lost.append(Lost(version=version.version, task=version.task, why=in_one_line(error)))
            continue
        arrivals[version.version] = version.task
        known.add(version.task)
        run = journal.find(version.lineage, version.run_key)
        took = (run.ended - run.started).total_seconds() if run and run.ended else 0.0
        seconds += max(took, version.train_seconds)
    return arrivals, tuple(lost), seconds


def require_quiet(store: ObjectStore, lineage: str) -> Version:
    """Return the champion; raise an error if a branch cannot begin now.

    Raises:
        BranchOpenError: There is an open branch.
        RegistryError: The lineage has no champion, or a version waits for a person or for the end of its rollout.
    """
    require_no_branch(store, lineage)
    champion = find_version(store, lineage, None)
    waiting = [version for version in Versions(store).all(lineage) if version.standing == "awaiting approval"]
    opened = PromotionLog(store).open_rollout(lineage)
    number = opened.version if opened else waiting[0].version if waiting else None
    if number is not None:
        raise RegistryError(
            f"Version {number} of '{lineage}' continues the champion, and nobody has decided about it yet. First "
            f"promote or reject it: deal version promote {number} --lineage {lineage}, or deal version reject {number} "
            f"--reason REASON --lineage {lineage}."
        )
    return champion


def begin(store: ObjectStore, branch: Branch, *, accept_lost: bool) -> None:
    """Store a branch, if it is not open already.

    Raises:
        ConfigError: Arrivals cannot be learned again, and nobody has accepted that.
        RegistryError: Another process was faster.
    """
    branches = Branches(store)
    if branch.lost and not accept_lost and branches.open(branch.lineage) != branch:
        what = "; ".join(f"{each.task} of version {each.version}: {each.why}" for each in branch.lost)
        raise ConfigError(
            f"{len(branch.lost)} arrivals of '{branch.lineage}' cannot be learned again, and what they taught would be "
            f"lost: {what} Bring their files back, or give --accept-lost."
        )
    if not branches.begin(branch) and branches.open(branch.lineage) != branch:
        raise RegistryError(f"Another process has just begun a branch of '{branch.lineage}'; look: deal status.")


async def grow(store: ObjectStore, branch: Branch, *, skip_rejected: bool) -> Version | str:
    """Learn the arrivals of a branch that are not learned yet; return its tip, or why it stopped.

    The caller holds the lineage. A version that its gate rejects, or a file that is refused, stops the branch; with
    `skip_rejected` the next arrival continues the version before.

    Raises:
        ChampionMovedError: A person has moved the champion since the branch began.
    """
    lineage, head = branch.lineage, Head(lineage=branch.lineage, branch=branch.number)
    await to_the_end(finish_newest, store, lineage)
    go_on = f"Go on without it: {branch.command} --skip-rejected"
    # A killed process may have written no end after the swap; nothing is learned any more.
    arrivals = {} if is_swapped(branch, PromotionLog(store).moves(lineage)) else branch.arrivals
    for place, (number, task) in enumerate(arrivals.items(), 1):
        made = made_by(branch, Versions(store).all(lineage)).get(number)
        if made is None:
            require_unmoved(store, branch)  # what is trained now could not be swapped in
            reporter().said(f"Branch {branch.number} of {lineage}, arrival {place} of {len(arrivals)}: {task}")
            before = find_version(store, lineage, number)
            try:
                result = await learn(store, _spec_of(store, branch, before), head, relearns=before)
            except DataValidationError as error:
                if not skip_rejected:
                    refused = f"the arrival of version {number} ({task}) is refused"
                    return f"{refused}: {in_one_line(error)} {go_on}"
                reporter().said(f"Left out: {in_one_line(error)}")
                continue
            made = find_version(store, lineage, result.version)
        if not made.accepted and not skip_rejected:
            reasons = " ".join(made.reasons)
            return f"version {made.version} ({made.task}) did not pass its gate: {reasons} {go_on}"
    return tip_of(branch, Versions(store).all(lineage)) or "no arrival passed its gate, so nothing could serve"


def _spec_of(store: ObjectStore, branch: Branch, version: Version) -> AdaptSpec:
    """Return the spec that learns a version's arrival again. What it left to the lineage is as it was."""
    record = read_record(store, version)
    settled = {
        "base_model": branch.base_model or record.base.source,
        "strategy": record.strategy,
        "adapter": record.adapter,
    }
    spec = parse(AdaptSpec, read_findings(store, version.adapter_uri).spec, f"version {version.version}")
    return spec.model_copy(update=settled)


def remade_by(store: ObjectStore, branch: Branch) -> tuple[Remade, ...]:
    """Return what a branch has made, in the order of its arrivals."""
    made = made_by(branch, Versions(store).all(branch.lineage))
    return tuple(
        Remade(
            version=version.version,
            remakes=number,
            task=task,
            accepted=version.accepted,
            adapter_sha256=version.adapter_sha256,
        )
        for number, task in branch.arrivals.items()
        if (version := made.get(number)) is not None
    )


def stopped(store: ObjectStore, branch: Branch, why: str, **compared: Any) -> BranchResult:
    """Return that a branch was not swapped in, why, and what to do."""
    message = f"Nothing was swapped: {why.rstrip('.')}. Give up with: deal lineage branch {branch.lineage} --give-up."
    champion = None if branch.stops_serving else branch.champion
    return _result(store, branch, status="stopped", message=message, champion=champion, **compared)


def swapped(
    store: ObjectStore,
    branch: Branch,
    tip: Version,
    who: str,
    message: str,
    attestation: Attestation | None = None,
    **compared: Any,
) -> BranchResult:
    """Store that a branch was swapped in, and return it."""
    made = remade_by(store, branch)
    end = BranchEnd(outcome="swapped", who=who, tip=tip.version, made=made, attestation=attestation)
    Branches(store).end(branch, end)
    champion = Versions(store).champion(branch.lineage)  # a person may have gone back since
    number = champion.version if champion else None
    return _result(
        store, branch, status="swapped", message=message, champion=number, attestation=attestation, **compared
    )


def _result(store: ObjectStore, branch: Branch, **facts: Any) -> BranchResult:
    return BranchResult(lineage=branch.lineage, branch=branch, made=remade_by(store, branch), **facts)


@flow(name="give-up-branch", flow_run_name="give-up-branch-{lineage}")
async def give_up(lineage: str, who: str = "a deployment") -> KnownBranch:
    """End a lineage's branch without a swap: its champion stays or serves again, and new arrivals are learned.

    Rows that the branch has deleted stay deleted, and are searched for once more.

    Raises:
        RegistryError: The lineage has no open branch.
    """
    store = open_store()
    async with lock_lineage(lineage):
        branch = Branches(store).open(lineage)
        if branch is None:
            raise RegistryError(f"Lineage '{lineage}' has no open branch; there is nothing to give up.")
        if is_swapped(branch, PromotionLog(store).moves(lineage)):
            raise RegistryError(f"The branch was swapped in, and only its end is missing. Go on with: {branch.command}")
        serve_again(store, branch, who)
        end = BranchEnd(outcome="given up", who=who, made=remade_by(store, branch))
        Branches(store).end(branch, end)
    if (rows := branch.deleted) is not None and find_tombstone(store, rows.task, [rows.sha256]) is not None:
        await forget(rows.sha256)  # what was logged of the rows while the branch was open goes too
    await mirror(store, lineage)
    return KnownBranch(branch=branch, end=end)
