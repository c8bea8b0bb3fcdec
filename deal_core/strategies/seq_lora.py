"""Plain LoRA fine-tuning, task after task, on one adapter: the lower bound for every method of the field."""

from __future__ import annotations

from deal_core.strategies.strategy import Strategy


class SeqLora(Strategy):
    """Every hook does nothing, which is plain LoRA."""

    name = "seq_lora"
    first_is_plain = True
