"""The state of a method: data in the adapter's folder that only further training needs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor


Stores = Literal["nothing", "data"]
KEPT_ROWS = "kept_rows."
"""Name prefix of tensors that hold rows of old tasks."""
EARLIER_ROWS = ("rows.", "answers.")
"""The same of lineages that were made before `rehearsal.rows`. No training reads them."""


@dataclass(frozen=True, kw_only=True)
class MethodState:
    """What a strategy carries from one task to the next, beside the adapter."""

    strategy: str
    """Name of the strategy that wrote the state."""
    stores: Stores
    """Whether the state holds data of old tasks."""
    tensors: dict[str, Tensor] = field(default_factory=dict)
    num_arrivals: int = 1
    """Arrivals that the adapter has learned, with any strategy."""

    @property
    def num_bytes(self) -> int:
        """Size of the tensors in bytes."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())

    @property
    def kept_rows(self) -> dict[str, Tensor]:
        """The tensors that hold rows of old tasks. A change of strategy hands on only these."""
        return {name: value for name, value in self.tensors.items() if name.startswith(KEPT_ROWS)}
