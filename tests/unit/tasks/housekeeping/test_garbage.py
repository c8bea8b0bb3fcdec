"""What of a lineage can go, and what killed processes have left: found once it is old, never while it is in use."""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from infra.branches import Branch
from infra.run_journal import Run, RunJournal
from infra.store.base import temporary_folder
from infra.store.local import FileStore
from infra.versions import Versions
from tasks.housekeeping.garbage import (
    Folder,
    Inventory,
    find_leftovers,
    kept_versions,
    list_all_lineages,
    look_at_lineage,
    plan_removals,
    remove,
    remove_local,
)
from tests.stored_versions import CREATED, put_version, version
from tests.stored_versions import run as made_run

NOW = datetime(2020, 6, 30, tzinfo=UTC)
LIMIT = timedelta(days=30)
OLD, YOUNG = NOW - timedelta(days=31), NOW - timedelta(days=29)
assert OLD == CREATED, "a version of the tests is old"


def run(number: int, parent: int | None = None, **changes: Any) -> Run:
    """A run that has failed and is young."""
    return made_run(number, parent, **{"started": YOUNG, **changes})


def folder(number: int, modified: datetime = OLD) -> tuple[str, Folder]:
    return f"{number:016d}", Folder(f"adapters/l/{number:016d}", 10 * number, modified)


def plan(**held: Any) -> list[tuple[str, str]]:
    values = {"versions": (), "runs": (), "adapters": {}, "work": {}, "training_rows": (), **held}
    return [
        (each.kind, each.address[-1])
        for each in plan_removals(Inventory(lineage="l", **values), now=NOW, older_than=LIMIT)
    ]


CHAMPION = version(1, accepted=True, aliases=("champion",))


def test_an_old_rejected_adapter_goes_and_names_its_version() -> None:
    held = Inventory("l", (CHAMPION, version(2, 1)), (), dict([folder(1), folder(2)]), {}, ())
    (removal,) = plan_removals(held, now=NOW, older_than=LIMIT)
    assert (removal.version, removal.num_bytes) == ("2", 20)
    assert removal.reason == "version 2 of 2020-05-30 was rejected"


def test_an_old_adapter_that_a_person_refused_goes_too() -> None:
    held = Inventory("l", (CHAMPION, version(2, 1, accepted=True, approval="refused")), (), dict([folder(2)]), {}, ())
    (removal,) = plan_removals(held, now=NOW, older_than=LIMIT)
    assert removal.version == "2"


@pytest.mark.parametrize(
    "changes", [{"accepted": True}, {"aliases": ("previous",)}, {"aliases": ("champion",)}, {"created": YOUNG}]
)
def test_what_is_accepted_has_an_alias_or_is_young_stays(changes: dict[str, Any]) -> None:
    assert plan(versions=(CHAMPION, version(2, 1, **changes)), adapters=dict([folder(2)])) == []


def test_what_a_kept_version_descends_from_stays_however_far() -> None:
    chain = (version(1), version(2, 1), version(3, 2, aliases=("champion",)), version(4, 3), version(5, 4))
    assert kept_versions(chain, NOW - LIMIT) == {"1", "2", "3"}
    assert plan(versions=chain, adapters=dict(map(folder, range(1, 6)))) == [("adapter", "4"), ("adapter", "5")]


def test_a_parent_that_is_missing_stops_nothing() -> None:
    assert kept_versions((version(5, 4, accepted=True),), NOW - LIMIT) == {"5"}


def test_a_work_folder_goes_once_its_run_has_a_version() -> None:
    rejected = version(2, 1, created=YOUNG)  # by an unregistered run the champion could still be continued
    found = plan(versions=(CHAMPION, rejected), runs=(run(2, 1, state="running"),), work=dict([folder(2, YOUNG)]))
    assert found == [("work folder", "2")]


@pytest.mark.parametrize("state", ["running", "failed", "finished"])
def test_a_run_that_may_go_on_keeps_its_checkpoints_and_its_adapter(state: str) -> None:
    runs = (run(9, 1, state=state),)
    assert plan(versions=(CHAMPION,), runs=runs, work=dict([folder(9)]), adapters=dict([folder(9)])) == []


def test_a_run_whose_parent_is_champion_no_more_does_not_go_on() -> None:
    later = version(2, 1, accepted=True, aliases=("champion",))
    first = version(1, accepted=True)
    found = plan(versions=(first, later), runs=(run(9, 1),), work=dict([folder(9)]), adapters=dict([folder(9)]))
    assert found == [("work folder", "9"), ("adapter", "9")]


def test_a_first_run_goes_on_from_the_base_until_there_is_a_champion() -> None:
    assert plan(runs=(run(9),), work=dict([folder(9)])) == []
    assert plan(versions=(CHAMPION,), runs=(run(9),), work=dict([folder(9)])) == [("work folder", "9")]


def test_an_old_run_does_not_go_on() -> None:
    old = (run(9, 1, started=OLD),)
    assert plan(versions=(CHAMPION,), runs=old, work=dict([folder(9)])) == [("work folder", "9")]
    assert plan(versions=(CHAMPION,), runs=old, work=dict([folder(9, YOUNG)])) == []


def test_what_no_run_is_known_of_goes_when_it_is_old() -> None:
    assert plan(adapters=dict([folder(7)]), work=dict([folder(8)])) == [("work folder", "8"), ("adapter", "7")]
    assert plan(adapters=dict([folder(7, YOUNG)]), work=dict([folder(8, YOUNG)])) == []


def test_training_rows_that_a_crash_has_left_go_once_they_are_old() -> None:
    assert plan(training_rows=(Folder("x/1", 1, OLD), Folder("x/2", 1, YOUNG))) == [("training rows", "1")]


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FileStore:
    monkeypatch.setenv("DEAL_HOME", str(tmp_path / "home"))
    return FileStore(tmp_path / "store")


def test_a_removed_adapter_is_noted_before_its_files_go(store: FileStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that is killed in between leaves the files, which the next plan finds again."""
    for number in (1, 2):
        put_version(store, version(number, accepted=number == 1))
        store.put_bytes(f"adapters/l/{number:016d}/adapter_config.json", b"{}")
    store.put_bytes("adapters/l/notes", b"of somebody")
    now, limit = datetime.now(UTC), timedelta(0)
    (removal,) = plan_removals(look_at_lineage(store, "l"), now=now, older_than=limit)
    assert removal.version == "2"

    def die(_: str) -> int:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(store, "delete", die)
        with pytest.raises(KeyboardInterrupt):
            remove(store, removal, now)
    assert store.exists(f"{removal.address}/adapter_config.json")
    assert Versions(store).all("l")[1].since.adapter_removed == f"{now:%Y-%m-%d}"
    assert plan_removals(look_at_lineage(store, "l"), now=now, older_than=limit) == (removal,)
    remove(store, removal, now)
    assert not list(store.list(removal.address)) and store.exists("adapters/l/notes")
    assert [each.version for each in Versions(store).all("l")] == ["1", "2"], "the history stays"
    assert plan_removals(look_at_lineage(store, "l"), now=now, older_than=limit) == ()


def test_what_the_jobs_of_a_killed_run_have_left_goes_with_the_run(store: FileStore) -> None:
    """Run 2 continues a version that is not champion; run 3 continues the base model, and goes on from its job."""
    for number, parent in ((2, 1), (3, None)):
        RunJournal(store).start(made_run(number, parent, started=datetime.now(UTC)))
        for name in ("inputs/train.parquet", "checkpoints/checkpoint-2/COMPLETE"):
            store.put_bytes(f"adapters/l/{number:016d}/jobs/train/{name}", b"123")
    (removal,) = plan_removals(look_at_lineage(store, "l"), now=datetime.now(UTC), older_than=LIMIT)
    assert (removal.address, removal.num_bytes) == ("adapters/l/0000000000000002", 6)
    remove(store, removal, NOW)
    assert [info.key.split("/")[2][-1] for info in store.list("adapters")] == ["3", "3"]


def test_a_lineage_of_which_only_a_version_is_left_is_known(store: FileStore) -> None:
    put_version(store, version(1, lineage="old"))
    store.put_bytes("adapters/l/0000000000000001/adapter_config.json", b"{}")
    store.put_bytes("datasets/bank/77/m/s/manifest.json", b"{}")
    assert list_all_lineages(store) == ("l", "m", "old")


def later(hours: int = 25) -> datetime:
    return datetime.now(UTC) + timedelta(hours=hours)


def test_a_temporary_folder_is_the_users_own_and_goes_with_its_use(store: FileStore, tmp_path: Path) -> None:
    with temporary_folder() as folder:
        assert folder.parent.parent == tmp_path / "home" / "tmp"
        assert folder.stat().st_mode & 0o077 == folder.parent.stat().st_mode & 0o077 == 0
        (folder / "rows").write_text("x")
        assert find_leftovers(store, later(0)) == []
    assert list((tmp_path / "home" / "tmp").iterdir()) == []


def test_what_a_killed_process_left_is_found_at_once(store: FileStore, tmp_path: Path) -> None:
    leave = (
        "import os; from infra.store.base import temporary_folder\n"
        "with temporary_folder() as folder: (folder / 'rows').write_text('rows'); os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", leave], check=False).returncode == 9
    (left,) = find_leftovers(store, later(0))
    assert Path(left.address).parent == tmp_path / "home" / "tmp" and left.num_bytes == 4
    remove_local(left.address)
    assert find_leftovers(store, later(0)) == []


@pytest.mark.parametrize("write", ["put_bytes('inbox/b', b'rows')", "upload_file(Path(sys.argv[1]), 'inbox/b')"])
def test_an_unfinished_file_of_the_store_is_left_once_its_writer_is_dead(
    store: FileStore, tmp_path: Path, write: str
) -> None:
    rows = tmp_path / "rows"
    rows.write_bytes(b"rows")
    script = (
        "import os, sys; from pathlib import Path; from infra.store.local import FileStore\n"
        "os.fsync = lambda _: (print('written', flush=True), sys.stdin.read())\n"
        f"FileStore(Path({str(store.root)!r})).{write}"
    )
    command = [sys.executable, "-c", script, str(rows)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None and writer.stdout.readline() == "written\n"
        assert find_leftovers(store, later(0)) == []
        writer.kill()
    (left,) = find_leftovers(store, later(0))
    assert Path(left.address).read_bytes() == b"rows"
    remove_local(left.address)
    assert find_leftovers(store, later(0)) == [] and [*store.list()] == []
    assert store.put_bytes("inbox/b", b"rows", if_absent=True)


def test_what_was_left_for_a_day_is_found_and_removed_and_the_store_is_whole(store: FileStore, tmp_path: Path) -> None:
    assert find_leftovers(store, later()) == []
    store.put_bytes("inbox/a", b"rows")
    part = store.root / ".incoming" / "0123"
    part.touch()  # its writer holds no lock yet
    temporary = tmp_path / "home" / "tmp" / "x"
    (temporary / "folder").mkdir(parents=True)
    (temporary / "folder" / "rows").write_bytes(b"rows")
    assert find_leftovers(store, later(23)) == []
    found = find_leftovers(store, later())
    assert [(each.address, each.num_bytes) for each in found] == [(str(temporary), 4), (str(part), 0)]
    for each in found * 2:
        remove_local(each.address)
    assert find_leftovers(store, later()) == [] and store.get_bytes("inbox/a") == b"rows"


def test_what_is_still_written_to_is_not_left(store: FileStore, tmp_path: Path) -> None:
    folder = tmp_path / "home" / "tmp" / "x"
    folder.mkdir(parents=True)
    (folder / "rows").write_text("new")
    os.utime(folder, (0, 0))
    assert find_leftovers(store, later(23)) == []
    os.utime(folder / "rows", (0, 0))
    assert len(find_leftovers(store, later(0))) == 1


def test_a_run_of_an_open_branch_may_continue_what_the_branch_has_made() -> None:
    versions = (version(1, accepted=True), version(2, 1, accepted=True, aliases=("champion",)))
    branch = Branch(lineage="l", number=1, who="Ada", root="1", champion="2", arrivals={}, base_model="b")
    held = {"versions": versions, "runs": (run(3, 1),), "adapters": dict([folder(3, YOUNG)])}
    assert plan(**held) == [("adapter", "3")] and plan(**held, branch=branch) == []
