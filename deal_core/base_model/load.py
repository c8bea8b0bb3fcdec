"""Load the frozen base model with its tokenizer, or find only its config."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from accelerate import PartialState, init_empty_weights

from deal_core.base_model import cpu_attention as attention
from deal_core.base_model import sources
from deal_core.base_model.device import bf16_instructions
from deal_core.base_model.turn_ends import advise_stop_ids, stop_ids
from deal_core.base_model.wheel import Progress
from deal_core.config import Quantize
from deal_core.errors import ConfigError
from deal_core.regular_file import sha256_of_file

Precision = Literal["auto", "bf16", "fp32"]
BUILT_IN_CONFIGS: dict[str, dict[str, Any]] = {
    sources.DEFAULT_BASE: {
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
}
"""Configs of the built-in models, so that their package need not be fetched for a config."""


@dataclass(frozen=True, kw_only=True)
class BaseModel:
    """A loaded base model and its identity."""

    model: Any
    """The transformers model, in evaluation mode, on the device that accelerate chose unless it is to be sharded."""
    tokenizer: Any
    """The model's tokenizer; pad_token is always set."""
    name: str
    """The user's name for the model, without the folders of a path."""
    sha256: str
    """Digest of the content. For a converted model, it is computed from the GGUF file's bytes, so it does not depend on
    the converting library's version. Two names with the same digest are the same base."""
    kind: Literal["causal", "seq2seq"]
    quantize: Quantize = "none"
    """How the linear layers were quantized when the model was loaded. The digest does not depend on it."""

    @property
    def is_quantized(self) -> bool:
        """Whether bitsandbytes holds the model's linear layers."""
        return bool(getattr(self.model, "is_quantized", False))


def load_base(
    source: str,
    cache_folder: Path,
    *,
    precision: Precision = "auto",
    quantize: Quantize = "none",
    in_main_memory: bool = False,
    receives: str | None = None,
    on_progress: Progress | None = None,
) -> BaseModel:
    """Load a base model and its tokenizer.

    `source` is as for `resolve_base`, or a folder that it returned. Digests are kept in `cache_folder` too. `quantize`
    holds the linear layers in 8 or 4 bits; computations with them use `precision`, see `choose_dtype`. A model that
    is to be sharded stays `in_main_memory`, as no device may hold it. One process reads its weights; another one
    `receives` them from it in `shard_base`, and is told their digest.

    Raises:
        ConfigError: the source cannot be found, fetched, or loaded without pickle and foreign code. It is also raised,
            before anything is fetched, if this machine cannot quantize.
        IntegrityError: a converted model in the cache was changed or damaged.
    """
    dtype = choose_dtype(precision)
    quantized = {} if quantize == "none" else quantization(quantize, dtype)
    folder = sources.resolve_base(source, cache_folder, on_progress)
    stated = None
    if receives is None:
        stated = sources.stated_identity(folder, cache_folder)  # before its files are read
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        tokenizer = read_tokenizer(folder, source)
        if receives is None:
            model, info = sources.auto_class(config).from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                **quantized,
            )
            sources.require_all_weights(info)
        else:
            model = _without_weights(config, dtype)
        if model.config._attn_implementation == "sdpa" and config.model_type in attention.MODEL_TYPES:
            model.set_attn_implementation(attention.NAME)
    except ConfigError:
        raise
    except Exception as error:  # damaged files break their readers in many ways
        raise ConfigError(
            f"The base model {source!r} ({folder}) cannot be loaded ({type(error).__name__}: {error}). Give a complete "
            "causal or sequence-to-sequence language model of an architecture that transformers itself knows."
        ) from error
    # The special tokens alone are taken over: a repetition penalty, for example, would act on greedy answers, and
    # against every label in the instruction. A merged model that is exported ends its answers as it does here.
    advised, ends = read_advice(folder), stop_ids(tokenizer)
    model.generation_config = transformers.GenerationConfig(  # type: ignore[no-untyped-call]
        bos_token_id=advised.bos_token_id,
        eos_token_id=ends if len(ends) > 1 else advised.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        decoder_start_token_id=advised.decoder_start_token_id,
    )
    if not (quantized or in_main_memory):
        model.to(PartialState().device)
    model.eval()
    if stated is None:
        name = folder.name if Path(source).expanduser().is_dir() else source
        stated = name, receives or sources.sha256_of_model(folder, cache_folder / "digests")
    name, sha256 = stated
    kind: Literal["causal", "seq2seq"] = "seq2seq" if getattr(config, "is_encoder_decoder", False) else "causal"
    return BaseModel(model=model, tokenizer=tokenizer, name=name, sha256=sha256, kind=kind, quantize=quantize)


def read_tokenizer(folder: Path, source: str) -> Any:
    """Read the tokenizer of a base model's folder; pad_token is set. `source` is its name for messages.

    It carries the end tokens of the model's generation config (`deal_core.base_model.turn_ends`).

    Raises:
        ConfigError: The tokenizer has no padding, end or unknown token.
    """
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    advise_stop_ids(tokenizer, read_advice(folder).eos_token_id)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
        if tokenizer.pad_token is None:
            raise ConfigError(
                f"The tokenizer of {source!r} has no padding, end or unknown token; set one in its folder."
            )
    return tokenizer


def read_advice(folder: Path) -> transformers.GenerationConfig:
    """Read the generation config in a base model's folder; without its file, what the model's config implies."""
    try:
        return transformers.GenerationConfig.from_pretrained(folder, local_files_only=True)
    except OSError:  # as transformers does, when it loads a model without such a file
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        return transformers.GenerationConfig.from_model_config(config)


def _without_weights(config: Any, dtype: torch.dtype) -> Any:
    """Build a model whose parameters have no content yet. Main memory is taken only for what is written into them."""
    with init_empty_weights(include_buffers=False):  # buffers are computed from the config
        model = sources.auto_class(config).from_config(config, dtype=dtype, trust_remote_code=False)
    model.tie_weights()
    made: dict[int, torch.nn.Parameter] = {}  # tied parameters stay one
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in made:
                    made[id(parameter)] = torch.nn.Parameter(torch.empty_like(parameter, device="cpu"))
                module._parameters[name] = made[id(parameter)]
    return model


def choose_dtype(precision: Precision) -> torch.dtype:
    """Precision of the frozen weights; the adapter is always fp32.

    auto is bf16 on a CUDA device that supports bf16 and on a CPU with AMX or AVX512-BF16, where bf16 is several times
    faster than fp32. Elsewhere auto is fp32, because other CPUs emulate bf16 slowly.

    Raises:
        ConfigError: the precision is unknown. fp16 is refused: its loss scaling does not fit the pulled-back gradients.
    """
    if precision not in ("auto", "bf16", "fp32"):
        raise ConfigError(f"precision is {precision!r}; give auto, bf16 or fp32.")
    is_bf16 = precision == "bf16"
    if precision == "auto":
        on_gpu = torch.cuda.is_available()
        is_bf16 = torch.cuda.is_bf16_supported(including_emulation=False) if on_gpu else bool(bf16_instructions())
    return torch.bfloat16 if is_bf16 else torch.float32


def precision_name(precision: Precision) -> Literal["bf16", "fp32"]:
    """Name of the precision that `choose_dtype` chooses."""
    return "bf16" if choose_dtype(precision) == torch.bfloat16 else "fp32"


def quantization(quantize: Quantize, dtype: torch.dtype) -> dict[str, Any]:
    """Return the arguments with which `from_pretrained` loads a quantized model onto this process's device.

    8bit is LLM.int8(). 4bit is NF4 with its constants quantized too; its products have type `dtype`. The adapter on the
    model keeps full precision (QLoRA, arXiv 2305.14314).

    Raises:
        ConfigError: There is no CUDA device, or bitsandbytes is not installed.
    """
    if not torch.cuda.is_available():
        raise ConfigError(
            f"train.quantize is {quantize}, which needs a CUDA device, and this machine has none; use a machine with "
            "one, or set train.quantize to none.",
            code="quantize",
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"train.quantize is {quantize}, which needs bitsandbytes; install it, in the project's checkout: "
            "pip install '.[gpu]'",
            code="quantize",
        )
    settings: dict[str, Any] = {"load_in_8bit": True}
    if quantize == "4bit":
        settings = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": dtype,
        }
    make_config: Any = transformers.BitsAndBytesConfig
    return {"quantization_config": make_config(**settings), "device_map": {"": PartialState().device}}


@dataclass(frozen=True, kw_only=True)
class BaseConfig:
    """A base model's config (of transformers), and the place of its weights."""

    config: Any
    folder: Path | None
    """Local folder with the weights and the tokenizer; None if a run would first fetch or convert them."""


def find_config(source: str, cache_folder: Path) -> BaseConfig:
    """Find a base model's config without its weights; the arguments are those of `resolve_base`.

    Raises:
        ConfigError: There is no config, or it cannot be reached or read.
    """
    path = Path(source).expanduser()
    if source in sources.BUILT_IN:
        entry = sources.cache_entry(cache_folder, source, sources.BUILT_IN[source].member_sha256)
        if entry.is_dir():
            return BaseConfig(config=_read_config(entry, source), folder=entry)
        return BaseConfig(config=transformers.AutoConfig.for_model(**BUILT_IN_CONFIGS[source]), folder=None)
    if os.path.isdir(path):  # Path.is_dir raises if the name is too long
        if not (path / "config.json").is_file():
            raise ConfigError(f"The base model {source!r} ({path.resolve()}) has no config.json. {sources.KINDS}")
        return BaseConfig(config=_read_config(path, source), folder=path if any(path.glob("*.safetensors")) else None)
    if os.path.isfile(path) and path.suffix.lower() == ".gguf":
        entry = sources.cache_entry(cache_folder, path.stem, sha256_of_file(path))
        if entry.is_dir():
            return BaseConfig(config=_read_config(entry, source), folder=entry)
        return BaseConfig(config=_read_config(path.parent, source, gguf_file=path.name), folder=None)
    if os.path.isfile(path) or not sources.HUB_ID.fullmatch(source) or source.endswith(".gguf"):
        raise ConfigError(f"There is no base model {source!r}. {sources.KINDS}")
    try:
        folder = sources.fetch_model(source, ["config.json"])
    except ConfigError as error:
        raise ConfigError(
            f"{error} Without its config.json the model's size is unknown; give a local folder that has it. "
            f"{sources.KINDS}"
        ) from error
    if not (folder / "config.json").is_file():
        raise ConfigError(f"The base model {source!r} has no config.json on the Hub. {sources.KINDS}")
    # the Hub's cache may have the weights already
    has_weights = any((folder / name).is_file() for name in ("model.safetensors", "model.safetensors.index.json"))
    return BaseConfig(config=_read_config(folder, source), folder=folder if has_weights else None)


def _read_config(folder: Path, source: str, **options: str) -> Any:
    try:
        return transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False, **options)
    except Exception as error:  # damaged files break their readers in many ways
        raise ConfigError(
            f"The config of base model {source!r} cannot be read ({type(error).__name__}: {error}). Give a model of an "
            "architecture that transformers itself knows."
        ) from error
