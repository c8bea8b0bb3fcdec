"""`--minutes N`: a run of tests that ends in time. No test is started that would not; what is left out is listed.

`@pytest.mark.nightly(minutes=3)` says how long a test may take while others run beside it; without it, one minute.
Tests of whole stacks of servers come first, the longest before the others: one process takes them one after another,
while the others go on with the rest. Then short tests come before long ones, so that as few as possible are left out;
of equally long ones, those come first that protect most.
"""

from __future__ import annotations

import time
from pathlib import PurePath
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

STACKS = ("test_up.py", "test_up_at_length.py", "test_closed_loop.py", "test_containers.py")
"""Files whose tests start a whole stack of servers."""
SHARING = "test_real_engine.py"
"""A file whose tests share a server that takes a minute to start: one process takes them all."""
PROTECTING = (
    "deal_core/training",
    "storage",
    "hostile",
    "adaptation",
    "e2e",
    "production",
    "orchestration",
    "package",
)
"""Folders of tests, the most important first: trainings that several processes share or that were killed, what may be
lost or must be forgotten, files of strangers, and then what a person sees."""
END = pytest.StashKey[float]()
"""When the run has to end, in seconds since 1970."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option."""
    parser.addoption(
        "--minutes",
        type=float,
        metavar="N",
        help="start no test that would not end within N minutes, and list at the end what was left out",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Set the end. The processes of pytest-xdist have that of the run that started them."""
    minutes = config.getoption("minutes")
    if minutes is not None:
        worker = getattr(config, "workerinput", {})
        config.stash[END] = worker.get("end", time.time() + 60 * minutes)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Tell a process of pytest-xdist the end."""
    if END in node.config.stash:
        node.workerinput["end"] = node.config.stash[END]


class _OneStack(LoadScopeScheduling):  # type: ignore[misc]  # its package has no types
    """Gives all tests of STACKS to one process. Groups of xdist 3.8 have no effect with pytest 9.2."""

    def _split_scope(self, nodeid: str) -> str:
        if _needs_a_stack(nodeid):
            return "stacks"
        file = nodeid.split("::", maxsplit=1)[0]
        return file if file.endswith(SHARING) else nodeid


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling | None:
    """Divide the tests among the processes of pytest-xdist."""
    return _OneStack(config, log) if END in config.stash else None


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Sort the tests. The order is the same in all processes."""
    if END in config.stash:
        items.sort(key=_order)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Leave the test out, before any fixture is made, if it would not end in time."""
    if END in item.config.stash:
        left, needed = max(0.0, item.config.stash[END] - time.time()), _minutes(item)
        if left < 60 * needed:
            pytest.skip(f"it may take {needed:g} min, and {left / 60:.1f} were left")


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """List the tests that were left out: for want of time, of a program or of a device."""
    if END not in config.stash or config.option.collectonly:
        return
    skipped = terminalreporter.stats.get("skipped", [])
    terminalreporter.section(f"tests that were left out: {len(skipped)}")
    for report in sorted(skipped, key=lambda report: report.nodeid):
        reason = str(report.longrepr[2]).removeprefix("Skipped: ")  # a path, a line and the reason
        terminalreporter.line(f"{report.nodeid}: {reason}")


def _minutes(item: pytest.Item) -> float:
    mark = item.get_closest_marker("nightly")
    return float(mark.kwargs.get("minutes", 1)) if mark else 1.0


def _needs_a_stack(nodeid: str) -> bool:
    return PurePath(nodeid.partition("::")[0]).name in STACKS


def _order(item: pytest.Item) -> tuple[bool, float, int]:
    folder = PurePath(item.nodeid.partition("::")[0]).parent.as_posix()
    protects = next((place for place, part in enumerate(PROTECTING) if part in folder), len(PROTECTING))
    if _needs_a_stack(item.nodeid):  # the longest one first: there would be no time for it at the end
        return False, -_minutes(item), protects
    return True, _minutes(item), protects
