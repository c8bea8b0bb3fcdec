"""The versions of a lineage: numbered once, never changed, and read with what became of them."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from deal_core.errors import RegistryError, StoreError
from deal_core.evaluation.arrival_check import ArrivalScore
from deal_core.judging_config import RolloutTerms
from infra.promotions import Move, PromotionLog
from infra.store import keys
from infra.store.base import ObjectStore
from infra.store.local import FileStore
from infra.versions import Versions, descent, require_adapter
from tests.stored_versions import move, put_version, run_key, unregistered, version

TERMS = RolloutTerms("canary", 0.1, 200, 10.0, 0.95)
TWO_PROCESSES = """
import sys
from pathlib import Path
from infra.store.local import FileStore
from infra.versions import Versions
from tests.stored_versions import unregistered

versions, offset = Versions(FileStore(Path(sys.argv[1]))), int(sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
for number in range(8):
    own, shared = versions.register(unregistered(offset + number)), versions.register(unregistered(900 + number))
    print(own.version, shared.version, flush=True)
"""


@pytest.fixture
def store(tmp_path: Path) -> FileStore:
    return FileStore(tmp_path / "store")


def stored(store: ObjectStore, number: int) -> bytes:
    return store.get_bytes(keys.version_key("l", number))


def test_a_registered_version_comes_back_whole_under_the_next_number(store: FileStore) -> None:
    versions = Versions(store)
    whole = unregistered(
        1,
        accepted=True,
        landed_sha256="x",
        requeued_sha256="y",
        flow_run="f",
        reasons=("bank: −12 points",),
        failed_checks=({"kind": "drop", "task": "bank", "value": 12.5, "limit": None},),
        rollout=TERMS,
        files_sha256={"method.json": ("a", "b")},
        arrival=ArrivalScore(accuracy=0.5, low=0.3, high=0.7, num_rows=20),
        average_accuracy=0.75,
        forgetting=-0.1,
        accuracies={"bank": 0.75},
    )
    first = versions.register(whole)
    assert first.version == "1" and first.created > whole.created
    same = {"version": "1", "created": first.created, "since": first.since}
    assert first == versions.find("l", "1") == whole.model_copy(update=same)
    assert versions.register(unregistered(2, 1)).version == "2"
    assert [each.version for each in versions.all("l")] == ["1", "2"]
    assert versions.with_run_key("l", run_key(2)) == versions.find("l", "2")
    assert versions.all("other") == () and versions.find("l", "3") is None and versions.champion("l") is None
    store.put_bytes("versions/notes.txt", b"of somebody")
    assert versions.lineages() == ("l",)


def test_a_run_has_one_version_however_often_it_is_registered(store: FileStore) -> None:
    versions = Versions(store)
    first = versions.register(unregistered(7, average_accuracy=0.5))
    content = stored(store, 1)
    assert versions.register(unregistered(7, average_accuracy=0.9)) == first
    assert stored(store, 1) == content and len(versions.all("l")) == 1
    assert versions.register(unregistered(7, lineage="m")).lineage == "m", "another lineage has versions of its own"


def test_two_processes_get_different_numbers_and_one_version_of_the_same_run(store: FileStore) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_PROCESSES, str(store.root), offset],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[3],
        )
        for offset in ("100", "200")
    ]
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    with ThreadPoolExecutor(2) as pool:
        said = [output.split("\n")[:-1] for output, _ in pool.map(lambda each: each.communicate("go\n"), processes)]
    lines = [[line.split() for line in lines] for lines in said]
    own = {
        run_key(offset + number): lines[index][number][0]
        for index, offset in enumerate((100, 200))
        for number in range(8)
    }
    shared = [{run_key(900 + number): lines[index][number][1] for number in range(8)} for index in range(2)]
    assert shared[0] == shared[1], "both processes got the same version of one run"
    registered = {each.run_key: each.version for each in Versions(store).all("l")}
    assert registered == {**own, **shared[0]}
    assert sorted(map(int, registered.values())) == list(range(1, 25))


def test_later_notes_are_read_with_the_version_and_do_not_change_it(store: FileStore) -> None:
    versions = Versions(store)
    first = versions.register(unregistered(1, files_sha256={"method.json": ("a",)}))
    versions.register(unregistered(2, files_sha256={"method.json": ("b",)}))
    content = stored(store, 1)
    versions.note_files(first, {"method.json": ("a", "new")})
    versions.note_files(first, {"method.json": ("new",)})
    assert [each.files_sha256 for each in versions.all("l")] == [{"method.json": ("new",)}, {"method.json": ("b",)}]
    for day in ("2030-02-01", "2030-02-02"):
        versions.note_removed("l", "2", day)
    kept, removed = versions.all("l")
    assert (kept.since.adapter_removed, removed.since.adapter_removed) == (None, "2030-02-01"), "the first day stays"
    assert stored(store, 1) == content and len(versions.all("l")) == 2
    require_adapter(kept)
    with pytest.raises(
        RegistryError, match=r"adapter of version 2 of 'l' was removed on 2030-02-01 \(deal data gc, or "
    ):
        require_adapter(removed)


def test_a_promotion_log_that_lacks_entries_is_noticed(store: FileStore) -> None:
    versions = Versions(store)
    for number in (1, 2, 3):
        versions.register(unregistered(number, number - 1 or None, accepted=True))
        move(store, str(number))
    assert [each.moves_before for each in versions.all("l")] == [0, 1, 2]
    entries = {number: store.get_bytes(keys.promotion_key("l", number)) for number in (1, 2, 3)}
    for lost in ({1}, {2}, {2, 3}, {1, 2, 3}):
        for number in lost:
            store.delete(keys.promotion_key("l", number))
        for read in (lambda: versions.champion("l"), lambda: versions.register(unregistered(9, 3))):
            with pytest.raises(StoreError) as refused:
                read()
            assert refused.value.code == "moves-lost", lost
        for number in lost:
            store.put_bytes(keys.promotion_key("l", number), entries[number])
    assert names(store)["3"] == ("challenger", "champion")


def test_a_reader_waits_for_the_entry_that_a_version_of_the_same_moment_names(
    store: FileStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_version(store, version(1, accepted=True))
    read = PromotionLog.moves

    def moves(log: PromotionLog, lineage: str) -> tuple[Move, ...]:
        before = read(log, lineage)
        if not before:  # another process promotes version 1 and registers version 2 before the versions are read
            move(store, "1")
            put_version(store, version(2, 1, accepted=True, moves_before=1))
        return before

    monkeypatch.setattr(PromotionLog, "moves", moves)
    assert [each.aliases for each in Versions(store).all("l")] == [("champion",), ("challenger",)]


def names(store: ObjectStore) -> dict[str, tuple[str, ...]]:
    return {each.version: each.aliases for each in Versions(store).all("l") if each.aliases}


def standings(store: ObjectStore) -> list[str]:
    return [each.standing for each in Versions(store).all("l")]


def test_aliases_follow_the_promotion_log(store: FileStore) -> None:
    for number in (1, 2, 3):
        put_version(store, version(number, number - 1 or None, accepted=number != 3))
    assert names(store) == {"2": ("challenger",)} and Versions(store).champion("l") is None
    move(store, "1")
    assert names(store) == {"1": ("champion",), "2": ("challenger",)}
    move(store, "2")
    assert names(store) == {"1": ("previous",), "2": ("challenger", "champion")}
    move(store, "1", "rolled back")
    assert names(store) == {"1": ("challenger", "champion"), "2": ("previous",)}, (
        "what was rolled back challenges nobody"
    )
    found = Versions(store)
    assert found.champion("l") == found.find("l", "1")
    assert [each.since.promoted for each in found.all("l")] == [1, 2, None]
    move(store, "2", "rejected", run=None, who="anna")
    assert names(store) == {"1": ("challenger", "champion"), "2": ("previous",)}, "nobody's challenger was rejected"


def test_a_version_says_that_it_was_rolled_back_until_it_serves_again(store: FileStore) -> None:
    for number, parent in ((1, None), (2, 1), (3, 2), (4, 1)):
        put_version(store, version(number, parent, accepted=True))
        move(store, str(number)) if number != 4 else move(store, "1", "rolled back", who="Ada", why="complaints")

    def rolled_back() -> dict[str, str]:
        found = {each.version: each.since.rolled_back for each in Versions(store).all("l")}
        return {number: rollback.why for number, rollback in found.items() if rollback}

    assert rolled_back() == {"2": "complaints", "3": "complaints"}, "and neither the champion nor what came later"
    said = Versions(store).all("l")[2].since.rolled_back
    assert said is not None and (said.champion, said.who) == ("1", "Ada")
    assert names(store)["4"] == ("challenger",)
    move(store, "2", "rolled back", why="a mistake")
    assert rolled_back() == {"3": "complaints"}, "version 2 serves again"
    move(store, "2", "stopped", champion=None)
    assert rolled_back() == {"3": "complaints"}


def test_a_version_stands_as_the_log_and_the_gate_say(store: FileStore) -> None:
    put_version(store, version(1, accepted=True))
    put_version(store, version(2, 1, accepted=True))
    put_version(store, version(3, 2))
    put_version(store, version(4, 2, accepted=True, needs_approval=True))
    assert standings(store) == ["left behind", "left behind", "rejected by the gate", "left behind"]
    move(store, "1")
    move(store, "2")
    assert standings(store) == ["learned", "learned", "rejected by the gate", "awaiting approval"]
    move(store, "1", "rolled back")
    assert standings(store) == ["learned", "left behind", "rejected by the gate", "left behind"]
    move(store, "2", "rolled back")
    move(store, "4", "rejected", run=None, who="anna")
    assert standings(store)[3] == "rejected by a person"
    refused = Versions(store).all("l")[3]
    assert (refused.is_rejected, refused.approval, refused.since.refused_by) == (True, "refused", "anna")


@pytest.mark.parametrize(
    ("changes", "moves", "outcome"),
    [
        ({}, [], "rejected"),
        ({"accepted": True}, [], "promoted"),
        ({"accepted": True, "needs_approval": True}, [], "awaiting approval"),
        ({"accepted": True, "needs_approval": True}, [("promoted", None)], "promoted"),
        ({"accepted": True, "needs_approval": True}, [("rejected", None)], "rejected"),
        ({"accepted": True, "rollout": TERMS}, [("rollout", "r")], "rollout"),
        ({"accepted": True, "rollout": TERMS}, [("rollout", "r"), ("promoted", "r")], "promoted"),
        ({"accepted": True, "branch": 1}, [], "remade"),
        ({"branch": 1}, [], "rejected"),
        ({"accepted": True, "needs_approval": True, "rollout": TERMS}, [], "awaiting approval"),
        ({"accepted": True, "needs_approval": True, "rollout": TERMS}, [("rollout", None)], "rollout"),
    ],
)
def test_the_end_of_a_run_is_told(
    store: FileStore, changes: dict[str, Any], moves: list[tuple[str, str | None]], outcome: str
) -> None:
    put_version(store, version(1, **changes))
    for action, run in moves:
        move(store, "1", action, run=run, rollout="canary" if action == "rollout" else None)
    (found,) = Versions(store).all("l")
    assert found.outcome == outcome


def test_a_rollout_has_its_alias_while_it_runs(store: FileStore) -> None:
    put_version(store, version(1, accepted=True))
    put_version(store, version(2, 1, accepted=True, rollout=TERMS))
    move(store, "1")
    begun = move(store, "2", "rollout", rollout="canary")
    assert names(store)["2"] == ("challenger", "rollout") and standings(store)[1] == "rollout"
    assert Versions(store).all("l")[1].since.rolled_out == begun.number
    move(store, "2", "rejected", who="rollout")
    assert "2" not in names(store) and standings(store)[1] == "rejected by its rollout"


def test_a_version_is_approved_only_if_a_person_did_it(store: FileStore) -> None:
    """Gates name their run, and a branch its number."""
    for number in (1, 2, 3):
        put_version(store, version(number, accepted=True))
    move(store, "1", run=run_key(1))
    move(store, "2", branch=1)
    move(store, "3")
    assert [each.approval for each in Versions(store).all("l")] == [None, None, "given"]


def test_a_version_descends_from_its_parents() -> None:
    line = (version(1), version(2, 1), version(3, 1), version(4, 3))
    assert [each.version for each in descent(line, line[3])] == ["4", "3", "1"]
    assert descent(line, None) == ()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"schema_version": 1}', "is damaged"),
        (b'{"schema_version": 2}', "schema version 2, this release reads 1"),
        (version(3).model_dump_json().encode(), "is damaged .*it is that of version 3 of 'l'"),
        (version(2, lineage="m").model_dump_json().encode(), "is damaged .*it is that of version 2 of 'm'"),
    ],
)
def test_a_damaged_version_is_named_with_what_to_do(store: FileStore, content: bytes, said: str) -> None:
    put_version(store, version(1))
    store.put_bytes("versions/l/00000002.json", content)
    with pytest.raises(
        StoreError,
        match=rf"versions/l/00000002\.json, the entry of version 2 of 'l', .*{said}.*Restore it from a backup",
    ):
        Versions(store).all("l")


@pytest.mark.parametrize("kind", ["files", "removed"])
def test_a_damaged_note_is_named_with_its_version(store: FileStore, kind: str) -> None:
    put_version(store, version(1))
    store.put_bytes(f"versions/l/00000001.{kind}.json", b'{"schema_version": 1}')
    with pytest.raises(StoreError, match=rf"00000001\.{kind}\.json, the entry of version 1 of 'l', is damaged"):
        Versions(store).all("l")


def test_a_promoted_version_that_is_missing_is_said(store: FileStore) -> None:
    """Without its champion, the lineage would learn from the base model again."""
    for number in (1, 2):
        put_version(store, version(number, accepted=True))
        move(store, str(number))
    for number in (2, 1):
        store.delete(keys.version_key("l", number))
        with pytest.raises(StoreError, match=rf"versions/l lacks the entry of version {number} of 'l', which"):
            Versions(store).champion("l")
        with pytest.raises(StoreError, match="Restore it from a backup"):
            Versions(store).register(unregistered(9))
        put_version(store, version(number, accepted=True))
