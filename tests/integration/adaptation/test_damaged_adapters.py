"""A version has the digest of each of its files, and what is fetched to be served is compared with them."""

from __future__ import annotations

from pathlib import Path

import pytest

from deal_core.adapter.files import ADAPTER_FILES, PROOF_FILE, WEIGHTS_FILE, digests_of
from deal_core.errors import IntegrityError
from deal_core.evaluation.answering import SERVED_FILE
from infra.serving.version_files import SERVED_FILES, fetch_version
from infra.store.opening import open_store
from infra.versions import Version, Versions
from tasks.lineage.record import RECORD_FILE

pytestmark = pytest.mark.usefixtures("prefect_api", "home")


@pytest.fixture
def champion(copied_home: Path) -> Version:
    """The champion, version 3, whose parent is version 1."""
    info = Versions(open_store()).champion("l")
    assert info is not None and info.version == "3"
    return info


def folder_of(home: Path, info: Version) -> Path:
    return home / "store" / info.adapter_uri


@pytest.mark.parametrize("name", SERVED_FILES)
def test_what_is_fetched_to_be_served_is_compared_too(champion: Version, home: Path, tmp_path: Path, name: str) -> None:
    fetch_version(open_store(), champion, tmp_path / "whole")
    path = folder_of(home, champion) / name
    recorded, content = digests_of(path.parent, [name])[name], path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(IntegrityError) as caught:
        fetch_version(open_store(), champion, tmp_path / "served")
    found = digests_of(path.parent, [name])[name]
    message = str(caught.value)
    for part in ("Version 3 of 'l'", name, recorded, found, "deal version rollback"):
        assert part in message


def test_a_version_has_the_digest_of_each_file(champion: Version, home: Path) -> None:
    found = digests_of(folder_of(home, champion), (*ADAPTER_FILES, PROOF_FILE, SERVED_FILE, RECORD_FILE))
    assert set(found) >= {"adapter_config.json", WEIGHTS_FILE, "method.json", "deal.json"}
    assert champion.files_sha256 == {name: (digest,) for name, digest in found.items()}
