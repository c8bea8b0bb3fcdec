"""The store's copy of the versions in the registry."""

from __future__ import annotations

from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from infra.tracking.facts import VersionFacts, VersionInfo
from infra.version_log import VersionLog

from deal_core.judging_config import RolloutTerms
from infra.store.base import ObjectNotFoundError
from infra.store.keys import version_key
from infra.store.local import open_store

FACTS = VersionFacts(
    run_key="key",
    task="bank",
    strategy="deal",
    base_sha256="b",
    dataset_sha256="d",
    config_sha256="c",
    adapter_uri="adapters/l/key",
    adapter_sha256="a",
    files_sha256={},
    train_seconds=1.0,
    parent_version="1",
    accepted=False,
    reasons=("bank: −12 points",),
    vetoes=({"kind": "drop", "task": "bank", "value": 12.5, "limit": None},),
    approval="awaiting",
    flow_run="f",
    landed_sha256="x",
    requeued_sha256="y",
    average_accuracy=0.75,
    forgetting=-0.1,
    backward_transfer=None,
    forward_transfer=0.0,
)
INFO = VersionInfo(
    **asdict(FACTS),
    lineage="l",
    version="12",
    aliases=("champion",),
    created=datetime(2030, 1, 2, 3, 4, 5, 6789, UTC),
    tracking_id="run",
    model_id="model",
    promoted="4",
)


@pytest.fixture
def log(tmp_path: Path) -> VersionLog:
    return VersionLog(open_store((tmp_path / "store").as_uri()))


def test_facts_come_back_as_they_were(log: VersionLog) -> None:
    log.keep(INFO)
    found = log.read("l", 12)
    assert found.facts == FACTS and found.facts.tags() == FACTS.tags()
    assert (found.version, found.created, found.adapter_removed) == ("12", INFO.created, None)
    tried = replace(INFO, version="13", rollout=RolloutTerms("canary", 0.1, 200, 10.0, 0.95))
    log.keep(tried)
    assert log.read("l", 13).facts.rollout == tried.rollout
    log.store.delete(version_key("l", 13))
    assert log.numbers("l") == {12} and log.numbers("other") == frozenset()
    with pytest.raises(ObjectNotFoundError):
        log.read("l", 1)


def test_what_is_written_is_left_unless_it_is_kept_anew(log: VersionLog) -> None:
    log.keep(INFO)
    log.keep_missing("l", [replace(INFO, version="11"), replace(INFO, task="other")])
    assert log.numbers("l") == {11, 12} and log.read("l", 12).facts.task == "bank"
    log.keep(replace(INFO, task="other"))
    assert log.read("l", 12).facts.task == "other"


def test_a_removed_adapter_is_noted_where_its_version_is_known(log: VersionLog) -> None:
    log.keep(INFO)
    for version in ("12", "13"):
        log.note_removed("l", version, "2030-02-01")
    assert log.numbers("l") == {12}
    assert (log.read("l", 12).adapter_removed, log.read("l", 12).facts) == ("2030-02-01", FACTS)
