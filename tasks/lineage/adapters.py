"""The one way by which a version's adapter comes out of the store: copied, and compared with its recorded digests.

Three kinds of versions are told apart:

- A version has the digest of each of its files (`files_sha256`). Those that the caller reads are compared.
- A version of an earlier release has one digest of all files together (`adapter_sha256`). All are compared. Nothing is
  compared where an earlier release has emptied the method's state by `deal forget`, as it recorded no new digest.
- A version that has no digest at all is loaded as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deal_core.adapter.files import (
    ADAPTER_FILES,
    PEFT_FILES,
    TOGETHER,
    Recorded,
    as_recorded,
    digests_of,
    find_damage,
    require_undamaged,
)
from infra.store.base import ObjectStore
from infra.tracking.registry import Registry, VersionInfo, files_tag
from infra.version_log import VersionLog
from tasks.context import borrowed_folder
from tasks.lineage.version_files import require_readable_method
from tasks.references import AdapterRef, VersionRef

Adapter = AdapterRef | VersionRef | VersionInfo


@contextmanager
def borrowed_adapter(store: ObjectStore, adapter: Adapter, *, with_method: bool = False) -> Iterator[Path]:
    """A local copy of an adapter's folder, gone afterwards.

    Args:
        store: holds the adapter.
        adapter: a version, or the adapter that a run has just trained.
        with_method: the caller reads the method's state as well.

    Raises:
        IntegrityError: the bytes of a file that the caller reads are not the recorded ones.
        ObjectNotFoundError: the store has no such folder.
    """
    with borrowed_folder(store, _uri_of(adapter)) as folder:
        if with_method:
            require_readable_method(store, _uri_of(adapter), folder)
        require_recorded(store, adapter, folder, with_method=with_method)
        yield folder


@contextmanager
def borrowed_parent(store: ObjectStore, parent: VersionRef | None) -> Iterator[Path | None]:
    """A local copy of the parent's adapter with the method's state; None where the run starts from the base.

    Raises:
        IntegrityError: as for `borrowed_adapter`.
    """
    if parent is None:
        yield None
        return
    with borrowed_adapter(store, parent, with_method=True) as folder:
        yield folder


def require_recorded(store: ObjectStore, adapter: Adapter, folder: Path, *, with_method: bool = False) -> None:
    """Compare an adapter's folder, which holds all files of the adapter, with what is recorded of the adapter.

    Raises:
        IntegrityError: as for `borrowed_adapter`.
    """
    recorded, names = _recorded_of(adapter), ADAPTER_FILES if with_method else PEFT_FILES
    found = digests_of(folder, ADAPTER_FILES if TOGETHER in recorded else names)
    if TOGETHER in recorded and find_damage(found, recorded) and _is_from_before(adapter) and _was_emptied(folder):
        return
    require_undamaged(
        found, recorded, names, what=_name_of(adapter), where=store.uri_of(_uri_of(adapter)), remedy=remedy_for(adapter)
    )


@contextmanager
def replacing(store: ObjectStore, registry: Registry, version: VersionInfo, folder: Path) -> Iterator[None]:
    """Let files of a version's adapter be replaced by those in `folder`: record their digests.

    Both digests count while the files are replaced, and the new one alone afterwards. A file that is damaged before
    keeps its recorded digest, so that the damage does not pass for what was meant. Nothing is recorded of a version
    that cannot be compared.
    """
    with borrowed_folder(store, version.adapter_uri) as old:
        found = digests_of(old)
        recorded = _recorded_of(version)
        if TOGETHER in recorded and not find_damage(found, recorded):
            recorded = as_recorded(found)
        elif TOGETHER in recorded and _is_from_before(version) and _was_emptied(old):
            recorded = {}
    new = {name: sha256 for name, sha256 in digests_of(folder).items() if found.get(name) in recorded.get(name, ())}
    if recorded:
        between = {**recorded, **{name: (found[name], sha256) for name, sha256 in new.items()}}
        registry.tag_version(version.lineage, version.version, {"files_sha256": files_tag(between)})
    yield
    if recorded:
        after = {**recorded, **as_recorded(new)}
        registry.tag_version(version.lineage, version.version, {"files_sha256": files_tag(after)})
        if now := registry.version(version.lineage, version.version):
            VersionLog(store).keep(now)


def remedy_for(adapter: Adapter) -> str:
    """What to do about a damaged adapter."""
    if isinstance(adapter, AdapterRef):
        return "Run the same command again: it uploads the adapter once more."
    lineage, parent = adapter.lineage, adapter.parent_version
    back = f", or go back to an earlier version: deal rollback --to {parent} --lineage {lineage}" if parent else ""
    return f"Restore the folder from a backup{back} (deal history --lineage {lineage} lists the versions)."


def _recorded_of(adapter: Adapter) -> Recorded:
    if isinstance(adapter, AdapterRef):
        return {TOGETHER: (adapter.sha256,)}
    if adapter.files_sha256 is not None:
        return adapter.files_sha256
    return {TOGETHER: (adapter.adapter_sha256,)} if adapter.adapter_sha256 else {}


def _is_from_before(adapter: Adapter) -> bool:
    """Whether an earlier release registered the version, and `deal forget` of this one has not touched it."""
    return not isinstance(adapter, AdapterRef) and adapter.files_sha256 is None


def _was_emptied(folder: Path) -> bool:
    """Whether `deal forget` has taken rows out of the method's state."""
    from safetensors import SafetensorError

    from deal_core.adapter.state import stored_rows

    try:
        return 0 in stored_rows(folder).values()
    except SafetensorError:
        return False


def _uri_of(adapter: Adapter) -> str:
    return adapter.uri if isinstance(adapter, AdapterRef) else adapter.adapter_uri


def _name_of(adapter: Adapter) -> str:
    if isinstance(adapter, AdapterRef):
        return f"The adapter that was just trained for '{adapter.lineage}'"
    return f"Version {adapter.version} of '{adapter.lineage}'"
