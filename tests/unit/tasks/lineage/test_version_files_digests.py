"""What comes out of the store is what was registered, also after `deal data delete`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from deal_core.adapter.files import KEPT_ROWS, as_recorded, digests_of, sha256_together
from deal_core.errors import IntegrityError
from infra.store.local import FileStore
from infra.versions import Version, Versions
from tasks.lineage.record import RECORD_FILE, read_record, write_record
from tasks.lineage.version_files import borrowed_adapter, replacing
from tests.stored_versions import lineage_record, put_version, version

CONFIG = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["q"]}
WEIGHTS, STATE = "adapter_model.safetensors", "method.safetensors"


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FileStore:
    monkeypatch.setenv("DEAL_HOME", str(tmp_path / "home"))
    return FileStore(tmp_path / "store")


@pytest.fixture
def info(store: FileStore, tmp_path: Path) -> Version:
    """Version 2 as it was registered, without its parent."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG))
    (folder / "method.json").write_text("{}")
    save_file({"a": torch.zeros(2)}, folder / WEIGHTS)
    save_file({f"{KEPT_ROWS}0": torch.ones(3)}, folder / STATE)
    found = digests_of(folder)
    known = version(2, 1, adapter_sha256=sha256_together(found), files_sha256=as_recorded(found))
    store.upload_folder(folder, known.adapter_uri)
    put_version(store, known)
    return known


def now(store: FileStore) -> Version:
    """The version as the store has it now."""
    (found,) = Versions(store).all("l")
    return found


@pytest.fixture
def emptied(tmp_path: Path) -> Path:
    """What `deal data delete` puts over the method's files."""
    folder = tmp_path / "emptied"
    folder.mkdir()
    (folder / "method.json").write_text('{"num_bytes": 0}')
    save_file({f"{KEPT_ROWS}0": torch.ones(0)}, folder / STATE)
    return folder


def flip(store: FileStore, info: Version, name: str) -> None:
    path = store.root / info.adapter_uri / name
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def load(store: FileStore, info: Version) -> None:
    """Load it to answer, then to continue it."""
    with borrowed_adapter(store, info) as folder:
        assert (folder / WEIGHTS).is_file()
    with borrowed_adapter(store, info, with_method=True) as folder:
        assert (folder / STATE).is_file()


def test_a_whole_version_is_lent_and_its_copy_is_gone_afterwards(store: FileStore, info: Version) -> None:
    load(store, info)
    with borrowed_adapter(store, info) as folder:
        assert folder.is_dir()
    assert not folder.exists()


def test_a_flipped_byte_is_refused_and_the_message_says_what_to_do(store: FileStore, info: Version) -> None:
    flip(store, info, WEIGHTS)
    with pytest.raises(IntegrityError) as caught, borrowed_adapter(store, info):
        pytest.fail("it was lent")
    message = str(caught.value)
    (recorded,) = info.files_sha256[WEIGHTS]
    found = digests_of(store.root / info.adapter_uri)[WEIGHTS]
    assert message.startswith("Version 2 of 'l' is damaged") and found in message and recorded in message
    assert store.uri_of(info.adapter_uri) in message and "from a backup" in message
    assert "deal version rollback 1 --lineage l" in message
    with pytest.raises(IntegrityError), borrowed_adapter(store, info, with_method=True):
        pytest.fail("it was lent")


def test_one_changed_letter_of_a_record_is_refused(store: FileStore, info: Version) -> None:
    record = lineage_record()
    recorded = {**info.files_sha256, RECORD_FILE: (write_record(store, info.adapter_uri, record),)}
    put_version(store, info.model_copy(update={"files_sha256": recorded}))
    assert read_record(store, now(store)) == record
    key = f"{info.adapter_uri}/{RECORD_FILE}"
    store.put_bytes(key, store.get_bytes(key).replace(b'"deal"', b'"dead"'))
    with pytest.raises(IntegrityError) as refused:
        read_record(store, now(store))
    assert RECORD_FILE in str(refused.value) and "deal version rollback 1 --lineage l" in str(refused.value)


def test_a_damaged_method_state_keeps_nobody_from_asking(store: FileStore, info: Version) -> None:
    flip(store, info, STATE)
    with borrowed_adapter(store, info):
        pass
    with pytest.raises(IntegrityError, match=STATE), borrowed_adapter(store, info, with_method=True):
        pytest.fail("it was lent")


def test_emptied_rows_are_recorded_and_a_killed_call_damages_nothing(
    store: FileStore, info: Version, emptied: Path
) -> None:
    def be_killed() -> None:
        with replacing(store, now(store), emptied):
            load(store, now(store))
            store.upload_file(emptied / "method.json", f"{info.adapter_uri}/method.json")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        be_killed()
    load(store, now(store))
    with replacing(store, now(store), emptied):
        store.upload_folder(emptied, info.adapter_uri)
        load(store, now(store))
    load(store, now(store))
    assert now(store).files_sha256 == as_recorded(digests_of(store.root / info.adapter_uri))
    with pytest.raises(IntegrityError, match="method"), borrowed_adapter(store, info, with_method=True):
        pytest.fail("it was lent by the digests of before")
    flip(store, info, WEIGHTS)
    with pytest.raises(IntegrityError, match=WEIGHTS), borrowed_adapter(store, now(store)):
        pytest.fail("it was lent")


@pytest.mark.parametrize("name", [WEIGHTS, STATE])
def test_damage_is_not_washed_away_by_emptying_rows(store: FileStore, info: Version, emptied: Path, name: str) -> None:
    flip(store, info, name)
    with replacing(store, info, emptied):
        store.upload_folder(emptied, info.adapter_uri)
    with pytest.raises(IntegrityError, match=name), borrowed_adapter(store, now(store), with_method=True):
        pytest.fail("it was lent")
