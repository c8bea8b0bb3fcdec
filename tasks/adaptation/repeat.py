"""Whether an arrival was learned before: its rows land again, and a version has learned them."""

from __future__ import annotations

from prefect import runtime

from infra.store.base import ObjectStore
from infra.versions import Version, Versions
from tasks.references import DatasetRef


def find_repeat(store: ObjectStore, dataset: DatasetRef, lineage: str, again: bool = False) -> Version | None:
    """Return the accepted version that learned this dataset, or None.

    A version with the same landed rows but another split counts too, unless the champion or one of its ancestors
    learned these rows. In that case the test rows were forgotten, and the arrival brings new test rows.

    If it is trained `again`, only the version counts that this flow run made before it was interrupted.
    """
    versions = Versions(store).all(lineage)
    if again:
        own = [version for version in versions if version.flow_run and version.flow_run == runtime.flow_run.id]
        return next((version for version in own if version.dataset_sha256 == dataset.sha256), None)
    learned = [version for version in versions if version.standing == "learned"]
    promoted = [version for version in versions if version.since.promoted is not None or version in learned]
    same = [version for version in promoted if version.dataset_sha256 == dataset.sha256]
    if not same and not any(dataset.landed_sha256 in version.digests for version in learned):
        same = [version for version in promoted if dataset.landed_sha256 in version.digests]
    if not same:
        return None
    repeated = next((version for version in learned if version.dataset_sha256 == dataset.sha256), same[0])
    # a rejected one was champion for a while; whether this run repeats it is for the run key to say
    return None if repeated.is_rejected else repeated
