"""A parent that answers some rows of its task rightly and others wrongly."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest

from deal_core.base_model.load import BaseModel
from deal_core.config import TrainConfig
from tests.conftest import MakeOnce
from tests.unit.deal_core.conftest import make_rows, train_into


@pytest.fixture(scope="session")
def half_learned(loaded_base: BaseModel, made_once: MakeOnce) -> Path:
    """Folder of an adapter that knows the colours half."""
    steps = TrainConfig(max_steps=150, batch_size=8, learning_rate=2e-2, max_prompt_tokens=64)
    base, rows = copy.deepcopy(loaded_base), make_rows(48, first=100)
    made = made_once("half-learned", lambda folder: train_into(folder, base, "seq_lora", rows=rows, train=steps))
    return made / "adapter"
