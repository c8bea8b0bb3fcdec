"""Damaged files of a store: each reader names the file; weights are judged by their header and size alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
from safetensors.numpy import save_file

from deal_core.adapter.files import as_recorded, digests_of
from deal_core.data.schema import DatasetManifest, TaskSchema
from deal_core.errors import DealError, StoreError
from infra.fingerprints import read_fingerprint
from infra.general_scores import read_scores
from infra.lineage_state import read_ended, read_state
from infra.promotions import PromotionLog
from infra.run_journal import RunJournal
from infra.store.base import ObjectNotFoundError, ObjectStore
from infra.store.format import write_format
from infra.store.keys import adapter_scores_key
from infra.store.opening import open_store
from infra.versions import Versions
from tasks.adaptation.resume import read_findings
from tasks.lineage.datasets import read_manifest
from tasks.lineage.frozen_rows import load_test_set, read_answers
from tasks.lineage.record import read_record
from tasks.lineage.settings import read_lineage
from tasks.lineage.version_files import borrowed_adapter
from tests.stored_versions import known_task, move, put_version, run_key, version

ADAPTER = "adapters/l/0123456789abcdef"
CONFIG = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": ["q"]}
THIRD = version(3, adapter_uri=ADAPTER)
BANK = known_task(TaskSchema(name="bank"), "datasets/bank/77")
MANIFEST = DatasetManifest(
    task=BANK.schema,
    sha256="77",
    source="rows.jsonl",
    num_read=9,
    num_train=0,
    num_test=9,
    num_rejected=0,
    problems={},
    split="given",
    landed_sha256="88",
)
READERS: dict[str, Callable[[ObjectStore], Any]] = {
    f"{ADAPTER}/record.json": lambda store: read_record(store, THIRD),
    f"{ADAPTER}/findings.json": lambda store: read_findings(store, ADAPTER),
    f"{ADAPTER}/answers.json": lambda store: read_answers(store, ADAPTER),
    "datasets/bank/77/manifest.json": lambda store: read_manifest(store, "datasets/bank/77"),
    "datasets/bank/77/test.parquet": lambda store: load_test_set(store, BANK),
    "promotions/l/00000001.json": lambda store: PromotionLog(store).last("l"),
    f"runs/l/{run_key(1)[:16]}.json": lambda store: RunJournal(store).find("l", run_key(1)),
    "lineages/l.state.json": lambda store: read_state(store, "l"),
    "arrivals/l/2026.json": lambda store: read_ended(store, "l"),
    f"base_models/{'b' * 64}.4bit.json": lambda store: read_fingerprint(store, "b" * 64, "4bit"),
    f"{ADAPTER}/general.json": lambda store: read_scores(store, adapter_scores_key(ADAPTER), ""),
    "versions/l/00000007.json": lambda store: Versions(store).find("l", "7"),
    "lineages/l.yaml": lambda store: read_lineage(store, "l"),
}


@pytest.fixture
def store(home: Path) -> ObjectStore:
    """A store with an adapter, which is that of version 3."""
    found = open_store()
    write_format(found)
    found.put_bytes(f"{ADAPTER}/adapter_config.json", json.dumps(CONFIG).encode())
    save_file({"a": numpy.ones((64, 8), numpy.float32)}, weights_of(home))
    files_sha256 = as_recorded(digests_of(weights_of(home).parent))
    put_version(found, THIRD.model_copy(update={"files_sha256": files_sha256}))
    found.put_bytes("datasets/bank/77/manifest.json", json.dumps(MANIFEST.to_json()).encode())
    return found


def lend(store: ObjectStore, *, with_method: bool = False) -> None:
    """Lend the adapter, which raises an error if a file is damaged."""
    third = Versions(store).find("l", "3")
    assert third is not None
    with borrowed_adapter(store, third, with_method=with_method) as folder:
        assert (folder / "adapter_model.safetensors").is_file()


def weights_of(home: Path) -> Path:
    return home / "store" / ADAPTER / "adapter_model.safetensors"


@pytest.mark.parametrize("key", READERS)
def test_a_damaged_file_is_named_by_its_reader(store: ObjectStore, key: str) -> None:
    for content in (b"", b"{", b"[]", b"[1", b"\xff\xfe{}", b'{"schema_version": 1, "x"'):
        if key == "lineages/l.yaml" and not content:
            continue  # an empty file of a lineage is one without settings
        store.put_bytes(key, content)
        with pytest.raises(DealError) as caught:
            READERS[key](store)
        assert key in str(caught.value), (content, caught.value)


def test_findings_without_a_part_are_damaged(store: ObjectStore) -> None:
    store.put_bytes(f"{ADAPTER}/findings.json", b'{"spec": {}, "dataset": {}, "training": {}}')
    with pytest.raises(StoreError, match=r"findings\.json, a file of version 3 of 'l', is damaged .*evaluation"):
        read_findings(store, ADAPTER)


@pytest.mark.parametrize("name", ["record.json", "findings.json"])
def test_a_file_beside_an_adapter_is_named_with_its_version(store: ObjectStore, name: str) -> None:
    store.put_bytes(f"{ADAPTER}/{name}", b'{"schema_version": 1, "line')
    with pytest.raises(StoreError, match=rf"{name}, a file of version 3 of 'l', is damaged .*Restore it from a backup"):
        READERS[f"{ADAPTER}/{name}"](store)


def test_of_the_champion_it_is_said_what_still_works(store: ObjectStore) -> None:
    move(store, "3")
    with pytest.raises(
        ObjectNotFoundError,
        match=r"record\.json, a file of version 3, champion of 'l', is missing"
        r".*deal version rollback N --lineage l.*deal predict --version N",
    ):
        read_record(store, THIRD)


def test_weights_are_judged_by_header_and_size(store: ObjectStore, home: Path) -> None:
    lend(store)
    whole = weights_of(home).read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for num_bytes in (0, 4, 8, header - 1, header, len(whole) - 1):
        weights_of(home).write_bytes(whole[:num_bytes])
        with pytest.raises(StoreError, match=r"adapter_model\.safetensors, a file of version 3 of 'l', is damaged"):
            lend(store)
    for damaged in (whole + b"\0", b"\xff" * len(whole)):
        weights_of(home).write_bytes(damaged)
        with pytest.raises(StoreError, match="is damaged"):
            lend(store)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_adapter_without_one_of_its_files_is_not_lent(store: ObjectStore, name: str) -> None:
    store.delete(f"{ADAPTER}/{name}")
    with pytest.raises(ObjectNotFoundError, match=rf"{name}, a file of version 3 of 'l', is missing"):
        lend(store)


@pytest.mark.parametrize("name", ["method.json", "method.safetensors"])
def test_a_damaged_state_of_the_method_stops_training_and_not_answering(store: ObjectStore, name: str) -> None:
    store.put_bytes(f"{ADAPTER}/{name}", b"[]")
    with pytest.raises(StoreError, match=rf"{name}, a file of version 3 of 'l', is damaged"):
        lend(store, with_method=True)
    lend(store)


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"r": 8}'])
def test_a_damaged_configuration_is_refused(store: ObjectStore, content: bytes) -> None:
    store.put_bytes(f"{ADAPTER}/adapter_config.json", content)
    with pytest.raises(StoreError, match=r"adapter_config\.json, a file of version 3 of 'l', is damaged"):
        lend(store)
