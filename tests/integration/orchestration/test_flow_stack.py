"""The servers of `deal server up` as they are started."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from deal_pipeline.server.local_processes import LocalStack, start_part, stop
from deal_pipeline.server.local_stack import _wait_for_servers, server_commands
from infra.settings import TrackingSettings


@pytest.mark.nightly
def test_mlflows_log_has_no_line_for_each_request(home: Path, free_port: int) -> None:
    settings, name = TrackingSettings(), "mlflow-server"
    stack = LocalStack(
        prefect_url="http://127.0.0.1:1",
        mlflow_url=f"http://127.0.0.1:{free_port}",
        backend_uri=settings.tracking_uri,
        artifact_uri=settings.artifact_uri,
    )
    start_part(home, stack, name, server_commands(1, free_port)[name])
    try:
        _wait_for_servers(stack)
        assert httpx.get(f"{stack.mlflow_url}/asked-for").status_code == 404
    finally:
        stop(home)
    log = stack.parts[0].log.read_text()
    assert "startup complete" in log and "asked-for" not in log and "GET" not in log
