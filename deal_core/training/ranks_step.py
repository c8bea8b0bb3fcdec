"""Whether the processes that train together still hold the same parameters."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from accelerate.utils import broadcast, gather
from torch import nn

from deal_core.errors import AdapterStateError

TOLERANCE = 1e-4
"""Largest difference from rank 0, relative to the parameter's norm; equal steps on equal devices leave none at all."""
TINY = 1e-12


@torch.no_grad()
def require_in_step(parameters: Iterable[nn.Parameter]) -> None:
    """Compare every rank's parameters with rank 0's; each rank has to call it.

    Raises:
        AdapterStateError: A rank holds others; raised on all.
    """
    differences = [_difference(parameter) for parameter in parameters]
    largest_N = gather(torch.stack(differences).max().reshape(1))
    if bool((largest_N > TOLERANCE).any()):
        rank = int(largest_N.argmax())
        raise AdapterStateError(
            f"After the training rank {rank} holds other parameters than rank 0 (relative difference "
            f"{float(largest_N[rank]):.1e}), so the adapter is not saved; train with train.num_processes 1."
        )


def _difference(parameter: nn.Parameter) -> torch.Tensor:
    first: torch.Tensor = broadcast(parameter.detach().clone())
    difference: torch.Tensor = (parameter - first).norm() / (first.norm() + TINY)
    return difference
