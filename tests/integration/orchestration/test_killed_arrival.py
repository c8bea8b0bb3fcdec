"""kill -9 at seven moments of an arrival, of a watch and of a server's processes: the file is learned once."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from uuid import UUID

import pytest
from prefect.client.orchestration import get_client
from prefect.exceptions import ObjectNotFound
from prefect.settings import get_current_settings
from prefect.states import Crashed

from benchmarks.tiny_base import EXAMPLES, NO_LIMITS
from deal_pipeline.server.status import read_status
from flows.sensor import watch_inbox
from flows.watch import watch
from infra.lineage_state import read_state
from infra.promotions import PromotionLog
from infra.store.opening import open_store
from infra.versions import Versions
from tasks.lineage.settings import WatchedLineage, add_lineage, read_lineage
from tasks.spec import parse

ROOT = Path(__file__).parents[3]
KILLED = """
import os, re, signal, sys
import infra.store.local

path, text = sys.argv[1:3]
del sys.argv[1:3]
place = infra.store.local._place

def place_and_die(part, target, **options):
    placed = place(part, target, **options)
    if re.search(path, str(target)) and re.search(text, target.read_text(errors="replace")):
        os.kill(os.getpid(), signal.SIGKILL)
    return placed

infra.store.local._place = place_and_die
"""
"""A process dies as soon as it has written a file whose path and text match two patterns."""
WATCH = "from deal_pipeline.cli.app import main; main()"
SENSOR = "import asyncio, flows.sensor; asyncio.run(flows.sensor.watch_inbox(for_seconds=600, poll_seconds=0.05))"
RUN = "import runpy; runpy.run_module('prefect.engine', run_name='__main__')"
STATE = r"/lineages/l\.state\.json$"
SENSED = {
    "landed": (STATE, r'"state":\s*"landed"'),
    "counted": (STATE, r'"num_rows":\s*\d'),
    "claimed": (STATE, r'"state":\s*"claimed"'),
}
LEARNED = {
    "run started": (r"/runs/l/", ""),
    "adapter stored": (r"/adapters/l/.*/adapter_model\.safetensors$", ""),
    "moved": (r"/promotions/l/", ""),
    "noted": (r"/arrivals/l/", ""),
}

pytestmark = [pytest.mark.nightly(minutes=2), pytest.mark.usefixtures("prefect_api", "without_mlflow")]


@pytest.fixture
def landed(home: Path, tiny_base: Path) -> Path:
    """A home in which a file has landed, whose lineage waits for rows."""
    values = {
        "lineage": "l",
        "base_model": str(tiny_base),
        "gate": NO_LIMITS,
        "train": {"max_steps": 2, "max_prompt_tokens": 192, "checkpoint_steps": 0},
        "retrain": {"min_rows": 2},
    }
    add_lineage(open_store(), parse(WatchedLineage, values, "test"), values)
    open_store().put_bytes("inbox/parcels/a.jsonl", (EXAMPLES / "parcels" / "messages.jsonl").read_bytes())
    later = time.time() + 3600  # of a clock that runs ahead: the first look cannot know whether it is complete
    os.utime(home / "store" / "inbox" / "parcels" / "a.jsonl", (later, later))
    return home


def server() -> dict[str, str]:
    """The address of the tests' Prefect server. A server of its own would outlive a command that is killed."""
    return {"PREFECT_API_URL": str(get_current_settings().api.url), "PYTHONPATH": str(ROOT)}


def kill(home: Path, moment: tuple[str, str], script: str, *words: str) -> None:
    """Let a process work until a moment at which it is killed, and end the lease by which it held its lineage."""

    async def end_lease() -> None:
        async with get_client() as client:
            with suppress(ObjectNotFound):
                await client.delete_global_concurrency_limit_by_name("lineage-l")

    died = subprocess.run(
        [sys.executable, "-c", f"{KILLED}{script}", *moment, *words],
        cwd=home,
        env={**os.environ, **server()},
        capture_output=True,
        text=True,
        check=False,
    )
    assert died.returncode == -signal.SIGKILL, died.stdout + died.stderr
    asyncio.run(end_lease())


def require_learned_once(home: Path) -> None:
    (version,) = Versions(open_store()).all("l")
    assert "champion" in version.aliases and len(PromotionLog(open_store()).moves("l")) == 1
    (status,) = asyncio.run(read_status(home)).lineages
    assert (status.num_open, status.failed, status.held_arrivals, status.waiting) == (0, (), (), ())
    assert read_state(open_store(), "l").batches == ()


@pytest.mark.parametrize("moment", [*SENSED, *LEARNED])
def test_a_file_is_learned_once_though_its_watch_was_killed(landed: Path, moment: str) -> None:
    words = ("adapt", "--watch", "--once", "--poll", "0.1", "--lineage", "l")
    kill(landed, (SENSED | LEARNED)[moment], WATCH, *words)
    watches = [asyncio.run(watch(read_lineage(open_store(), "l"), once=True, poll_seconds=0.1)) for _ in range(2)]
    assert [len(done.files) for done in watches] == [int(moment != "noted"), 0]
    require_learned_once(landed)


def look() -> int:
    """The runs that one look of the sensor starts."""
    return asyncio.run(watch_inbox(for_seconds=0, poll_seconds=0.01))


def started() -> str:
    """The run of the claimed batch, once the sensor has started one."""
    assert any(look() for _ in range(50)), "the first look finds a file that may still be written"
    claimed = read_state(open_store(), "l").claimed
    assert claimed is not None and claimed.run is not None
    return claimed.run


def bury(run: str) -> None:
    """Do what a worker does when the process of its run has died."""

    async def act() -> None:
        async with get_client() as client:
            await client.set_flow_run_state(UUID(run), Crashed(), force=True)

    asyncio.run(act())


@pytest.mark.usefixtures("deployed")
@pytest.mark.parametrize("moment", [*SENSED, *LEARNED])
def test_a_file_is_learned_once_though_a_process_of_a_server_was_killed(landed: Path, moment: str) -> None:
    if moment in SENSED:
        kill(landed, SENSED[moment], SENSOR)
    else:
        run = started()
        kill(landed, LEARNED[moment], RUN, run)
        bury(run)
    if moment == "noted":
        assert look() == 0, "the file has ended"
    else:
        words = [sys.executable, "-m", "prefect.engine", started()]
        done = subprocess.run(words, env={**os.environ, **server()}, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    assert look() == 0
    require_learned_once(landed)
