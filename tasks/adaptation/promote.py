"""The stage that makes an accepted version the champion, begins its rollout, or leaves it to a person."""

from __future__ import annotations

from prefect import task

from deal_core.errors import RegistryError
from infra.store.base import ObjectStore
from infra.store.opening import open_store
from infra.versions import Version, Versions
from tasks.adaptation.run import STAGE
from tasks.lineage.history import rejected_by_person
from tasks.lineage.promotion import move_champion
from tasks.progress import staged

_ENDS = {"promoted": "is champion", "awaiting approval": "awaits approval", "rollout": "is tried on live traffic"}


@task(name="promote", **STAGE)
@staged("promote", lambda version: f"version {version.version} {_ENDS[version.outcome]}")
def promote_version(version: Version) -> Version:
    """Promote an accepted version, or begin its rollout, unless a person must approve it; return it as it is then."""
    store = open_store()
    promote_accepted(store, version)
    promoted = Versions(store).find(version.lineage, version.version)
    assert promoted is not None, "versions stay"
    return promoted


def promote_accepted(store: ObjectStore, version: Version) -> None:
    """Make an accepted version the champion, or begin its rollout, unless a person must approve it first.

    The call can be repeated. A version that was promoted is not promoted again, because the lineage may have been
    rolled back since.

    Raises:
        RegistryError: Another version is champion instead of this version's parent, or a person rejected the version.
    """
    if version.approval == "refused":
        raise RegistryError(rejected_by_person(version))
    if is_overtaken(store, version):
        champion = Versions(store).champion(version.lineage)
        now = f"version {champion.version} is" if champion else "no version is"
        raise RegistryError(
            f"Version {version.version} of {version.lineage} continues {version.parent}, but {now} champion now; it "
            "was not promoted. Run the same command again: it starts from the present champion."
        )
    if is_open(version):
        move_champion(
            store,
            version,
            expected=version.parent_version,
            action="promoted" if version.rollout is None else "rollout",
            who="gate",
            why="passed its gate",
            run=version.run_key,
        )


def is_open(version: Version) -> bool:
    """Return whether the gate accepted the version, and its run has not yet promoted it or begun its rollout.

    The run of a version of a branch never does.
    """
    is_done = version.since.promoted is not None or version.since.rolled_out is not None or version.branch is not None
    return version.accepted and version.approval is None and not is_done


def is_overtaken(store: ObjectStore, version: Version) -> bool:
    """Return whether a new version's promotion would lose a task: the champion is neither it nor its parent."""
    if not is_open(version) and version.approval != "awaiting":
        return False
    champion = Versions(store).champion(version.lineage)
    return (champion.version if champion else None) not in (version.parent_version, version.version)
