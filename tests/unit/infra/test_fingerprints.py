"""What a base model makes of a text is stored for each way in which it is held."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from deal_core.base_model.load import BaseModel, load_base
from infra.fingerprints import keep_fingerprint, read_fingerprint
from infra.store.local import FileStore


def test_a_quantized_models_fingerprint_does_not_stand_for_the_whole_one(tiny_base: Path, tmp_path: Path) -> None:
    store, base = FileStore(tmp_path / "store"), load_base(str(tiny_base), tmp_path / "cache", precision="fp32")
    loaded = list[str]()

    def load(held: BaseModel) -> BaseModel:
        loaded.append(held.quantize)
        return held

    rough = load_base(str(tiny_base), tmp_path / "cache", precision="fp32")
    with torch.no_grad():  # as a quantization does, it moves the weights and not the digest
        for weight in rough.model.parameters():
            weight.mul_(0.9)
    rough = replace(rough, quantize="4bit")
    for held in (rough, base, rough, base):
        keep_fingerprint(store, held.sha256, held.quantize, lambda held=held: load(held))
    assert loaded == ["4bit", "none"], "each is made once"
    of_rough, of_base = (read_fingerprint(store, base.sha256, each) for each in ("4bit", "none"))
    assert of_rough is not None and of_base is not None and of_rough.log_probs != of_base.log_probs
    assert (of_rough.quantize, of_base.quantize) == ("4bit", "none")
