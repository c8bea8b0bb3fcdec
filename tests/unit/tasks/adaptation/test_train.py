"""What a training leaves for the next try of its run."""

from __future__ import annotations

from pathlib import Path

import pytest

from deal_core.adapter.files import digests_of, sha256_together
from tasks.adaptation.train import SUMMARY_FILE, _finished
from tasks.references import TrainSummary


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The work folder of a training that has ended."""
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"weights")
    summary = TrainSummary(
        adapter_sha256=sha256_together(digests_of(tmp_path / "adapter")),
        num_rows=1,
        num_steps=1,
        seconds=1.0,
        rows_per_second=1.0,
        losses=(),
        resumed_from_step=None,
        fill={},
        notes=(),
    )
    (tmp_path / SUMMARY_FILE).write_text(summary.model_dump_json())
    return tmp_path


def test_a_finished_training_is_not_repeated(folder: Path) -> None:
    found = _finished(folder)
    assert found is not None and found.num_steps == 1


@pytest.mark.parametrize("lost", [SUMMARY_FILE, "adapter/adapter_model.safetensors"])
def test_a_file_that_a_power_cut_has_emptied_lets_the_training_go_on(folder: Path, lost: str) -> None:
    (folder / lost).write_bytes(b"")
    assert _finished(folder) is None and not (folder / SUMMARY_FILE).exists()
