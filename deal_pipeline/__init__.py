"""Use lineages from Python: `from deal_pipeline import Lineage`.

The command line is in `cli/`, and what starts and stops servers in `server/`. Importing any of this masks secrets in
what the process logs.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from infra.logs import mask_logs

if TYPE_CHECKING:
    from deal_pipeline.dataframes import frame
    from deal_pipeline.home import Home
    from deal_pipeline.lineage import Lineage

__all__ = ["Home", "Lineage", "frame"]
MODULES = {"Home": "home", "Lineage": "lineage", "frame": "dataframes"}
"""Where each name is found, once it is asked for: a command needs none of it to show its help."""

mask_logs()


def __getattr__(name: str) -> Any:
    """Import a part of the Python API when it is asked for."""
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"deal_pipeline.{MODULES[name]}"), name)
