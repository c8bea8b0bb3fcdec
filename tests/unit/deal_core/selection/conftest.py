"""A parent that answers some rows of its task rightly and others wrongly."""

from __future__ import annotations

from pathlib import Path

import pytest

from deal_core.base_model.load import load_base
from deal_core.config import TrainConfig
from tests.unit.deal_core.conftest import make_rows, train_into


@pytest.fixture(scope="session")
def half_learned(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an adapter that knows the colours half."""
    folder = tmp_path_factory.mktemp("half-learned")
    steps = TrainConfig(max_steps=150, batch_size=8, learning_rate=2e-2, max_prompt_tokens=64)
    base = load_base(str(tiny_base), folder / "cache", precision="fp32")
    return train_into(folder, base, "seq_lora", rows=make_rows(48, first=100), train=steps).folder
