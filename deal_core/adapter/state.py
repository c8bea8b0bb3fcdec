"""Adapters on a model and on disk: attach, load, swap and save.

On disk an adapter is a plain PEFT folder that PEFT alone can load, with the method's state in method.json.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from deal_core.adapter.files import CONFIG_FILE, KEPT_ROWS, METHOD_FILE, METHOD_TENSORS_FILE, WEIGHTS_FILE, MethodState
from deal_core.adapter.stack import ADAPTER_NAME, check_rank, collect_stacks, count_core_slots, decompose
from deal_core.base_model.sources import hub_address
from deal_core.config import AdapterConfig
from deal_core.errors import AdapterStateError, ConfigError
from deal_core.schema_version import require_schema_version

SCHEMA_VERSION = 1

OTHER_NAME = "deal_other"
"""It and ADAPTER_NAME alternate as the name of the adapter that answers, so old and new can be loaded together."""
CANDIDATE_NAME = "deal_candidate"
"""Name for a second adapter that answers too; see `add_candidate`."""
_DECODERS = "llama mistral mixtral qwen2 qwen3 gemma gemma2 gemma3_text smollm3 olmo2 granite"
TARGET_MODULES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("t5", "mt5", "umt5"), ("q", "v")),
    **dict.fromkeys(_DECODERS.split(), ("q_proj", "v_proj")),
    "phi3": ("qkv_proj",),  # one layer makes queries, keys and values
}
"""Model type → names of its query and value projections, which carry the adapter by default (arXiv 2509.18942). PEFT
knows those of further types."""
_A, _B = ".lora_A.weight", ".lora_B.weight"


@contextmanager
def adapter_on(model: PreTrainedModel, folder: Path | None) -> Iterator[PreTrainedModel | PeftModel]:
    """Put a saved adapter on a base model (None: no adapter); the adapter is removed at the end of the block."""
    if folder is None:
        yield model
        return
    peft_model = load_adapter(model, folder)
    try:
        yield peft_model
    finally:
        peft_model.unload()


def attach_adapter(model: PreTrainedModel, adapter: AdapterConfig, *, seed: int) -> PeftModel:
    """Give a base model a new LoRA adapter in fp32, ΔW = 0.

    Raises:
        ConfigError: The target modules are unknown for this model type, not in the model, or smaller than the rank.
    """
    targets = adapter.target_modules or _default_targets(model)
    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.scale_alpha,  # type: ignore[arg-type]  # PEFT takes any number
        target_modules=targets if isinstance(targets, str) else list(targets),
        lora_dropout=adapter.dropout,
        use_rslora=adapter.rslora,
        bias="none",
        task_type="SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM",
    )
    torch.manual_seed(seed)
    try:
        peft_model = get_peft_model(model, config)
    except ValueError as error:
        raise ConfigError(f"adapter.target_modules {targets} do not fit {type(model).__name__}: {error}") from error
    config.base_model_name_or_path = None  # else PEFT looks the base up on the Hub; save_adapter names it
    try:
        check_rank(collect_stacks(peft_model))
    except ConfigError:
        peft_model.unload()
        raise
    return peft_model


def _default_targets(model: PreTrainedModel) -> Collection[str] | str:
    """Return the layers that carry the adapter if none are named: a type's own, or else all linear layers.

    Raises:
        ConfigError: All linear layers would be those of a part that sees pictures too.
    """
    model_type = model.config.model_type
    targets = TARGET_MODULES.get(model_type) or TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(model_type)
    if targets is None and model.config.get_text_config() is not model.config:
        raise ConfigError(
            f"No default target modules are known for model type {model_type!r}, which does not only read texts; name "
            "the linear layers that shall carry the adapter in adapter.target_modules.",
            code="target-modules",
        )
    return targets or "all-linear"


def load_adapter(
    model: PreTrainedModel, folder: Path, *, is_trainable: bool = False, num_new_slots: int = 0
) -> PeftModel:
    """Load a folder of PEFT or of `save_adapter` onto a base model, in fp32.

    `num_new_slots` slots are appended, zero in both factors; the adapter's output stays the same.

    Raises:
        AdapterStateError: The folder holds no adapter, its weights are damaged, or its keys are not exactly those that
            the model expects.
    """
    saved = read_adapter(folder)
    config = saved.config
    config.inference_mode = not is_trainable
    if num_new_slots:
        rank = config.r + num_new_slots
        growth = math.sqrt(rank / config.r) if config.use_rslora else rank / config.r
        config.lora_alpha = config.lora_alpha * growth  # type: ignore[assignment]  # the scale stays
        config.r = rank
        for name, factor in saved.tensors.items():  # zero rows for an A (R×I), zero columns for a B (O×R)
            padding = (0, 0, 0, num_new_slots) if name.endswith(_A) else (0, num_new_slots)
            saved.tensors[name] = torch.nn.functional.pad(factor, padding)
    peft_model = cast(PeftModel, get_peft_model(model, config))
    config.base_model_name_or_path = None
    try:
        require_fit(peft_model, ADAPTER_NAME, saved)
    except AdapterStateError:
        peft_model.unload()
        raise
    set_peft_model_state_dict(peft_model, saved.tensors)
    return peft_model


@dataclass(frozen=True)
class SavedAdapter:
    """The content of a PEFT folder."""

    path: Path
    """The file of the tensors, for messages."""
    config: LoraConfig
    tensors: dict[str, torch.Tensor]
    """Tensors by the names that PEFT writes, which omit the adapter's name."""


def read_adapter(folder: Path) -> SavedAdapter:
    """Read a PEFT folder; no model is needed.

    Raises:
        AdapterStateError: The folder holds no adapter.
    """
    path = folder / WEIGHTS_FILE
    if not (folder / CONFIG_FILE).is_file() or not path.is_file():
        raise AdapterStateError(
            f"{folder} holds no adapter ({CONFIG_FILE} and {WEIGHTS_FILE}); give the folder of a version."
        )
    config = LoraConfig.from_pretrained(str(folder))
    config.inference_mode = True
    config.base_model_name_or_path = None
    return SavedAdapter(path, config, _read_tensors(path))


def require_fit(model: PeftModel, name: str, saved: SavedAdapter) -> None:
    """Refuse tensors whose names and shapes are not exactly those of the model's adapter `name`.

    Raises:
        AdapterStateError: A shape differs, or a key is missing or unexpected.
    """
    own = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    for key in sorted(own.keys() & saved.tensors.keys()):
        if own[key].shape != saved.tensors[key].shape:
            raise AdapterStateError(
                f"{saved.path} does not fit the model: {key} has shape {list(saved.tensors[key].shape)}, the model "
                f"expects {list(own[key].shape)}. Load it onto the base model it was trained on."
            )
    missing, unexpected = sorted(own.keys() - saved.tensors.keys()), sorted(saved.tensors.keys() - own.keys())
    if missing or unexpected:
        raise AdapterStateError(
            f"{saved.path} does not fit the model: {len(missing)} keys are missing {missing[:3]}, {len(unexpected)} "
            f"are unexpected {unexpected[:3]}. Load it onto the base model it was trained on."
        )


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise AdapterStateError(
            f"{path} is damaged ({error}); restore it from a backup, or use another version."
        ) from None


def save_adapter(model: PeftModel, folder: Path, state: MethodState, *, base_name: str) -> None:
    """Write the adapter as a plain PEFT folder that names its base model, and the method's state in the same folder."""
    folder.mkdir(parents=True, exist_ok=True)
    config = model.peft_config[ADAPTER_NAME]
    config.base_model_name_or_path, config.revision = hub_address(base_name) or (base_name, None)
    model.save_pretrained(str(folder), save_embedding_layers=False)  # "auto" would ask the Hub for the base
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
    # equal adapters have equal bytes: PEFT writes the module names in a random order
    values = json.loads((folder / CONFIG_FILE).read_text())
    if isinstance(values["target_modules"], list):
        values["target_modules"].sort()
    (folder / CONFIG_FILE).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
    if state.tensors:
        save_file({name: t.contiguous() for name, t in state.tensors.items()}, folder / METHOD_TENSORS_FILE)
    _write_header(folder, state)


def _write_header(folder: Path, state: MethodState) -> None:
    header = {
        "schema_version": SCHEMA_VERSION,
        "strategy": state.strategy,
        "stores": state.stores,
        "num_bytes": state.num_bytes,
        "num_arrivals": state.num_arrivals,
    }
    (folder / METHOD_FILE).write_text(json.dumps(header, indent=2) + "\n")


def load_method_state(folder: Path) -> MethodState:
    """Read the method's state of a saved version.

    Raises:
        AdapterStateError: The state is missing, or this release does not read its schema version.
    """
    path = folder / METHOD_FILE
    if not path.is_file():
        raise AdapterStateError(f"{path} is missing; the folder was not written by this project.")
    header = json.loads(path.read_text())
    require_schema_version(header, SCHEMA_VERSION, str(path), AdapterStateError)
    tensors_path = folder / METHOD_TENSORS_FILE
    tensors = _read_tensors(tensors_path) if tensors_path.is_file() else {}
    return MethodState(
        strategy=header["strategy"], stores=header["stores"], tensors=tensors, num_arrivals=header["num_arrivals"]
    )


def kept_of_tasks(folder: Path) -> dict[str, int]:
    """Name → length of each tensor of a saved method state with kept rows; each task has one."""
    path = folder / METHOD_TENSORS_FILE
    if not path.is_file():
        return {}
    with safe_open(path, framework="pt") as file:
        kept = [name for name in sorted(file.keys()) if name.startswith(KEPT_ROWS)]
        return {name: file.get_slice(name).get_shape()[0] for name in kept}


def empty_tensors(folder: Path, names: Collection[str]) -> None:
    """Empty these tensors of a saved method state. The empty tensors stay, so the other tensors keep their names."""
    state = load_method_state(folder)
    tensors = {name: t.new_empty(0) if name in names else t for name, t in state.tensors.items()}
    save_file(tensors, folder / METHOD_TENSORS_FILE)
    _write_header(folder, replace(state, tensors=tensors))


def adapter_fill(model: PeftModel) -> dict[str, float]:
    """How full the adapter is: the share of each module's slots that hold 95 % of its ‖ΔW‖²_F, by module name."""
    fill: dict[str, float] = {}
    for stack in collect_stacks(model):
        sigma_MR = decompose(*stack.read()).sigma_MR
        shares_M = count_core_slots(sigma_MR, 0.95) / sigma_MR.shape[1]
        fill.update(zip(stack.names, shares_M.tolist(), strict=True))
    return fill


def adapter_norm(folder: Path) -> float | None:
    """‖ΔW‖_F over all modules of a PEFT folder, scaling included; None if a factor is not finite.

    ΔW is never formed, because ‖BA‖² = ⟨BᵀB, AAᵀ⟩.
    """
    saved = read_adapter(folder)
    config, tensors = saved.config, saved.tensors
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values()):
        return None
    total = 0.0
    for name, a_RI in tensors.items():
        if name.endswith(_A):
            a_RI, b_OR = a_RI.double(), tensors[name.removesuffix(_A) + _B].double()
            total += float(((b_OR.mT @ b_OR) * (a_RI @ a_RI.mT)).sum())
    scale = config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
    norm = scale * math.sqrt(max(total, 0.0))
    return norm if math.isfinite(norm) else None


def swap_adapter(model: PeftModel, saved: SavedAdapter) -> None:
    """Replace the adapter on a model by a saved one, which may have another rank or other target modules.

    The new adapter gets another name. The model must not be in use during the call. Afterwards it is for inference.

    Raises:
        AdapterStateError: The new adapter does not fit the model, which keeps the old adapter.
    """
    old = str(model.active_adapter)
    new = OTHER_NAME if old == ADAPTER_NAME else ADAPTER_NAME
    _add(model, new, saved)
    activate(model, new)
    model.delete_adapter(old)


def add_candidate(model: PeftModel, saved: SavedAdapter) -> None:
    """Add a saved adapter as CANDIDATE_NAME, in place of an earlier one. The active adapter stays active.

    The model must not be in use during the call.

    Raises:
        AdapterStateError: The second adapter does not fit the model, which then has none.
    """
    drop_candidate(model)
    _add(model, CANDIDATE_NAME, saved)


def drop_candidate(model: PeftModel) -> None:
    """Delete the adapter of `add_candidate`, if there is one. Another adapter must be active."""
    if CANDIDATE_NAME in model.peft_config:
        model.delete_adapter(CANDIDATE_NAME)


def _add(model: PeftModel, name: str, saved: SavedAdapter) -> None:
    """Add an adapter; the active one stays active."""
    old = str(model.active_adapter)
    try:
        model.add_adapter(name, saved.config)
        saved.config.base_model_name_or_path = None  # else PEFT looks the base up on the Hub
        require_fit(model, name, saved)
        set_peft_model_state_dict(model, saved.tensors, adapter_name=name)
    except (ValueError, AdapterStateError) as error:
        if name in model.peft_config:
            model.delete_adapter(name)
        if isinstance(error, AdapterStateError):
            raise
        raise AdapterStateError(f"{saved.path.parent} does not fit the model: {error}") from error
    finally:
        activate(model, old)


def activate(model: PeftModel, name: str) -> None:
    """Let an adapter of the model answer, and no other."""
    model.set_adapter(name)
    model.requires_grad_(False)  # PEFT makes the active adapter trainable
