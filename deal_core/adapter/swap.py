"""Replace the adapter on a loaded model."""

from __future__ import annotations

from peft import PeftModel, set_peft_model_state_dict
from peft.utils.hotswap import check_hotswap_configs_compatible, hotswap_adapter_from_state_dict

from deal_core.adapter.state import ADAPTER_NAME, SavedAdapter, require_fit
from deal_core.errors import AdapterStateError

OTHER_NAME = "deal_other"
"""Name for a new adapter of another form. It and ADAPTER_NAME alternate, so old and new can be loaded together."""


def swap_adapter(model: PeftModel, saved: SavedAdapter) -> None:
    """Replace the adapter on a model by a saved adapter.

    If names and shapes are equal, the new tensors are copied over the old ones. Otherwise (another rank, other target
    modules) the new adapter is added under another name, and the old adapter is deleted.

    Args:
        model: a base model with one adapter. It must not be in use during the call; afterwards it is for inference.
        saved: the new adapter.

    Raises:
        AdapterStateError: the new adapter does not fit the model, which keeps the old adapter.
    """
    old = model.active_adapter
    if _has_same_form(model, old, saved):
        tensors = {_name_in_model(key, old): tensor for key, tensor in saved.tensors.items()}
        hotswap_adapter_from_state_dict(model, tensors, old, saved.config)
        model.peft_config[old] = saved.config
        return
    new = OTHER_NAME if old == ADAPTER_NAME else ADAPTER_NAME
    try:
        model.add_adapter(new, saved.config)
        saved.config.base_model_name_or_path = None  # else PEFT looks the base up on the Hub
        require_fit(model, new, saved)
    except (ValueError, AdapterStateError) as error:
        if new in model.peft_config:
            model.delete_adapter(new)
        _activate(model, old)
        if isinstance(error, AdapterStateError):
            raise
        raise AdapterStateError(f"{saved.path.parent} does not fit the model: {error}") from error
    set_peft_model_state_dict(model, saved.tensors, adapter_name=new)
    _activate(model, new)
    model.delete_adapter(old)


def _activate(model: PeftModel, name: str) -> None:
    model.set_adapter(name)
    model.requires_grad_(False)  # PEFT makes the active adapter trainable


def _has_same_form(model: PeftModel, name: str, saved: SavedAdapter) -> bool:
    try:
        check_hotswap_configs_compatible(model.peft_config[name], saved.config)
        require_fit(model, name, saved)
    except (ValueError, AdapterStateError):
        return False
    return all(".lora_A." in key or ".lora_B." in key for key in saved.tensors)  # neither an embedding nor DoRA


def _name_in_model(key: str, adapter: str) -> str:
    """A tensor's name in the model: PEFT writes …lora_A.weight, the model has …lora_A.NAME.weight."""
    module, _, parameter = key.rpartition(".")
    return f"{module}.{adapter}.{parameter}"
