"""General ability: a version's scores on the suites of `evaluate.general`, beside the base model's and the parent's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from deal_core.config import EvaluateConfig
from deal_core.evaluation.report import GeneralScores, Scores, mean_score
from deal_core.general.suites import Suite
from infra.general_scores import keep_scores, read_scores
from infra.store.base import ObjectStore
from infra.store.keys import adapter_scores_key, base_scores_key
from tasks.adaptation.run import AdaptationRun
from tasks.references import TrainedAdapter

if TYPE_CHECKING:
    from tasks.scorer import Scorer


@dataclass(frozen=True, kw_only=True)
class MeasuredAbility:
    """What the suites show."""

    scores: Mapping[str, GeneralScores]
    """Those of the suites that are on."""
    notes: tuple[str, ...]


def require_suites(config: EvaluateConfig) -> None:
    """Require that every suite can be asked.

    Raises:
        ConfigError: lm-evaluation-harness is not installed or does not know a task.
    """
    for name in config.general:
        Suite(name)


def measure_general(
    store: ObjectStore, scorer: Scorer, adaptation: AdaptationRun, trained: TrainedAdapter
) -> MeasuredAbility:
    """Score a new version on the suites that its spec names.

    A suite on which the base model scores too little is off: nobody else is asked. Base model and parent are asked only
    suites without a stored score.
    """
    config, parent = adaptation.spec.evaluate, adaptation.parent
    if not config.general:
        return MeasuredAbility(scores={}, notes=())

    suites = [Suite(name) for name in config.general]
    asked = _Asked(store, scorer, scorer.answerer)
    sha256 = adaptation.base.sha256
    base = asked.scores(base_scores_key(sha256), sha256, None, suites)
    on = [suite for suite in suites if mean_score(base[suite.name]) >= config.min_general_accuracy]
    before: Mapping[str, Scores] = {}
    if parent is not None:
        key = adapter_scores_key(parent.adapter_uri)
        before = asked.scores(key, parent.adapter_sha256, adaptation.parent_folder, on)
    now = asked.scores(adapter_scores_key(trained.uri), trained.sha256, trained.folder, on)
    scores = {name: GeneralScores(now=now[name], base=base[name], parent=before.get(name)) for name in now}
    off = {name: mean_score(base[name]) for name in base if name not in now}
    return MeasuredAbility(scores=scores, notes=(*_notes(scores, off, config.min_general_accuracy),))


@dataclass(frozen=True)
class _Asked:
    """Asks models the suites whose scores are not stored."""

    store: ObjectStore
    scorer: Scorer
    answerer: str

    def scores(self, key: str, sha256: str, adapter_folder: Path | None, suites: Sequence[Suite]) -> dict[str, Scores]:
        """Return the scores of a model on suites, by name. `key` is their place in the store."""
        known = dict(read_scores(self.store, key, sha256).get(self.answerer, {}))
        unknown = [suite for suite in suites if suite.identity not in known]
        if unknown:
            found = self.scorer.score_suites(adapter_folder, unknown)
            known |= {suite.identity: found[suite.name] for suite in unknown}
            keep_scores(self.store, key, sha256, self.answerer, known)
        return {suite.name: known[suite.identity] for suite in suites}


def _notes(scores: Mapping[str, GeneralScores], off: Mapping[str, float], limit: float) -> Iterator[str]:
    for name, each in scores.items():
        of_parent = "" if each.parent is None else f", champion {100 * mean_score(each.parent):.1f} %"
        of_base = f"base model {100 * mean_score(each.base):.1f} %"
        yield f"general ability: {name} {100 * mean_score(each.now):.1f} % ({of_base}{of_parent})"
    for name, accuracy in off.items():
        yield (
            f"general ability: {name} is off, since the base model scores {100 * accuracy:.1f} % on it; it is judged "
            f"from {100 * limit:.1f} % on (evaluate.min_general_accuracy)"
        )
