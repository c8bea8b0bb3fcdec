"""Look at the rollout of a lineage: its entry in the promotion log, and what the prediction log says so far."""

from __future__ import annotations

from datetime import datetime

from pydantic import BaseModel

from deal_core.errors import RegistryError
from deal_core.judging_config import RolloutTerms
from deal_core.monitoring.rollout import RolloutReport, judge
from infra.predictions import read_feedback, read_predictions
from infra.promotions import Move, PromotionLog
from infra.store.base import ObjectStore
from infra.versions import Decision
from tasks.lineage.history import find_version


class RolloutStatus(BaseModel, frozen=True):
    """The rollout of a lineage."""

    lineage: str
    version: str | None = None
    """The version that is tried on live traffic; None: no version is tried."""
    champion: str | None = None
    """The version that it is compared with."""
    since: datetime | None = None
    """When the rollout began."""
    terms: RolloutTerms | None = None
    report: RolloutReport | None = None


class RolloutLook(BaseModel, frozen=True):
    """A look at a rollout, and what followed from it."""

    status: RolloutStatus
    """The rollout and its figures."""
    decision: Decision | None = None
    """The promotion or rejection that it has made; None: it made none."""


def look_at_rollout(store: ObjectStore, lineage: str) -> RolloutStatus:
    """Judge what the prediction log and the feedback say about the version that is tried on live traffic."""
    opened = PromotionLog(store).open_rollout(lineage)
    if opened is None or opened.champion is None:
        return RolloutStatus(lineage=lineage)
    terms = find_version(store, lineage, opened.version).rollout
    assert terms is not None, "a rollout begins only with its terms"
    since = opened.when.timestamp()
    columns = ["id", "label", "is_label", "confidence", "seconds", "output"]
    rows = read_predictions(store, lineage, since=since, of_rollout=True, columns=columns)
    feedback = read_feedback(store, lineage, answers=rows)
    report = judge(rows, feedback, terms, champion=opened.champion, candidate=opened.version)
    return RolloutStatus(
        lineage=lineage, version=opened.version, champion=opened.champion, since=opened.when, terms=terms, report=report
    )


def require_open(store: ObjectStore, lineage: str) -> Move:
    """Return the entry of the promotion log that began the rollout; RegistryError: there is no rollout."""
    opened = PromotionLog(store).open_rollout(lineage)
    if opened is None:
        raise RegistryError(
            f"No version of '{lineage}' is tried on live traffic; see: deal version list --moves --lineage {lineage}"
        )
    return opened
