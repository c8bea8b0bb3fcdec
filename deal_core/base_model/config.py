"""Find a base model's config without reading or fetching its weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers

from deal_core.base_model.fingerprint import sha256_of_file
from deal_core.base_model.sources import BUILT_IN, DEFAULT_BASE, HUB_ID, KINDS, cache_entry
from deal_core.errors import ConfigError

BUILT_IN_CONFIGS: dict[str, dict[str, Any]] = {
    DEFAULT_BASE: {
        "model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64,
        "max_position_embeddings": 8192, "tie_word_embeddings": True,
    },
}  # fmt: skip
"""Configs of the built-in models, so that their package need not be fetched for a config."""


@dataclass(frozen=True, kw_only=True)
class BaseConfig:
    """A base model's config, and the place of its weights.

    Attributes:
        config: A transformers config.
        folder: Local folder with the weights and the tokenizer; None if a run would first fetch or convert them.
    """

    config: Any
    folder: Path | None


def find_config(source: str, cache_folder: Path) -> BaseConfig:
    """Find a base model's config without its weights.

    Args:
        source: As for `resolve_base`.
        cache_folder: Folder of fetched and converted models.

    Raises:
        ConfigError: There is no config, or it cannot be reached or read.

    Example:
        >>> find_config("smollm2-135m-instruct", Path("cache")).config.model_type
        'llama'
    """
    path = Path(source).expanduser()
    if source in BUILT_IN:
        entry = cache_entry(cache_folder, source, BUILT_IN[source].member_sha256)
        if entry.is_dir():
            return BaseConfig(config=_read(entry, source), folder=entry)
        return BaseConfig(config=transformers.AutoConfig.for_model(**BUILT_IN_CONFIGS[source]), folder=None)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ConfigError(f"The base model {source!r} ({path.resolve()}) has no config.json. {KINDS}")
        return BaseConfig(config=_read(path, source), folder=path if any(path.glob("*.safetensors")) else None)
    if path.is_file() and path.suffix.lower() == ".gguf":
        entry = cache_entry(cache_folder, path.stem, sha256_of_file(path))
        if entry.is_dir():
            return BaseConfig(config=_read(entry, source), folder=entry)
        return BaseConfig(config=_read(path.parent, source, gguf_file=path.name), folder=None)
    if path.is_file() or not HUB_ID.fullmatch(source) or source.endswith(".gguf"):
        raise ConfigError(f"There is no base model {source!r}. {KINDS}")
    return _from_hub(source)


def _read(folder: Path, source: str, **options: str) -> Any:
    try:
        return transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False, **options)
    except Exception as error:  # damaged files break their readers in many ways
        raise ConfigError(
            f"The config of base model {source!r} cannot be read ({type(error).__name__}: {error}). Give a model of an "
            "architecture that transformers itself knows."
        ) from error


def _from_hub(source: str) -> BaseConfig:
    """The config from the Hub or its local cache; `folder` is set only if the cache has the weights."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        file = Path(hf_hub_download(source, "config.json"))
    except (OSError, ValueError, HFValidationError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"The config of base model {source!r} could not be fetched from the Hub ({reason}), and without it the "
            f"model's size is unknown. Give a local folder with its config.json. {KINDS}"
        ) from error
    names = ("model.safetensors", "model.safetensors.index.json")
    has_weights = any(isinstance(try_to_load_from_cache(source, name), str) for name in names)
    return BaseConfig(config=_read(file.parent, source), folder=file.parent if has_weights else None)
