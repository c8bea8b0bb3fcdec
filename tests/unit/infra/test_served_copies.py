"""What `deal serve` has fetched and logged goes version by version, and nothing of another lineage with it."""

from __future__ import annotations

from pathlib import Path

from infra.served_copies import ServedCopies


def test_copies_and_logs_of_other_versions_go_and_those_of_other_lineages_stay(tmp_path: Path) -> None:
    copies, others = ServedCopies(tmp_path, "l"), ServedCopies(tmp_path, "l-v1")
    for each in (copies, others):
        each.open()
        for version in ("1", "2", "12"):
            each.folder_of(version).mkdir()
            each.log_of(version).parent.mkdir(exist_ok=True)
            each.log_of(version).touch()
            each.log_of(version).with_name(f"{each.log_of(version).name}.1").touch()
    copies.keep({"2"})
    assert [copies.folder_of(version).exists() for version in ("1", "2", "12")] == [False, True, False]
    assert all(others.folder_of(version).exists() for version in ("1", "2", "12"))
    left = {path.name for path in (tmp_path / "logs").iterdir()}
    kept = {"serve-l-v2.log", "serve-l-v2.log.1"}
    assert left == kept | {f"serve-l-v1-v{number}.log{old}" for number in (1, 2, 12) for old in ("", ".1")}
    for each in (copies, others):
        each.close()
