"""What answers: a base model, alone or with an adapter on."""

from __future__ import annotations

import torch
from peft import PeftModel
from transformers import PreTrainedModel

LanguageModel = PreTrainedModel | PeftModel
"""Not a model that several processes train: that one is wrapped, can only be called, and has the type `nn.Module`."""


def device_of(model: LanguageModel) -> torch.device:
    """Return the device of the model's parameters."""
    return next(model.parameters()).device
