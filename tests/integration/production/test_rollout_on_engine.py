"""The rollouts of test_rollout on a real vLLM server: a canary that is aborted, one that finishes, and a shadow."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.speed.real_engine import running_engine
from benchmarks.speed.serving import served
from benchmarks.tiny_base import build_tiny_base
from tests.adapting import BANK
from tests.integration.production.test_rollout import (
    check_a_better_canary_is_promoted,
    check_a_shadow_changes_no_answer_and_the_log_has_both,
    check_a_worse_canary_is_rejected_by_itself,
    learn,
)
from tests.real_engine import needs_engine


@needs_engine
@pytest.mark.nightly(minutes=5)
@pytest.mark.usefixtures("serving_home")
def test_a_version_is_tried_on_live_traffic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, folder = tmp_path / "base", tmp_path / "engine"
    folder.mkdir()
    build_tiny_base(base, width=128)  # vLLM demands heads of such a width
    monkeypatch.setenv("DEAL_LOG_PREDICTIONS", "numbers")
    assert learn(base, BANK, "canary") == ("promoted", "1"), "there is no champion to compare with"
    with running_engine(base, folder) as engine, served("l", engine.environment()) as (url, _):
        expected = check_a_worse_canary_is_rejected_by_itself(url, base)
        check_a_better_canary_is_promoted(url, base, expected)
        check_a_shadow_changes_no_answer_and_the_log_has_both(url, base)
