"""Before the base model is loaded: whether a run can fit this device at all. torch is imported only when needed."""

from __future__ import annotations

from deal_core.config import AdapterConfig, MethodConfig, TrainConfig
from deal_core.errors import ConfigError
from infra.settings import HomeSettings
from tasks.base import is_loaded


def refuse_what_cannot_fit(
    source: str, adapter: AdapterConfig, strategy: str, method: MethodConfig, train: TrainConfig, *, num_versions: int
) -> None:
    """Refuse a run whose weights, adapter and optimiser alone exceed the device, before the weights are loaded.

    Only what is certain refuses: a model that cannot be sized passes, and loading it has the last word.

    Args:
        source: The base model.
        adapter: Shape of the adapter.
        strategy: Name of the strategy.
        method: Settings of the strategies.
        train: Settings of the training.
        num_versions: Versions that the parent goes back to; 0 for the first task.

    Raises:
        ConfigError: It cannot fit; the message says what would.
    """
    if is_loaded(source):
        return
    from deal_core.base_model.config import find_config
    from deal_core.base_model.device import current_device
    from deal_core.base_model.load import precision_name
    from deal_core.planning.memory import NO_ACTIVATIONS, NO_BATCH, MethodShape, adapter_rank, plan_memory
    from deal_core.planning.meta_model import measure_model

    try:
        model = measure_model(find_config(source, HomeSettings().cache_dir).config, adapter)
    except ConfigError:
        return
    device, precision = current_device(), precision_name("auto")
    needed = plan_memory(
        model, NO_ACTIVATIONS, NO_BATCH,
        MethodShape(
            rank=adapter_rank(adapter, strategy, num_versions),
            strategy=strategy,
            method=method,
            is_first_task=num_versions == 0,
        ),
        train=train,
        precision=precision,
        on_cpu=device.is_cpu,
    ).certain  # fmt: skip
    held = precision if train.quantize == "none" else train.quantize
    if needed > device.total_bytes:
        raise ConfigError(
            f"{source} cannot be adapted here: whatever the batch, weights ({held}), adapter and optimiser take "
            f"{needed / 2**30:.1f} GiB, and {device.name} has {device.total_bytes / 2**30:.1f} GiB. "
            "Give a smaller base model or a device with more memory; deal plan says how much."
        )
