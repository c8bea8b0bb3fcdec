"""Losses of a fixed run, compared with recorded ones: a change of the mathematics shows, a change of style does not.

After an intended change, record them again with
    DEAL_RECORD_GOLDEN=1 python -m pytest tests/unit/deal_core/test_golden_losses.py
and those of the paper's form with tests/unit/benchmarks/method/test_deal_literal.py.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from deal_core.config import TrainConfig
from deal_core.method_config import DealConfig

FOLDER = Path(__file__).parents[2] / "golden"
STEPS = TrainConfig(
    max_steps=10, batch_size=4, learning_rate=5e-3, schedule="constant", balance_labels=False, max_prompt_tokens=64
)
SETTINGS = {
    "seq_lora": ("seq_lora", DealConfig()),
    "deal_free": ("deal", DealConfig(core="free")),
    "deal_soft": ("deal", DealConfig(core="soft")),
    "deal_frozen": ("deal", DealConfig(core="frozen")),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_losses_of_a_second_task(name, parent, train):
    strategy, deal = SETTINGS[name]
    check_losses(name, strategy, train(strategy, parent, deal=deal, train=STEPS).losses)


def check_losses(name: str, strategy: str, losses: list[float]) -> None:
    """Compare losses with the recorded ones of this name, or record them."""
    path = FOLDER / f"{name}.txt"
    if os.environ.get("DEAL_RECORD_GOLDEN"):
        header = f"# losses of {STEPS.max_steps} steps of a second task, {strategy}; tiny Llama of conftest.py, fp32\n"
        path.write_text(header + "".join(f"{loss:.6f}\n" for loss in losses))
    recorded = [float(line) for line in path.read_text().splitlines() if not line.startswith("#")]
    assert losses == pytest.approx(recorded, rel=2e-3)
