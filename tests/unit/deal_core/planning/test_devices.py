"""Devices by name: number, kind, memory and precision."""

from __future__ import annotations

import pytest

from deal_core.base_model import device as here
from deal_core.errors import ConfigError
from deal_core.planning.devices import CARDS, find_device


@pytest.mark.parametrize(
    ("text", "count", "gigabytes", "precision"),
    [
        ("1x A100 80GB", 1, 80, "bf16"),
        ("a100-40gb", 1, 40, "bf16"),
        ("4 x NVIDIA L40S", 4, 48, "bf16"),
        ("2xTesla V100 32 GB", 2, 32, "fp32"),
        ("GeForce RTX 4090", 1, 24, "bf16"),
        ("24GB", 1, 24, "bf16"),
        ("2x 24 GB", 2, 24, "bf16"),
    ],
)
def test_a_device_is_told_by_its_name(text: str, count: int, gigabytes: int, precision: str) -> None:
    found = find_device(text)
    assert (found.count, found.free_bytes, found.precision) == (count, gigabytes * 10**9, precision)
    assert found.total_bytes == found.free_bytes and not found.is_cpu


def test_main_memory_has_the_precision_of_this_processor() -> None:
    found = find_device("cpu 1.5GiB")
    assert found.is_cpu and found.free_bytes == 3 * 2**29
    assert found.precision == ("bf16" if here.bf16_instructions() else "fp32")


@pytest.mark.parametrize(
    "text",
    [
        *("", "A100", "A100 48GB", "Z9000", "cpu", "gpu", "0x A100 80GB", "-1x L4", "80", "A100 80GB please", "0GB"),
        *("cpu 24 apples", "cpu 1,5GB", "cpu 24GiB!", "80gbit"),
    ],
)
def test_a_device_that_is_not_clear_is_refused(text: str) -> None:
    with pytest.raises(ConfigError) as refused:
        find_device(text)
    assert refused.value.code in ("device", "setting")


def test_every_card_is_found_in_each_of_its_sizes() -> None:
    for name, card in CARDS.items():
        for size in card.gigabytes:
            assert find_device(f"{name} {size}GB").total_bytes == size * 10**9
