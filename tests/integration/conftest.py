"""Shared fixtures: a home that modules copy, deployments, and an S3 server."""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from uuid import UUID

import pytest
from mlflow.tracking._tracking_service import utils as mlflow_utils

from infra.report import charts
from tasks.scorer import Scorer
from tests.adapting import BANK, CLINIC, FAIL, PASS, run
from tests.conftest import MakeOnce
from tests.s3 import ThreadedMotoServer

NO_MLFLOW = "http://127.0.0.1:9"
"""Nothing listens there. To be without MLflow saves most of a small run's time."""


@pytest.fixture
def without_mlflow(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let MLflow be away, where no test looks at it."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", NO_MLFLOW)


@pytest.fixture(scope="session")
def home_made_once(prefect_api: None, mlflow_database: Path, made_once: MakeOnce) -> MakeOnce:
    """As `made_once`, for a home: it starts with an empty MLflow, and is current while it is made."""

    def folder_of(name: str, learn: Callable[[Path], object]) -> Path:
        def make(folder: Path) -> None:
            shutil.copy(mlflow_database, folder / "mlflow.db")
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("DEAL_HOME", str(folder))
                learn(folder)

        return made_once(name, make)

    return folder_of


RESULT = "result.json"
"""The result of a home's adaptation, in the home."""


@pytest.fixture(scope="session")
def bank_home(tiny_base: Path, home_made_once: MakeOnce) -> Path:
    """A home whose lineage has learned its first task, and the file with the result."""
    return home_made_once(
        "bank-learned", lambda folder: (folder / RESULT).write_text(run(tiny_base, BANK).model_dump_json())
    )


@pytest.fixture(scope="session")
def three_versions(tiny_base: Path, home_made_once: MakeOnce) -> Path:
    """A home whose lineage `l` has learned two tasks; version 2 did not pass its gate. Tests copy or only read it."""

    def learn(folder: Path) -> None:
        found = [run(tiny_base, BANK).status, run(tiny_base, CLINIC, gate=FAIL).status]
        found.append(run(tiny_base, CLINIC, gate=PASS, again=True).status)
        assert found == ["promoted", "rejected", "promoted"]

    return home_made_once("three-versions", learn)


def copy_home(original: Path, copy: Path) -> Path:
    """Copy a home. What a test removes or damages in the copy, the original keeps."""
    shutil.copytree(original, copy, dirs_exist_ok=True)
    with closing(sqlite3.connect(copy / "mlflow.db")) as database, database:  # MLflow stores absolute addresses
        tables = [name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        for table in tables:
            for _, column, kind, *_ in database.execute(f'PRAGMA table_info("{table}")').fetchall():
                if kind.startswith(("VARCHAR", "TEXT")):
                    database.execute(
                        f'UPDATE "{table}" SET "{column}" = replace("{column}", ?, ?)', (str(original), str(copy))
                    )
    return copy


@pytest.fixture
def copy_to_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], Path]:
    """Return a function that fills the test's home with a copy of another."""
    # MLflow keeps the folder of a run's artifacts in memory by the run's id, which all copies share.
    monkeypatch.setattr(mlflow_utils, "_artifact_repos_cache", OrderedDict())
    return lambda original: copy_home(original, home)


@pytest.fixture
def copied_home(three_versions: Path, copy_to_home: Callable[[Path], Path]) -> Path:
    """A home with a copy of `three_versions`."""
    return copy_to_home(three_versions)


@pytest.fixture(scope="module")
def serving_home(prefect_api: None, mlflow_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A home without a version, for servers. The environment names the home while the module runs."""
    folder = tmp_path_factory.mktemp("serving-home")
    shutil.copy(mlflow_database, folder / "mlflow.db")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.setenv("DEAL_HOME", str(folder))
        patch.setenv("DEAL_SERVING_PRECISION", "fp32")  # so that the rounding of a batch changes no answer
        patch.setenv("DEAL_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "cache"))
        yield folder


@pytest.fixture(autouse=True)
def plain_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Write the reports' pages without pictures, which take a seventh of a small adaptation.

    tests/unit/infra/report and the tests in the browser draw them.
    """
    monkeypatch.setattr(charts, "inline_svg", lambda figure, name, title: f"<svg><title>{title}</title></svg>")


@pytest.fixture(autouse=True)
def no_recentred_accuracy(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out a note's figure that costs a third of an evaluation; `@pytest.mark.recentred` keeps it.

    The answers of the tiny base collapse nearly always, and then the accuracy at a neutral criterion is computed.
    """
    if "recentred" not in request.keywords:
        monkeypatch.setattr(Scorer, "_recentred_accuracy", lambda self, model, test_set: 0.5)


@pytest.fixture
def deployed(prefect_api: None, home: Path) -> Iterator[Path]:
    """A home whose deployments are on the tests' Prefect server."""
    from prefect.client.orchestration import get_client

    from deal_pipeline.server.deploy import CPU_POOL, GPU_POOL, deploy_all

    async def clear() -> None:
        async with get_client() as client:
            for automation in await client.read_automations():
                await client.delete_automation(automation.id)
            for deployment in await client.read_deployments():
                await client.delete_deployment(deployment.id)
            for pool in (CPU_POOL, GPU_POOL):
                await client.delete_work_pool(pool)
            await client.delete_variable_by_name("deal_store")

    (home / "logs").mkdir()
    asyncio.run(deploy_all(home))
    yield home
    asyncio.run(clear())  # other tests use the same server


@pytest.fixture
def adapt_deployment(prefect_api: None) -> Iterator[None]:
    """The deployment whose runs learn what lands, on the tests' Prefect server; nothing starts its runs."""
    from prefect.client.orchestration import get_client

    from flows.watch import adapt_landed

    async def make() -> UUID:
        async with get_client() as client:
            flow_id = await client.create_flow(adapt_landed)
            return await client.create_deployment(flow_id, name="adapt", tags=["deal"])

    async def delete() -> None:
        async with get_client() as client:
            await client.delete_deployment(made)

    made = asyncio.run(make())
    yield
    asyncio.run(delete())


@pytest.fixture
def s3_server() -> Iterator[str]:
    """Address of an S3 and SQS server over HTTP that stores everything in memory."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()
