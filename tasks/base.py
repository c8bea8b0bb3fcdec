"""The base model of a run, loaded once per process and lent to the stages that need it.

torch and transformers are imported here and in the stages that compute, when they begin: a run starts, looks and often
ends (nothing new, somebody else is at it) in a third of the time that importing them takes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prefect import task
from prefect.cache_policies import NO_CACHE

from deal_core.errors import ConfigError
from infra.settings import HomeSettings
from tasks.progress import advance
from tasks.references import BaseRef

if TYPE_CHECKING:
    from deal_core.models import BaseModel

_loaded: dict[str, BaseModel] = {}


def lend_base(reference: BaseRef) -> BaseModel:
    """A base model, bare; whoever puts an adapter on it takes it off again.

    Raises:
        ConfigError: what lies at its source is another model than it was.
    """
    base = _load(reference.source)
    if base.sha256 != reference.sha256:
        raise ConfigError(
            f"The base model {reference.source} has changed ({reference.sha256[:12]} before, {base.sha256[:12]} now); "
            "bring the old one back, or start a new lineage."
        )
    return base


def is_loaded(source: str) -> bool:
    """Whether this process holds the base model already."""
    return source in _loaded


def _load(source: str) -> BaseModel:
    if source not in _loaded:
        from deal_core.models import load_base

        _loaded.clear()  # one at a time: base models are large
        report = advance("base")
        _loaded[source] = load_base(
            source,
            HomeSettings().cache_dir,
            on_progress=lambda doing, done, total: report(done, total, doing),
        )
    return _loaded[source]


@task(name="base", cache_policy=NO_CACHE)
def identify_base(source: str) -> BaseRef:
    """Load a base model and say which one it is."""
    base = _load(source)
    return BaseRef(source=source, name=base.name, sha256=base.sha256)
