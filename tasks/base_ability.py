"""What a base model can do of the suites of general ability, as far as it is known before a run."""

from __future__ import annotations

from collections.abc import Callable

from pydantic import BaseModel

from deal_core.config import HARNESS, EvaluateConfig
from deal_core.evaluation.report import mean_score
from deal_core.general.suites import off_because, suite_of
from infra.general_scores import answerer_of, is_engine, read_scores
from infra.settings import HomeSettings
from infra.store.base import ObjectStore
from infra.store.keys import base_scores_key
from tasks.base import local_sha256
from tasks.lineage.record import LineageRecord
from tasks.spec import AdaptSpec


class BaseAbility(BaseModel, frozen=True):
    """What the base model can do of one suite."""

    suite: str
    accuracy: float | None
    """Its mean score, 0 to 1; None: it was not asked yet."""
    limit: float
    """`evaluate.min_general_accuracy`, from which on the suite is judged."""

    @property
    def is_on(self) -> bool | None:
        """Whether versions are judged by the suite; None: it is not known."""
        return None if self.accuracy is None else self.accuracy >= self.limit

    def describe(self) -> str:
        """Return it in one sentence."""
        if self.accuracy is None:
            return f"{self.suite} is not known yet; the first run asks the base model, or --with-model does now"
        if not self.is_on:
            return off_because(self.suite, self.accuracy, self.limit)
        return f"{self.suite} is judged; the base model scores {100 * self.accuracy:.1f} % on it"


def require_suites(config: EvaluateConfig) -> None:
    """Require that every suite can be asked. Those that ship with the project always can.

    Raises:
        ConfigError: lm-evaluation-harness is not installed or does not know a task.
    """
    for name in config.general:
        if name.startswith(HARNESS):
            suite_of(name)


def base_ability(
    store: ObjectStore,
    spec: AdaptSpec,
    source: str,
    record: LineageRecord | None,
    with_model: bool,
    on_model: Callable[[int, int], None],
) -> tuple[BaseAbility, ...]:
    """Return what the base model can do of the suites that a spec names, by the scores that runs have stored.

    Scores of the spec's quantization count, and of a suite without them those of an engine.

    Args:
        store: The store with the scores.
        spec: The settings.
        source: Source of the base model.
        record: The lineage's record, which knows the base model's digest.
        with_model: Ask the base model suites without a stored score. Nothing is stored.
        on_model: Called with the number of requests that it has answered, and that of all of them.
    """
    suites, own = [suite_of(name) for name in spec.evaluate.general], answerer_of(None, spec.train.quantize)
    sha256 = record.base.sha256 if record else local_sha256(source)
    kept = read_scores(store, base_scores_key(sha256), sha256) if sha256 else {}
    by_engine = {digest: scores for name in kept if is_engine(name) for digest, scores in kept[name].items()}
    stored = {**by_engine, **kept.get(own, {})}
    known = {suite.name: stored[suite.sha256] for suite in suites if suite.sha256 in stored}
    unknown = [suite for suite in suites if suite.name not in known]
    if with_model and unknown:
        from deal_core.base_model.load import load_base
        from deal_core.evaluation.generation import counting

        base, on_progress = load_base(source, HomeSettings().cache_dir), counting(on_model, sum(map(len, unknown)))
        for suite in unknown:
            known[suite.name] = suite.score(base.model, base.tokenizer, on_progress=on_progress)
    return tuple(
        BaseAbility(
            suite=suite.name,
            accuracy=mean_score(known[suite.name]) if suite.name in known else None,
            limit=spec.evaluate.min_general_accuracy,
        )
        for suite in suites
    )
