"""The base model of a run, loaded once per process and lent to the stages that need it.

torch and transformers are imported here and in the stages that compute, when they begin: a run starts, looks and often
ends (nothing new, somebody else is at it) in a third of the time that importing them takes.
"""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING

from prefect import task
from prefect.cache_policies import NO_CACHE

from deal_core.config import Quantize
from deal_core.errors import ConfigError
from infra.settings import HomeSettings
from tasks.progress import advance
from tasks.references import BaseRef

if TYPE_CHECKING:
    from deal_core.base_model.load import BaseModel

_loaded: dict[tuple[str, Quantize], BaseModel] = {}


def lend_base(reference: BaseRef) -> BaseModel:
    """A base model, bare; whoever puts an adapter on it takes it off again.

    Raises:
        ConfigError: what lies at its source is another model than it was.
    """
    base = _load(reference.source, reference.quantize)
    if base.sha256 != reference.sha256:
        raise ConfigError(
            f"The base model {reference.source} has changed ({reference.sha256[:12]} before, {base.sha256[:12]} now); "
            "bring the old one back, or start a new lineage."
        )
    return base


def release_base() -> None:
    """Give the memory of a base model back, for other processes that load it."""
    import torch

    _loaded.clear()
    gc.collect()
    torch.cuda.empty_cache()


def is_loaded(source: str) -> bool:
    """Whether this process holds the base model already."""
    return any(known == source for known, _ in _loaded)


def _load(source: str, quantize: Quantize) -> BaseModel:
    key = source, quantize
    if key not in _loaded:
        from deal_core.base_model.load import load_base

        _loaded.clear()  # one at a time: base models are large
        report = advance("base")
        _loaded[key] = load_base(
            source,
            HomeSettings().cache_dir,
            quantize=quantize,
            on_progress=lambda doing, done, total: report(done, total, doing),
        )
    return _loaded[key]


@task(name="base", cache_policy=NO_CACHE)
def identify_base(source: str, quantize: Quantize = "none") -> BaseRef:
    """Load a base model and say which one it is.

    Raises:
        ConfigError: it cannot be loaded, or not quantized; see `deal_core.base_model.load.load_base`.
    """
    base = _load(source, quantize)
    return BaseRef(source=source, name=base.name, sha256=base.sha256, quantize=quantize)
