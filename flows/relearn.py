"""Relearn: delete an arrival, and make again every version that learned from it, as if the arrival had never been."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, get_args

from prefect import flow

from deal_core.errors import ConfigError
from flows.branch import BranchPlan, BranchResult, begin, find_relearnable, grow, require_quiet, stopped, swapped
from flows.forget import forget
from flows.lock import lock_lineage
from infra.branches import Attestation, Branch, Branches, DeletedRows, Judgement
from infra.store import keys
from infra.store.base import ObjectStore
from infra.store.opening import open_store
from infra.versions import Version, Versions, champion_of, descent
from tasks.adaptation.gate import judge_against
from tasks.adaptation.resume import FINDINGS_FILE
from tasks.housekeeping.arrivals import KnownArrival, find_arrival
from tasks.housekeeping.forgetting import ForgetPlan, Kind, affected_versions, plan_forgetting
from tasks.lineage.branch import ChampionMovedError, stop_serving, swap_in
from tasks.lineage.history import find_version
from tasks.mlflow_mirror import sync_lineage
from tasks.progress import reporter, to_the_end
from tasks.serving.exports import remove_exports


class RelearnPlan(BranchPlan, frozen=True):
    """What `deal data delete --relearn` removes, makes again, and loses."""

    forget: ForgetPlan


def plan_relearn(
    store: ObjectStore, lineage: str, named: str, *, stops_serving: bool = False, who: str = ""
) -> RelearnPlan:
    """Return what `relearn` would do; change nothing.

    Args:
        store: The store, which has the lineage.
        lineage: The lineage whose versions are made again.
        named: The arrival, as for `deal data delete`.
        stops_serving: Whether no version serves until the swap.
        who: Who asks.

    Raises:
        ConfigError: There is no such arrival, or nothing would be left to serve.
        RegistryError: The lineage cannot begin a branch now.
    """
    arrival = find_arrival(store, named)
    if (branch := _open_branch(store, lineage, arrival)) is not None:
        return RelearnPlan(branch=branch, seconds=0.0, forget=plan_forgetting(store, arrival))
    champion, plan = require_quiet(store, lineage), plan_forgetting(store, arrival)
    sha256s = {plan.sha256, *plan.splits}
    versions = Versions(store).all(lineage)
    affected = {version.version for version in affected_versions(versions, sha256s)}
    line = descent(versions, champion)[::-1]
    # What came after the newest version that never saw the rows is made again. A consolidation from the base model may
    # stand between older versions that saw them and a champion that did not.
    root = next((version.version for version in reversed(line) if version.version not in affected), None)
    arrivals, lost, seconds = find_relearnable(store, line, root=root, without=sha256s, files=plan.files)
    if root is None and not arrivals:
        raise ConfigError(
            f"Without arrival {plan.sha256[:12]} lineage '{lineage}' has learned nothing that can be learned again, so "
            "no version would serve. Delete the rows without --relearn, and start a new lineage."
        )
    deleted = DeletedRows(
        **plan.model_dump(include={"task", "sha256", "files", "splits", "landed"}),
        versions=tuple(version.version for version in versions if version.version in affected),
        others=tuple(f"{each.lineage}/{each.version}" for each in plan.learned if each.lineage != lineage),
        places=tuple(f"{place.kind}: {place.address}" for place in plan.held),
    )
    branch = Branch(
        lineage=lineage,
        number=Branches(store).next_number(lineage),
        who=who,
        root=root,
        champion=champion.version,
        arrivals=arrivals,
        lost=lost,
        stops_serving=stops_serving and root != champion.version,
        deleted=deleted,
    )
    return RelearnPlan(branch=branch, seconds=seconds, forget=plan)


@flow(name="relearn", flow_run_name="relearn-{lineage}")
async def relearn(
    lineage: str,
    named: str,
    reason: str = "",
    skip_rejected: bool = False,
    stops_serving: bool = False,
    accept_lost: bool = False,
    who: str = "a deployment",
) -> BranchResult:
    """Delete an arrival, and make every version that learned from it again. A call that was killed is repeated.

    The order: the branch is stored, so that new arrivals wait. The rows are removed everywhere. The later arrivals are
    learned again on the last version that never saw the rows. The result is judged against the champion. If it is worse
    beyond the limits, the call ends here until a person has accepted the result. One move of the promotion log makes
    the last of the new versions champion. The versions that saw the rows lose their adapters, and an attestation is
    stored.

    Args:
        lineage: The lineage.
        named: The arrival, as for `deal data delete`.
        reason: Reason for the history. It must not quote any rows.
        skip_rejected: Go on without an arrival whose new version its gate rejects.
        stops_serving: Let no version serve until the swap.
        accept_lost: Go on although arrivals cannot be learned again.
        who: Who asks.

    Raises:
        ConfigError: There is no such arrival, or arrivals would be lost.
        RegistryError: The lineage cannot begin a branch now.
        ChampionMovedError: A person has moved its champion since.
    """
    store = open_store()
    async with lock_lineage(lineage):  # no run works on the lineage, and later ones see the branch
        branch = plan_relearn(store, lineage, named, stops_serving=stops_serving, who=who).branch
        begin(store, branch, accept_lost=accept_lost)
        if branch.stops_serving:
            stop_serving(store, branch)
    assert branch.deleted is not None, "it is one of a relearning"
    await forget(branch.deleted.sha256, reason)
    async with lock_lineage(lineage):
        tip = await grow(store, branch, skip_rejected=skip_rejected)
        if isinstance(tip, str):
            return stopped(store, branch, tip)
        judgement = await _judge(store, branch, tip)
        figures: dict[str, Any] = (
            judgement.model_dump(include={"before", "accuracies", "num_rows"}) if judgement else {}
        )
        if judgement and judgement.waits:
            worse = f"version {tip.version} may be worse than version {branch.champion}. {' '.join(judgement.reasons)}"
            accept = f"Accept it with: deal lineage branch {lineage} --accept --reason REASON"
            return stopped(store, branch, f"{worse} {accept}", **figures)
        swap_in(store, branch, tip, who, judgement.accepted.why if judgement and judgement.accepted else "")
        reporter().said(f"Version {tip.version} is champion; the versions that saw the rows lose their adapters.")
        _remove_adapters(store, branch)
        exports = remove_exports(store, lineage, branch.deleted.versions)
        synced = await to_the_end(sync_lineage, store, lineage)
    # Every place is searched once more, after the swap and the last adapter. The digests of the inputs are those that
    # the first search stored.
    again = await forget(branch.deleted.sha256, reason)
    attestation = Attestation(
        removed=branch.deleted.versions,
        searched=get_args(Kind),
        exports_removed=exports.removed,
        exports_left=exports.left,
        num_inputs=len(again.plan.inputs),
        unknown=again.plan.unknown,
        waits_for_mlflow=synced.problem is not None or lineage in again.waits_for_mlflow,
        judgement=judgement,
    )
    champion = find_version(store, lineage, None)  # a person may have gone back to the root since
    never = f"It never saw arrival {branch.deleted.sha256[:12]} of {branch.deleted.task}."
    message = f"Version {champion.version} of {lineage} is champion. {never}"
    return swapped(store, branch, tip, who, message, attestation, **figures)


async def _judge(store: ObjectStore, branch: Branch, tip: Version) -> Judgement | None:
    """Return how a branch's last version compares with the champion that it replaces; None: that never saw the rows.

    What was judged once is stored: after the swap the adapter of the old champion is gone.
    """
    branches = Branches(store)
    judgement = branches.judgement(branch)
    if tip.version == branch.champion or (judgement is not None and judgement.tip == tip.version):
        return judgement
    old = find_version(store, branch.lineage, branch.champion)
    judged = await to_the_end(judge_against, store, tip, old)
    judgement = Judgement(
        tip=tip.version,
        before=judged.before,
        accuracies=judged.accuracies,
        num_rows=judged.num_rows,
        unjudged=judged.unjudged,
        reasons=judged.reasons,
    )
    branches.judge(branch, judgement)
    return judgement


def _open_branch(store: ObjectStore, lineage: str, arrival: KnownArrival) -> Branch | None:
    """Return the open branch that was begun for an arrival; None: there is none, or it was begun for another."""
    branch = Branches(store).open(lineage)
    if branch is None or branch.deleted is None or branch.deleted.task != arrival.task:
        return None
    known = {branch.deleted.sha256, *branch.deleted.splits, *branch.deleted.files}
    return branch if arrival.sha256 in known else None


def _remove_adapters(store: ObjectStore, branch: Branch) -> None:
    """Remove the adapters of the versions that saw the rows.

    The notes are written first: then nobody goes back to such a version. Who went back just before keeps it, and its
    files are left.

    Findings have figures and settings, and no rows. Those of another arrival stay, so that it can be requeued.

    Raises:
        ChampionMovedError: A person has gone back to such a version since the swap.
    """
    assert branch.deleted is not None
    versions, day = Versions(store), f"{datetime.now(UTC):%Y-%m-%d}"
    affected = [version for version in versions.all(branch.lineage) if version.version in branch.deleted.versions]
    noted = [each for each in affected if versions.note_removed(branch.lineage, each.version, day)]
    champion = champion_of(versions.all(branch.lineage))
    if champion is not None and champion.version in branch.deleted.versions:
        for version in noted:
            versions.keep_after_all(branch.lineage, version.version)
        raise ChampionMovedError(branch, champion.version)
    deleted = {branch.deleted.sha256, *branch.deleted.splits}
    for version in affected:
        for info in list(store.list(version.adapter_uri)):
            if keys.file_name(info.key) != FINDINGS_FILE or version.dataset_sha256 in deleted:
                store.delete(info.key)
