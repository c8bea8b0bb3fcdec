"""Fixtures that are made in this process, which takes a tenth of a command's time."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from flows.adapt_result import AdaptResult
from tests.e2e.whole import whole as whole

AdaptHere = Callable[[Path, Path], AdaptResult]


@pytest.fixture
def adapt_here(prefect_api: None, mlflow_database: Path, tmp_path: Path) -> AdaptHere:
    """Adapt to a spec file's arrival in a home that is not there yet."""

    def adapt_here(spec: Path, home: Path) -> AdaptResult:
        from flows.adapt import adapt
        from tasks.spec import read_spec

        home.mkdir()
        shutil.copy(mlflow_database, home / "mlflow.db")
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv("MLFLOW_TRACKING_URI", raising=False)
            patch.setenv("DEAL_HOME", str(home))
            patch.setenv("DEAL_CACHE_DIR", str(tmp_path / "cache"))
            return asyncio.run(adapt(read_spec(spec)))

    return adapt_here
