"""`deal data delete` while an arrival is read, while it spreads to another lineage, and after its file was replaced."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

import flows.forget
import tasks.adaptation.ingest
from deal_core.config import DataConfig
from deal_core.errors import ConfigError
from flows.forget import ForgetResult, forget, plan_forget
from flows.lock import lock_lineage
from infra.lineage_state import EndedArrival, note_ended
from infra.store.local import FileStore
from infra.store.opening import open_store
from tasks.adaptation.ingest import ingest as ingest_rows
from tasks.inbox import look
from tasks.lineage.tombstones import ForgottenRowsError
from tasks.progress import LogReporter, reporting_to
from tasks.references import DatasetRef
from tasks.spec import TaskSpec
from tests.adapting import BANK
from tests.in_process import KilledError

KEY = "inbox/bank/may.jsonl"
LABELS = {"labels": ["a", "b"]}

pytestmark = pytest.mark.usefixtures("prefect_api", "home")


def land(*, labels: tuple[str, str] = ("a", "b")) -> TaskSpec:
    rows = [{"text": f"message {number}", "label": labels[number % 2]} for number in range(60)]
    open_store().put_bytes(KEY, "".join(json.dumps(row) + "\n" for row in rows).encode())
    return TaskSpec(name="bank", data=open_store().uri_of(KEY), labels=LABELS["labels"])


def stored(*folders: str) -> list[str]:
    return [info.key for folder in folders for info in open_store().list(folder)]


def ingest(arrival: TaskSpec, lineage: str, *, again: bool = False) -> DatasetRef:
    with reporting_to(LogReporter()):  # without it, all later tests of the process would share its stop
        return ingest_rows(open_store(), arrival, DataConfig(), None, lineage, again)


def forget_file() -> ForgetResult:
    return asyncio.run(forget(KEY, "a customer asked"))


@pytest.fixture
def forgotten_while_read(monkeypatch: pytest.MonkeyPatch) -> list[ForgetResult]:
    """A person gives `deal data delete` after the file was read and before its rows are stored."""
    build, results = tasks.adaptation.ingest.build_dataset, []

    def build_slowly(*arguments: Any) -> Any:
        try:
            return build(*arguments)
        finally:
            results.append(forget_file())

    monkeypatch.setattr(tasks.adaptation.ingest, "build_dataset", build_slowly)
    return results


def test_a_file_that_is_forgotten_while_it_is_read_is_not_learned(forgotten_while_read: list[ForgetResult]) -> None:
    arrival = land()
    with pytest.raises(ForgottenRowsError, match="a customer asked"):
        ingest(arrival, "l")
    (result,) = forgotten_while_read
    assert [each.kind for each in result.plan.held] == ["inbox file"], "no dataset was there yet"
    assert not stored("datasets", "quarantine", "inbox")


def test_a_refused_file_that_is_forgotten_while_it_is_read_leaves_no_rows(
    forgotten_while_read: list[ForgetResult],
) -> None:
    arrival = land(labels=("x", "y"))
    with pytest.raises(ForgottenRowsError):
        ingest(arrival, "l")
    assert len(forgotten_while_read) == 1 and not stored("datasets", "quarantine", "inbox")


def test_rows_of_a_run_that_is_killed_while_it_stores_them_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever it was killed, its bad rows too."""
    upload, is_killed, num_deaths = FileStore.upload_file, True, 0
    while is_killed:
        arrival, left = land(), num_deaths
        open_store().put_bytes(KEY, open_store().get_bytes(KEY) + b'{"text": "", "label": "a"}\n')

        def die(store: FileStore, local: Path, key: str) -> None:
            nonlocal left
            if left == 0:
                raise KilledError(key)
            left -= 1
            upload(store, local, key)

        with monkeypatch.context() as patch, suppress(KilledError):
            patch.setattr(FileStore, "upload_file", die)
            ingest(arrival, "l", again=True)
            is_killed = False
        num_deaths += is_killed
        forget_file()
        assert not stored("datasets", "quarantine", "inbox"), num_deaths
    assert num_deaths > 3, "rows, manifest and bad rows are files of their own"


def test_a_file_is_forgotten_in_lineages_that_name_its_labels_otherwise_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was known of the file alone when the call began is a dataset of each lineage when it looks again."""
    arrival = land()
    held = spread_after_the_first_look(monkeypatch, arrival, {"l": ["a", "b"], "m": {"a": "first", "b": "second"}})
    result = forget_file()
    assert held == ["l", "m"] and not stored("datasets", "inbox")
    assert len(result.tombstone.landed) == 2, "the names of the labels count in the digest"


def test_a_lineage_that_gets_the_rows_meanwhile_is_held_too(monkeypatch: pytest.MonkeyPatch) -> None:
    arrival = land()
    ingest(arrival, "l")
    held = spread_after_the_first_look(monkeypatch, arrival, {"m": LABELS["labels"]})
    forget_file()
    assert held == ["l", "l", "m"] and not stored("datasets", "inbox")


def spread_after_the_first_look(
    monkeypatch: pytest.MonkeyPatch, arrival: TaskSpec, labels_of: dict[str, Any]
) -> list[str]:
    """Let lineages store the arrival right after the first plan; return the list of the lineages that are locked."""
    plan, held, plans = flows.forget.plan_forgetting, [], []

    def plan_and_spread(*arguments: Any) -> Any:
        plans.append(plan(*arguments))
        for lineage, labels in labels_of.items() if len(plans) == 1 else ():
            asked = TaskSpec(name=arrival.name, data=arrival.data, labels=labels)
            ingest(asked, lineage, again=True)
        return plans[-1]

    def lock(lineage: str) -> AbstractAsyncContextManager[Any]:
        held.append(lineage)
        return lock_lineage(lineage)

    monkeypatch.setattr(flows.forget, "plan_forgetting", plan_and_spread)
    monkeypatch.setattr(flows.forget, "lock_lineage", lock)
    return held


def test_a_file_that_took_the_place_of_a_learned_one_is_not_forgotten_by_its_key(
    copy_to_home: Callable[[Path], Path], three_versions: Path
) -> None:
    copy_to_home(three_versions)
    store = open_store()
    store.put_bytes(KEY, Path(BANK["data"]).read_bytes())
    (info,) = look(store).arrivals
    end = EndedArrival(
        etag=info.etag, written=info.written, outcome="promoted", message="", version="1", at=datetime.now(UTC)
    )
    note_ended(store, "l", {KEY: end})
    learned = plan_forget(store, KEY)
    assert {each.kind for each in learned.held} >= {"inbox file", "test rows"}
    assert [each.version for each in learned.learned][:1] == ["1"]

    land()
    with pytest.raises(ConfigError, match=f"another content than the arrival {learned.sha256}"):
        forget_file()
    assert stored("inbox") == [KEY] and not stored("forgotten")
    result = asyncio.run(forget(learned.sha256))
    assert result.tombstone.versions[:1] == ("l/1",) and stored("inbox") == [KEY], "the new file stays"
