"""Turn a GGUF file into an ordinary transformers folder: bf16 safetensors, config, tokenizer with its chat template."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from deal_core.errors import ConfigError


def convert_gguf(file: Path, folder: Path, on_progress: Callable[[str, int, int], None] | None = None) -> None:
    """Dequantise a GGUF file once and save it into `folder`.

    The weights are kept in bf16, whatever precision a run asks for: so every machine adapts the very same numbers.

    Raises:
        ConfigError: the file is no GGUF file, or of an architecture that transformers does not read.
    """
    import torch
    import transformers

    size = file.stat().st_size
    if on_progress is not None:
        on_progress(f"converting {file.name}", 0, size)
    arguments: dict[str, Any] = {"gguf_file": file.name, "trust_remote_code": False}
    try:
        config = transformers.AutoConfig.from_pretrained(file.parent, **arguments)
        tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, **arguments)
        seq2seq = config.is_encoder_decoder
        auto_class: Any = transformers.AutoModelForSeq2SeqLM if seq2seq else transformers.AutoModelForCausalLM
        if hasattr(transformers, "GgufConfig"):
            # Newer releases keep the weights packed where they can, and mark the model as quantised so that it cannot
            # be saved. Asked to dequantise they leave no mark; older ones know nothing else.
            arguments["quantization_config"] = transformers.GgufConfig(dequantize=True)
        model, info = auto_class.from_pretrained(
            file.parent, dtype=torch.bfloat16, output_loading_info=True, **arguments
        )
        require_all_weights(info)
    except Exception as error:  # a damaged file can break its readers in any way
        raise ConfigError(
            f"{file.name} cannot be read as a GGUF model ({type(error).__name__}: {error}). Give a complete .gguf file "
            "of an architecture that transformers reads, such as llama, qwen2 or mistral."
        ) from error
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if on_progress is not None:
        on_progress(f"converting {file.name}", size, size)


def require_all_weights(info: Mapping[str, Any]) -> None:
    """Refuse a model that transformers has filled up with random weights, going by its loading info.

    Raises:
        ValueError: weights are missing or of another shape.
    """
    absent = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if absent:
        raise ValueError(f"{len(absent)} weights are missing or of another shape, {absent[0]} the first")
