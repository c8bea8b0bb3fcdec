"""Use lineages from Python: `from deal_pipeline import Lineage`."""

from deal_pipeline.command import CommandError
from deal_pipeline.lineage import Adaptation, Lineage

__all__ = ["Adaptation", "CommandError", "Lineage"]
