"""Size of a saved adapter: a number that tells a broken one at once."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file

_A, _B = ".lora_A.weight", ".lora_B.weight"


def adapter_norm(folder: Path) -> float | None:
    """‖ΔW‖_F over all modules of a PEFT folder, scaling included; None where a factor is not finite.

    ‖BA‖² = ⟨BᵀB, AAᵀ⟩, so that no ΔW is ever formed.

    Args:
        folder: holds adapter_config.json and the weights.
    """
    config = json.loads((folder / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / (math.sqrt(config["r"]) if config.get("use_rslora") else config["r"])
    tensors = load_file(folder / SAFETENSORS_WEIGHTS_NAME)
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values()):
        return None
    total = 0.0
    for name, a_RI in tensors.items():
        if name.endswith(_A):
            a_RI, b_OR = a_RI.double(), tensors[name.removesuffix(_A) + _B].double()
            total += float(((b_OR.mT @ b_OR) * (a_RI @ a_RI.mT)).sum())
    norm = scale * math.sqrt(max(total, 0.0))
    return norm if math.isfinite(norm) else None
