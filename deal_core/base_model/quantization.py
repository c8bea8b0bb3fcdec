"""A frozen base model in 8 or 4 bits under an adapter of full precision (QLoRA, arXiv 2305.14314)."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from accelerate import PartialState
from transformers import BitsAndBytesConfig

from deal_core.config import Quantize
from deal_core.errors import ConfigError


def quantization(quantize: Quantize, dtype: torch.dtype) -> dict[str, Any]:
    """Return what `from_pretrained` needs to load a model quantized, onto this process's device.

    Args:
        quantize: 8bit: LLM.int8(); 4bit: NF4 with its constants quantized too.
        dtype: What the 4-bit weights are multiplied in.

    Raises:
        ConfigError: There is no CUDA device, or no bitsandbytes.
    """
    if not torch.cuda.is_available():
        raise ConfigError(
            f"train.quantize is {quantize}, which needs a CUDA device, and this machine has none; use one that "
            "has, or set it to none."
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"train.quantize is {quantize}, which needs bitsandbytes; install it, in the project's checkout: "
            "pip install '.[quantize]'"
        )
    settings: dict[str, Any] = {"load_in_8bit": True}
    if quantize == "4bit":
        settings = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
                    "bnb_4bit_compute_dtype": dtype}  # fmt: skip
    make_config: Callable[..., BitsAndBytesConfig] = BitsAndBytesConfig
    return {"quantization_config": make_config(**settings), "device_map": {"": PartialState().device}}
