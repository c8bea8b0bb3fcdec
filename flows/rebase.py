"""Rebase: learn a lineage's arrivals again on another base model, and make the result champion if no task is worse."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import Any

from prefect import flow

from deal_core.errors import ConfigError, DealError, in_one_line
from deal_core.safe_text import listed
from flows.branch import BranchPlan, BranchResult, begin, find_relearnable, grow, require_quiet, stopped, swapped
from flows.lock import lock_lineage
from infra.branches import Branch, Branches
from infra.fingerprints import read_fingerprint
from infra.serving.vllm import EngineClient
from infra.settings import EngineSettings
from infra.store.base import ObjectStore
from infra.store.opening import open_store
from infra.versions import Version, Versions, descent
from tasks.adaptation.gate import judge_against
from tasks.adaptation.run import identify_base
from tasks.lineage.branch import swap_in
from tasks.lineage.history import find_version
from tasks.lineage.record import read_record
from tasks.lineage.settings import leave_base_open
from tasks.mlflow_mirror import sync_lineage
from tasks.progress import raise_if_stopped, reporter, to_the_end

ENGINE_SECONDS = 5.0
"""Pause between two looks whether an engine has the new base model."""


def plan_rebase(store: ObjectStore, lineage: str, base: str, *, who: str = "") -> BranchPlan:
    """Return what `rebase` would do; change nothing.

    Args:
        store: The store, which has the lineage.
        lineage: The lineage.
        base: Source of the new base model.
        who: Who asks.

    Raises:
        ConfigError: It is the base model of today, or no arrival can be learned again.
        RegistryError: The lineage cannot begin a branch now.
    """
    opened = Branches(store).open(lineage)
    if opened is not None and opened.base_model == base:
        return BranchPlan(branch=opened, seconds=0.0)
    champion = require_quiet(store, lineage)
    if read_record(store, champion).base.source == base:
        raise ConfigError(f"Lineage '{lineage}' adapts {base} already; name another base model.")
    arrivals, lost, seconds = find_relearnable(store, descent(Versions(store).all(lineage), champion)[::-1])
    branch = Branch(
        lineage=lineage,
        number=Branches(store).next_number(lineage),
        who=who,
        root=None,
        champion=champion.version,
        arrivals=arrivals,
        lost=lost,
        base_model=base,
    )
    if not arrivals:
        why = "; ".join(each.why for each in lost)
        raise ConfigError(f"No arrival of '{lineage}' can be learned again, so nothing could serve: {why}")
    return BranchPlan(branch=branch, seconds=seconds)


@flow(name="rebase", flow_run_name="rebase-{lineage}")
async def rebase(
    lineage: str,
    base: str,
    skip_rejected: bool = False,
    accept_lost: bool = False,
    engines: tuple[str, ...] = (),
    who: str = "a deployment",
) -> BranchResult:
    """Learn a lineage's arrivals on another base model, task by task, and swap by one move. A killed call is repeated.

    The last version is judged against the champion of before, on the same test rows, by the limits of its gate for old
    tasks. A rollback goes back over the change.

    Args:
        lineage: The lineage.
        base: Source of the new base model: Hub id, folder or GGUF file.
        skip_rejected: Go on without an arrival whose new version its gate rejects.
        accept_lost: Go on although arrivals cannot be learned again, and swap although tasks are missing.
        engines: Addresses of vLLM servers. The swap waits until one of them has the new base model.
        who: Who asks.

    Raises:
        ConfigError: It is the base model of today, or arrivals would be lost.
        RegistryError: The lineage cannot begin a branch now, or a person has moved its champion since.
    """
    store = open_store()
    async with lock_lineage(lineage):
        branch = plan_rebase(store, lineage, base, who=who).branch
        old = find_version(store, lineage, branch.champion)
        await _require_other_base(store, old, base)
        clients = [EngineClient(url, EngineSettings()) for url in engines]  # a wrong address shows before the training
        begin(store, branch, accept_lost=accept_lost)
        tip = await grow(store, branch, skip_rejected=skip_rejected)
        if isinstance(tip, str):
            return stopped(store, branch, tip)
        judged = await to_the_end(judge_against, store, tip, old)
        reasons = [*judged.decision.reasons]
        if judged.missing and not accept_lost:
            reasons.append(f"It knows {listed(judged.missing)} no longer (--accept-lost).")
        figures: dict[str, Any] = {
            "before": judged.before,
            "accuracies": judged.accuracies,
            "num_rows": judged.num_rows,
        }
        if reasons:
            worse = f"version {tip.version} is worse than version {old.version}. {' '.join(reasons)}"
            return stopped(store, branch, worse, **figures)
        if (champion := Versions(store).champion(lineage)) is not None and champion.version == old.version:
            async with AsyncExitStack() as stack:
                await _wait_for_engine(store, tip, [await stack.enter_async_context(client) for client in clients])
        swap_in(store, branch, tip, who)
        if leave_base_open(store, lineage):
            reporter().said("base_model was removed from the lineage's file: its champion says it from now on.")
        back = f"deal version rollback {old.version} --lineage {lineage}"
        message = f"Version {tip.version} of {lineage} is champion, on {base}. Back: {back}."
        result = swapped(store, branch, tip, who, message, attestation=None, **figures)
        await to_the_end(sync_lineage, store, lineage)
    return result


async def _require_other_base(store: ObjectStore, old: Version, base: str) -> None:
    """Raise ConfigError if a source has the base model of a version."""
    quantize = read_record(store, old).base.quantize
    found = await asyncio.to_thread(identify_base, base, quantize)
    if found.sha256 == old.base_sha256:
        raise ConfigError(f"{base} is the base model of '{old.lineage}' already, by its digest; name another.")


async def _wait_for_engine(store: ObjectStore, tip: Version, clients: Sequence[EngineClient]) -> None:
    """Wait until one of the engines has the base model of a version."""
    from infra.serving.engines import require_base

    base = read_record(store, tip).base
    fingerprint, name = read_fingerprint(store, base.sha256, base.quantize), base.name
    if clients and fingerprint is None:
        raise ConfigError(f"vLLM serves no adapters on {name}; leave --engine out, or serve without an engine.")
    told = ""
    while clients and fingerprint is not None:
        problems = []
        for client in clients:
            try:
                await require_base(client, client.base_of(await client.models()), fingerprint, name)
                return
            except DealError as error:
                problems.append(in_one_line(error))
        if (now := " ".join(problems)) != told:
            reporter().said(f"The swap waits for an engine with {name}. {now}")
            told = now
        raise_if_stopped()
        await asyncio.sleep(ENGINE_SECONDS)
