"""Hundreds of hostile data files in `deal check`: no file hangs or fills memory, and good rows are kept.

To add families, write a module like `tests.hostile_texts` and name it here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import hostile_parquet, hostile_texts
from tests.hostile import MAX_BYTES, MAX_SECONDS, Case, Found, run_cases

FAMILIES = {"texts": hostile_texts.FAMILIES, "parquet": hostile_parquet.FAMILIES}
MIN_CASES = {"texts": 200, "parquet": 280}


def cases_of(families: tuple[Callable[[], Iterator[Case]], ...]) -> list[Case]:
    cases = [case for family in families for case in family()]
    names = [case.name for case in cases]
    assert [name for name in names if names.count(name) > 1] == [], "a failure names one case"
    return cases


def test_a_file_that_ends_its_reader_is_refused(tmp_path: Path) -> None:
    """The first of its family, which ended each process that read it, and its like; the others are nightly."""
    first, *_ = check(list(hostile_parquet.footers())[:12], tmp_path)
    assert first.error == "ReaderDiedError" and first.num_good == 0


def shown(found: Found) -> str:
    return f"{found.name}: {found.error} {found.message[:300]}"


def test_some_of_the_hostile_files_does_no_harm(tmp_path: Path) -> None:
    cases = cases_of((*hostile_texts.FAMILIES, *hostile_parquet.FAMILIES))
    assert len(cases) >= sum(MIN_CASES.values())
    check(cases[::120], tmp_path)


@pytest.mark.nightly
@pytest.mark.parametrize("kind", FAMILIES)
def test_hostile_files_do_no_harm(kind: str, tmp_path: Path) -> None:
    cases = cases_of(FAMILIES[kind])
    assert len(cases) >= MIN_CASES[kind]
    check(cases, tmp_path)


def check(cases: list[Case], folder: Path) -> list[Found]:
    """Validate the files one after another; no file is slow, large in memory, lost or refused with a poor message."""
    found = run_cases(cases, folder)
    slow = [f"{each.name}: {each.seconds:.1f} s" for each in found if each.seconds > MAX_SECONDS]
    assert not slow
    large = next((each for each in found if each.peak_bytes > MAX_BYTES), None)
    assert large is None, f"{large.name}: {large.peak_bytes / 2**20:.0f} MiB" if large else ""
    unexpected = [shown(each) for each in found if each.error and not each.is_ours]
    assert not unexpected, "\n".join(unexpected)
    lost = [
        f"{shown(each)}: {each.num_good} of {case.num_good} good rows"
        for case, each in zip(cases, found, strict=True)
        if each.num_good < case.num_good
    ]
    assert not lost, "\n".join(lost)
    said = [shown(each) for each in found if each.error and not (20 < len(each.message) < 2000)]
    assert not said, "\n".join(said)
    unsafe = [shown(each) for each in found if each.error and {"\0", "\x1b"} & set(each.message)]
    assert not unsafe, "\n".join(unsafe)
    return found
