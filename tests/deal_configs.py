"""Settings of DEAL with other constants of the method than the product has."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from deal_core.method_config import DealConfig


def deal_with(**changes: Any) -> DealConfig:
    """Return settings of DEAL in which settings and constants of the method are changed."""
    settings = {field.name for field in fields(DealConfig)}
    constants = {name: value for name, value in changes.items() if name not in settings}
    changed: type[DealConfig] = type("ChangedDeal", (DealConfig,), constants)
    return changed(**{name: value for name, value in changes.items() if name in settings})
