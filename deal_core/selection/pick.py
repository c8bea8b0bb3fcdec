"""Pick rows by their scores under a fixed budget, with the labels in their shares.

Shapes: N candidate rows, n rows of one stratum.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence

import torch
from torch import Tensor

from deal_core.method_config import SelectionConfig


def quotas(sizes: Mapping[Hashable, int], budget: int) -> dict[Hashable, int]:
    """Divide a budget among strata in proportion to their sizes, by largest remainders.

    Every stratum gets at least one row if the budget has one for each. Ties go to the stratum that comes first.

    Args:
        sizes: Rows of every stratum.
        budget: Rows to take, at most all.
    """
    total = sum(sizes.values())
    found = {name: budget * size // total for name, size in sizes.items()}
    by_remainder = sorted(sizes, key=lambda name: -(budget * sizes[name] % total))
    for name in by_remainder[: budget - sum(found.values())]:
        found[name] += 1
    if budget >= len(sizes):
        for name in [name for name, quota in found.items() if quota == 0]:
            found[max(found, key=lambda each: found[each])] -= 1
            found[name] = 1
    return found


def pick_rows(
    scores_N: Tensor, strata: Sequence[Hashable] | None, budget: int, config: SelectionConfig, seed: int
) -> list[int]:
    """Return the places of the picked rows in order, `budget` of them, or all if there are fewer.

    Args:
        scores_N: The rows' scores.
        strata: The rows' strata; None: all rows are one stratum.
        budget: Rows to take.
        config: How rows are picked.
        seed: Seed of the random numbers.
    """
    names = [""] * len(scores_N) if strata is None else strata
    sizes = dict(sorted(Counter(names).items(), key=lambda item: str(item[0])))
    generator = torch.Generator().manual_seed(seed)
    picked: list[int] = []
    for name, quota in quotas(sizes, min(budget, len(scores_N))).items():
        places = [place for place, each in enumerate(names) if each == name]
        picked += [places[rank] for rank in ranked(scores_N[places], config, generator)[:quota]]
    return sorted(picked)


def ranked(scores_n: Tensor, config: SelectionConfig, generator: torch.Generator) -> list[int]:
    """Return the places of a stratum's rows, the first to take first. Of equal scores, the first row comes first."""
    scores_n = scores_n.double()
    if config.pick == "weighted":  # the largest of these sums are a sample without replacement (Gumbel top-k)
        uniform_n = torch.rand(len(scores_n), generator=generator, dtype=torch.float64).clamp_min(1e-300)
        scores_n = scores_n / config.temperature - torch.log(-torch.log(uniform_n))
    order_n = scores_n.argsort(stable=True, descending=config.pick != "low" and config.pick != "band")
    if config.pick != "band":
        return [int(place) for place in order_n]
    low, high = config.band
    quantile_n = (torch.arange(len(order_n), dtype=torch.float64) + 0.5) / max(1, len(order_n))
    distance_n = (low - quantile_n).clamp(min=0) + (quantile_n - high).clamp(min=0)
    shuffled_n = torch.randperm(len(order_n), generator=generator)
    nearest_n = distance_n[shuffled_n].argsort(stable=True)  # rows of the band, at distance 0, in random order
    return [int(place) for place in order_n[shuffled_n[nearest_n]]]
