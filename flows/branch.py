"""Grow a branch: learn arrivals again, one after another, on versions that continue no champion."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from typing import Any, Literal

from prefect import flow
from pydantic import BaseModel

from deal_core.errors import ConfigError, DataValidationError, RegistryError, StoreError, in_one_line
from flows.adapt import learn_arrival
from flows.forget import forget
from flows.lock import lock_lineage
from flows.mlflow import mirror
from flows.requeue import spec_to_relearn
from infra.branches import (
    Attestation,
    Branch,
    BranchEnd,
    Branches,
    KnownBranch,
    Lost,
    Remade,
    Step,
    is_swapped,
    made_by,
    tip_of,
)
from infra.promotions import PromotionLog
from infra.run_journal import RunJournal
from infra.store.base import ObjectStore
from infra.store.keys import TRAIN_FILE
from infra.versions import Version, Versions
from tasks.adaptation.resume import finish_newest, read_findings
from tasks.adaptation.run import Remake
from tasks.context import current_store
from tasks.lineage.branch import require_no_branch, require_unmoved, serve_again
from tasks.lineage.datasets import retains_training_rows
from tasks.lineage.history import find_version
from tasks.lineage.record import read_record
from tasks.lineage.requests import AskedFor
from tasks.lineage.tombstones import find_tombstone
from tasks.progress import reporter, to_the_end
from tasks.references import DatasetRef
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


def plan_steps(
    store: ObjectStore,
    line: Sequence[Version],
    *,
    root: str | None = None,
    without: Collection[str] = (),
    files: Collection[str] = (),
) -> tuple[tuple[Step, ...], tuple[Lost, ...], float]:
    """Return what can be learned again of a line of versions, oldest first, what cannot, and how long it took before.

    An arrival whose file is gone is learned from the rows that the store retains, if it does.

    Args:
        store: The store.
        line: The champion and its ancestors.
        root: The version after which it is learned again; None: from the first on.
        without: Digests of datasets that are left out.
        files: Digests of files that are about to be deleted.
    """
    labels: dict[str, dict[str, None]] = defaultdict(dict)
    numbers = [version.version for version in line]
    num_before = numbers.index(root) + 1 if root else 0
    known = {version.task for version in line[:num_before]}
    steps: list[Step] = []
    lost, seconds, journal = [], 0.0, RunJournal(store)
    for place, version in enumerate(line):
        if version.is_consolidation:  # the arrivals that it learned together are in the line too, each by itself
            continue
        is_kept, is_left_out = False, place < num_before or version.dataset_sha256 in without
        try:
            dataset = read_findings(version.adapter_uri).dataset
            labels[version.task] |= dict.fromkeys(dataset.new_labels)
            if is_left_out:
                continue
            try:
                if set(spec_to_relearn(version)[1]) & set(files):
                    raise DataValidationError("one of its files is deleted with the arrival; land it without that file")
            except (DataValidationError, StoreError):
                has_tests = dataset.num_test > 0 or version.task in known
                is_kept = has_tests and store.exists(f"{dataset.uri}/{TRAIN_FILE}")
                if not is_kept or not retains_training_rows(store, dataset.uri):
                    raise
        except (DataValidationError, StoreError) as error:
            if not is_left_out:
                lost.append(Lost(version=version.version, task=version.task, why=in_one_line(error)))
            continue
        step = Step(
            version=version.version,
            task=version.task,
            labels=tuple(labels[version.task]),
            renews_tests=dataset.renews_tests,
            is_kept=is_kept,
        )
        steps.append(step)
        known.add(version.task)
        run = journal.find(version.lineage, version.run_key)
        took = (run.ended - run.started).total_seconds() if run and run.ended else 0.0
        seconds += max(took, version.train_seconds)
    return tuple(steps), tuple(lost), seconds


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


def begin(branch: Branch, *, accept_lost: bool) -> None:
    """Store a branch, if it is not open already.

    Raises:
        ConfigError: Arrivals cannot be learned again, and nobody has accepted that.
        RegistryError: Another process was faster.
    """
    branches = Branches(current_store())
    if branch.lost and not accept_lost and branches.open(branch.lineage) != branch:
        what = "; ".join(f"{each.task} of version {each.version}: {each.why}" for each in branch.lost)
        raise ConfigError(
            f"{len(branch.lost)} arrivals of '{branch.lineage}' cannot be learned again, and what they taught would be "
            f"lost: {what} Bring their files back, or give --accept-lost."
        )
    if not branches.begin(branch) and branches.open(branch.lineage) != branch:
        raise RegistryError(f"Another process has just begun a branch of '{branch.lineage}'; look: deal status.")


async def grow(branch: Branch, *, skip_rejected: bool) -> Version | str:
    """Learn the steps of a branch that are not done yet; return its tip, or why it stopped.

    The caller holds the lineage. A step whose version its gate rejects, or whose file is refused, stops the branch;
    with `skip_rejected` the next step continues the version before.

    Raises:
        ChampionMovedError: A person has moved the champion since the branch began.
    """
    store, lineage, num_steps = current_store(), branch.lineage, len(branch.steps)
    await to_the_end(finish_newest, store, lineage)
    go_on = f"Go on without it: {branch.command} --skip-rejected"
    # A killed process may have written no end after the swap; nothing is learned any more.
    steps = () if is_swapped(branch, PromotionLog(store).moves(lineage)) else branch.steps
    for number, step in enumerate(steps, 1):
        versions = Versions(store).all(lineage)
        if (made := made_by(branch, versions).get(step.version)) is None:
            require_unmoved(store, branch)  # what is trained now could not be swapped in
            reporter().said(f"Branch {branch.number} of {lineage}, arrival {number} of {num_steps}: {step.task}")
            before = find_version(store, lineage, step.version)
            parent = tip_of(branch, versions)
            remake = Remake(
                branch=branch.number,
                version=step.version,
                parent=parent,
                asked=AskedFor(step.labels, step.renews_tests),
                dataset=_kept_dataset(store, step, before, parent) if step.is_kept else None,
            )
            try:
                spec = _spec_of(store, branch, step, before)
                run = await learn_arrival(spec, False, requeued_sha256=before.dataset_sha256, remake=remake)
            except DataValidationError as error:
                if not skip_rejected:
                    refused = f"the arrival of version {step.version} ({step.task}) is refused"
                    return f"{refused}: {in_one_line(error)} {go_on}"
                reporter().said(f"Left out: {in_one_line(error)}")
                continue
            made = find_version(store, lineage, run.version)
        if not made.accepted and not skip_rejected:
            reasons = " ".join(made.reasons)
            return f"version {made.version} ({made.task}) did not pass its gate: {reasons} {go_on}"
    return tip_of(branch, Versions(store).all(lineage)) or "no arrival passed its gate, so nothing could serve"


def _kept_dataset(store: ObjectStore, step: Step, version: Version, parent: Version | None) -> DatasetRef:
    """Return a version's dataset, with the labels that its task lacks in the new parent."""
    dataset = read_findings(version.adapter_uri).dataset
    known = read_record(store, parent).task(step.task) if parent else None
    new = [label for label in step.labels if known is not None and label not in known.schema.labels]
    # it adds no test rows: their texts may have been learned in the branch
    return dataset.model_copy(update={"new_labels": tuple(new), "num_added": 0})


def _spec_of(store: ObjectStore, branch: Branch, step: Step, version: Version) -> AdaptSpec:
    """Return the spec that learns a version's arrival again. What it left to the lineage is as it was."""
    record = read_record(store, version)
    settled = {
        "base_model": branch.base_model or record.base.source,
        "strategy": record.strategy,
        "adapter": record.adapter,
    }
    if step.is_kept:
        spec = parse(AdaptSpec, read_findings(version.adapter_uri).spec, f"version {version.version}")
    else:
        spec = spec_to_relearn(version)[0]
    return spec.model_copy(update=settled)


def remade_by(branch: Branch) -> tuple[Remade, ...]:
    """Return what a branch has made, in the order of its steps."""
    made = made_by(branch, Versions(current_store()).all(branch.lineage))
    return tuple(
        Remade(
            version=version.version,
            remakes=step.version,
            task=step.task,
            accepted=version.accepted,
            adapter_sha256=version.adapter_sha256,
        )
        for step in branch.steps
        if (version := made.get(step.version)) is not None
    )


def stopped(branch: Branch, why: str, **compared: Any) -> BranchResult:
    """Return that a branch was not swapped in, why, and what to do."""
    message = f"Nothing was swapped: {why.rstrip('.')}. Give up with: deal lineage branch {branch.lineage} --give-up."
    champion = None if branch.stops_serving else branch.champion
    return _result(branch, status="stopped", message=message, champion=champion, **compared)


def swapped(
    branch: Branch,
    tip: Version,
    who: str,
    message: str,
    attestation: Attestation | None = None,
    **compared: Any,
) -> BranchResult:
    """Store that a branch was swapped in, and return it."""
    made = remade_by(branch)
    end = BranchEnd(outcome="swapped", who=who, tip=tip.version, made=made, attestation=attestation)
    Branches(current_store()).end(branch, end)
    champion = Versions(current_store()).champion(branch.lineage)  # a person may have gone back since
    number = champion.version if champion else None
    return _result(branch, status="swapped", message=message, champion=number, attestation=attestation, **compared)


def _result(branch: Branch, **facts: Any) -> BranchResult:
    return BranchResult(lineage=branch.lineage, branch=branch, made=remade_by(branch), **facts)


@flow(name="give-up-branch", flow_run_name="give-up-branch-{lineage}")
async def give_up(lineage: str, who: str = "a deployment") -> KnownBranch:
    """End a lineage's branch without a swap: its champion stays or serves again, and new arrivals are learned.

    Rows that the branch has deleted stay deleted, and are searched for once more.

    Raises:
        RegistryError: The lineage has no open branch.
    """
    store = current_store()
    async with lock_lineage(lineage):
        branch = Branches(store).open(lineage)
        if branch is None:
            raise RegistryError(f"Lineage '{lineage}' has no open branch; there is nothing to give up.")
        if is_swapped(branch, PromotionLog(store).moves(lineage)):
            raise RegistryError(f"The branch was swapped in, and only its end is missing. Go on with: {branch.command}")
        serve_again(store, branch, who)
        end = BranchEnd(outcome="given up", who=who, made=remade_by(branch))
        Branches(store).end(branch, end)
    if (rows := branch.deleted) is not None and find_tombstone(store, rows.task, [rows.sha256]) is not None:
        await forget(rows.sha256)  # what was logged of the rows while the branch was open goes too
    await mirror(lineage)
    return KnownBranch(branch=branch, end=end)
