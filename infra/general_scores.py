"""The scores of models on suites of general ability in the store, so that no model is asked twice.

They lie next to the adapter that they are about; a base model's serve all lineages. They hold no text.
"""

from __future__ import annotations

from collections.abc import Mapping

from deal_core.evaluation.report import Scores
from infra.store.base import ObjectStore
from infra.store.stored import Stored, read_stored, write_stored


class SuiteScores(Stored):
    """The scores of one model on suites."""

    model_sha256: str
    """Digest of the adapter, or of the base model."""
    answered_by: str
    """What computed the answers: an engine such as "vllm 0.32.0", or this project with a quantization or with none."""
    suites: Mapping[str, Scores]
    """Digest of a suite → the score of each of its rows."""


def read_scores(store: ObjectStore, key: str) -> SuiteScores | None:
    """Return the scores under a key; None: none are stored. StoreError: they are damaged."""
    remedy = "Delete it: the next evaluation asks the model again."
    return read_stored(store, key, SuiteScores, what="the scores on suites of general ability", remedy=remedy)


def keep_scores(store: ObjectStore, key: str, scores: SuiteScores) -> None:
    """Store the scores of a model in place of those under the key. What is lost that way is asked again."""
    write_stored(store, key, scores)
