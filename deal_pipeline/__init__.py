"""Use lineages from Python: `from deal_pipeline import Lineage`.

The command line is in `cli/`, and what starts and stops servers in `server/`. Importing any of this masks secrets in
what the process logs.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from infra.logs import mask_logs

if TYPE_CHECKING:
    from deal_pipeline.command import CommandError
    from deal_pipeline.lineage import Adaptation, Lineage

__all__ = ["Adaptation", "CommandError", "Lineage"]

mask_logs()


def __getattr__(name: str) -> Any:
    """Import the Python API when it is asked for: a command needs none of its libraries."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("deal_pipeline.command" if name == "CommandError" else "deal_pipeline.lineage"), name)
