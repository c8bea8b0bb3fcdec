"""The scores of models on suites of general ability in the store, so that no model is asked twice.

They lie next to the adapter that they are about; a base model's serve all lineages. They hold no text. Only scores of
one answerer are compared, so a model has those of each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from deal_core.config import Quantize
from deal_core.evaluation.report import Scores
from infra.store.base import ObjectStore
from infra.store.stored import Stored, read_stored, write_stored


class SuiteScores(Stored):
    """The scores of one model on suites."""

    model_sha256: str
    """Digest of the adapter, or of the base model."""
    answered_by: Mapping[str, Mapping[str, Scores]]
    """What computed the answers, see `answerer_of` → identity of a suite → the score of each of its rows."""


def answerer_of(engine: str | None, quantize: Quantize, stop_ids: Sequence[int]) -> str:
    """Return what computes answers, in words that are compared.

    It is an engine such as "vllm 0.32.0", or else this project; the quantization of the base model; and the ids of the
    tokens at which an answer ends.
    """
    return f"{engine or 'this project'}, quantize {quantize}, stops {' '.join(map(str, stop_ids))}"


def read_scores(store: ObjectStore, key: str, model_sha256: str) -> Mapping[str, Mapping[str, Scores]]:
    """Return the scores of a model under a key, as in `SuiteScores.answered_by`. StoreError: they are damaged."""
    remedy = "Delete it: the next evaluation asks the model again."
    kept = read_stored(store, key, SuiteScores, what="the scores on suites of general ability", remedy=remedy)
    return kept.answered_by if kept is not None and kept.model_sha256 == model_sha256 else {}


def keep_scores(store: ObjectStore, key: str, model_sha256: str, answerer: str, suites: Mapping[str, Scores]) -> None:
    """Store the scores of a model in place of those of the same answerer. What is lost that way is asked again."""
    kept = read_scores(store, key, model_sha256)
    write_stored(store, key, SuiteScores(model_sha256=model_sha256, answered_by={**kept, answerer: suites}))
