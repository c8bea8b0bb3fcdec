"""SeqLoRA: keep training the same LoRA, the lower bound every method of the field is measured against."""

from __future__ import annotations

from deal_core.strategies.strategy import Strategy


class SeqLora(Strategy):
    """Plain LoRA fine-tuning, task after task, on one adapter."""

    name = "seq_lora"
