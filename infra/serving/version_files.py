"""The files of a version that answering needs: downloaded from the store, and compared with their recorded digests."""

from __future__ import annotations

import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

from deal_core.adapter.files import CONFIG_FILE, PEFT_FILES, PROOF_FILE, digests_of, require_undamaged
from deal_core.evaluation.answering import SERVED_FILE
from deal_core.safe_text import without_secrets
from infra.store.base import ObjectNotFoundError, ObjectStore
from infra.versions import Version, remedy_for, require_adapter

SERVED_FILES = (*PEFT_FILES, SERVED_FILE)


def fetch_version(store: ObjectStore, version: Version, folder: Path, *, with_proof: bool = False) -> None:
    """Write the adapter of a version and its `deal.json` into an empty or new folder, and its proof if it has one.

    Raises:
        IntegrityError: A file is missing, or its bytes differ from the recorded ones.
        RegistryError: `deal data gc` removed the adapter.
        StoreError: The store does not answer.
    """
    require_adapter(version)
    folder.mkdir(parents=True, exist_ok=True)
    names = (*SERVED_FILES, PROOF_FILE) if with_proof and PROOF_FILE in version.files_sha256 else SERVED_FILES
    for name in names:
        with suppress(ObjectNotFoundError):  # the comparison below names the file
            store.download_file(f"{version.adapter_uri}/{name}", folder / name)
    require_undamaged(
        digests_of(folder, names),
        version.files_sha256,
        names,
        what=f"Version {version.version} of '{version.lineage}'",
        where=without_secrets(store.uri_of(version.adapter_uri)),
        remedy=remedy_for(version),
    )


def write_peft_folder(adapter: Path, target: Path, config: str | None = None) -> bool:
    """Copy the two PEFT files of an adapter to a new folder, which appears at once and complete. All may read it.

    `config` replaces the content of adapter_config.json. The result is False if the folder was there, or if another
    process was faster.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".", dir=target.parent) as temporary:
        part = Path(temporary) / target.name
        part.mkdir()
        for file in PEFT_FILES:
            shutil.copyfile(adapter / file, part / file)
        if config is not None:
            (part / CONFIG_FILE).write_text(config, encoding="utf-8")
        part.chmod(0o755)
        if target.exists():
            return False
        try:
            part.rename(target)
        except OSError:
            if target.exists():
                return False
            raise
    return True
