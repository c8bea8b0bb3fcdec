"""The files of a version that answering needs: downloaded from the store, and compared with their recorded digests."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from deal_core.adapter.files import PEFT_FILES, require_undamaged
from deal_core.evaluation.answering import SERVED_FILE
from deal_core.safe_text import without_secrets
from infra.store.base import ObjectNotFoundError, ObjectStore
from infra.versions import Version, remedy_for, require_adapter

SERVED_FILES = (*PEFT_FILES, SERVED_FILE)


def fetch_version(store: ObjectStore, version: Version, folder: Path) -> None:
    """Write the adapter of a version and its `deal.json` into a new folder.

    Raises:
        IntegrityError: A file is missing, or its bytes differ from the recorded ones.
        RegistryError: `deal data gc` removed the adapter.
        StoreError: The store does not answer.
    """
    require_adapter(version)
    folder.mkdir(parents=True)
    for name in SERVED_FILES:
        with suppress(ObjectNotFoundError):  # the comparison below names the file
            store.download_file(f"{version.adapter_uri}/{name}", folder / name)
    require_undamaged(
        folder,
        version.files_sha256,
        SERVED_FILES,
        what=f"Version {version.version} of '{version.lineage}'",
        where=without_secrets(store.uri_of(version.adapter_uri)),
        remedy=remedy_for(version),
    )
