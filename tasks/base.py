"""The base model of a run: loaded once per process and lent to the stages that need it.

torch and transformers are imported only in functions that compute. Many runs end before they need a model, and the two
imports take most of the start of a process.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deal_core.config import AdapterConfig, Quantize, TrainConfig
from deal_core.errors import ConfigError
from deal_core.method_config import MethodConfig
from infra.settings import HomeSettings, LaunchSettings
from tasks.progress import advance
from tasks.references import BaseRef

if TYPE_CHECKING:
    from peft import PeftModel

    from deal_core.base_model.load import BaseModel

_loaded: dict[tuple[str, Quantize], BaseModel] = {}
"""The base model in memory, by source and quantization. There is at most one."""
_attached: dict[tuple[BaseRef, str], PeftModel] = {}
"""The adapter that stays on the base model in memory, by its base model and its digest. There is at most one."""


def cached_base(reference: BaseRef) -> BaseModel:
    """Return a base model without an adapter. A caller that attaches an adapter removes the adapter again.

    Raises:
        ConfigError: The model at this source has changed since the reference was made.
    """
    base = load(reference.source, reference.quantize)
    require_base(reference, base.sha256)
    return base


def cached_base_with_adapter(
    reference: BaseRef, adapter_sha256: str, borrow_folder: Callable[[], AbstractContextManager[Path]]
) -> tuple[BaseModel, PeftModel]:
    """Return a base model, and the same with an adapter, which stays on it until the base model is lent again.

    Args:
        reference: The base model.
        adapter_sha256: Digest of the adapter.
        borrow_folder: Gives the adapter's folder. It is called only if another adapter is on the model, or none.

    Raises:
        ConfigError: As of `cached_base`.
        AdapterStateError: The adapter does not fit the base model.
    """
    from deal_core.adapter.state import load_adapter

    key = reference, adapter_sha256
    if key not in _attached:
        base = cached_base(reference)
        with borrow_folder() as folder:
            _attached[key] = load_adapter(base.model, folder)
    return _loaded[reference.source, reference.quantize], _attached[key]


def lend_tokenizer(reference: BaseRef) -> Any:
    """Return the tokenizer of a base model. Its weights are not loaded for that."""
    from deal_core.base_model.load import read_tokenizer
    from deal_core.base_model.sources import tokenizer_folder

    loaded = _loaded.get((reference.source, reference.quantize))
    if loaded is not None:
        return loaded.tokenizer
    return read_tokenizer(tokenizer_folder(reference.source, HomeSettings().cache_dir), reference.source)


def require_base(reference: BaseRef, sha256: str) -> None:
    """Raise ConfigError if the base model has another digest than the reference: it has changed since."""
    if sha256 != reference.sha256:
        raise ConfigError(
            f"The base model {reference.source} has changed ({reference.sha256[:12]} before, {sha256[:12]} now); "
            "bring the old one back, such as by OWNER/NAME@COMMIT of the Hub, or start a new lineage."
        )


def release_base() -> None:
    """Free the memory of the base model for other processes."""
    import torch

    _attached.clear()
    _loaded.clear()
    gc.collect()
    torch.cuda.empty_cache()


def load(source: str, quantize: Quantize) -> BaseModel:
    """Return a base model without an adapter. It stays in memory until another is loaded.

    With DEAL_SHARD it is on no device.

    Raises:
        ConfigError: The model cannot be loaded or quantized; see `deal_core.base_model.load.load_base`.
    """
    for model in _attached.values():
        model.unload()
    _attached.clear()
    key = source, quantize
    if key not in _loaded:
        from deal_core.base_model.load import load_base

        _loaded.clear()
        report = advance("base")
        _loaded[key] = load_base(
            source,
            HomeSettings().cache_dir,
            quantize=quantize,
            in_main_memory=LaunchSettings().shard == "base",
            on_progress=lambda doing, done, total: report(done, total, doing),
        )
    return _loaded[key]


def local_tokenizer(source: str) -> Any:
    """Return the tokenizer of a base model that is on this machine already. Nothing is fetched.

    Raises:
        ConfigError: The model is not on this machine, or its tokenizer cannot be read.
    """
    from transformers import AutoTokenizer

    from deal_core.base_model.sources import HubAddress, hub_address

    place, revision = hub_address(source) or HubAddress(str(_local_place(source)), None)
    try:
        return AutoTokenizer.from_pretrained(place, revision=revision, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # damaged files break their readers in many ways
        raise ConfigError(f"The tokenizer of {source!r} is not on this machine, or cannot be read.") from error


def _local_place(source: str) -> Path:
    """The folder of a base model that is converted or a folder already; another source as a path."""
    from deal_core.base_model.sources import BUILT_IN, cache_entry
    from deal_core.regular_file import sha256_of_file

    place, cache = Path(source).expanduser(), HomeSettings().cache_dir
    if source in BUILT_IN:
        return cache_entry(cache, source, BUILT_IN[source].member_sha256)
    if os.path.isfile(place):  # Path.is_file raises if the name is too long
        return cache_entry(cache, place.stem, sha256_of_file(place))
    return place


def refuse_what_cannot_fit(
    source: str, adapter: AdapterConfig, strategy: str, method: MethodConfig, train: TrainConfig, *, num_versions: int
) -> None:
    """Refuse a run whose weights, adapter and optimiser alone need more memory than the device has.

    The check comes before the weights are loaded. A model that cannot be measured passes, and so does one that is
    trained elsewhere or divided among devices. `num_versions` is the number
    of versions that the lineage has learned, 0 for the first task.

    Raises:
        ConfigError: The run cannot fit. The message gives the bytes that are needed.
    """
    launching = LaunchSettings()
    if launching.launch != "local" or launching.shard == "base" or any(loaded == source for loaded, _ in _loaded):
        return
    from deal_core.base_model.device import current_device
    from deal_core.base_model.load import find_config, precision_name
    from deal_core.planning.memory import NO_BATCH, MethodShape, adapter_rank, plan_memory
    from deal_core.planning.meta_model import measure_model

    try:
        model = measure_model(find_config(source, HomeSettings().cache_dir).config, adapter)
    except ConfigError:
        return
    device, precision = current_device(), precision_name("auto")
    rank = adapter_rank(adapter, strategy, num_versions)
    shape = MethodShape(rank=rank, strategy=strategy, method=method, is_first_task=num_versions == 0)
    needed = plan_memory(model, NO_BATCH, shape, train=train, precision=precision, on_cpu=device.is_cpu).certain
    held = precision if train.quantize == "none" else train.quantize
    if needed > device.total_bytes:
        raise ConfigError(
            f"{source} cannot be adapted here, not even with the smallest batch: weights ({held}), adapter and "
            f"optimiser take {needed / 2**30:.1f} GiB, and {device.name} has {device.total_bytes / 2**30:.1f} GiB. "
            "Give a smaller base model or a device with more memory; deal check --plan shows how much a run takes."
        )
