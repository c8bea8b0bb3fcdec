"""Devices that a run can be planned for, by name: their memory, and whether they compute in bf16.

The memory is that of the maker's page. A driver and CUDA's context take some hundred megabytes of it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from deal_core.base_model.device import Device, bf16_instructions, parse_bytes
from deal_core.errors import ConfigError
from deal_core.safe_text import brief


@dataclass(frozen=True)
class Card:
    """A kind of GPU."""

    gigabytes: tuple[int, ...]
    """Memory, of each size in which it was made."""
    source: str
    """The maker's page that states it."""
    has_bf16: bool = True


_PAGES = "https://www.nvidia.com/en-us"
_CENTER, _GEFORCE = f"{_PAGES}/data-center", f"{_PAGES}/geforce/graphics-cards"
CARDS: dict[str, Card] = {
    "T4": Card((16,), f"{_CENTER}/tesla-t4/", has_bf16=False),
    "V100": Card((16, 32), f"{_CENTER}/v100/", has_bf16=False),
    "A10": Card((24,), f"{_CENTER}/products/a10-gpu/"),
    "A10G": Card((24,), "https://aws.amazon.com/ec2/instance-types/g5/"),
    "A30": Card((24,), f"{_CENTER}/products/a30-gpu/"),
    "A40": Card((48,), f"{_CENTER}/a40/"),
    "A100": Card((40, 80), f"{_CENTER}/a100/"),
    "L4": Card((24,), f"{_CENTER}/l4/"),
    "L40S": Card((48,), f"{_CENTER}/l40s/"),
    "H100": Card((80,), f"{_CENTER}/h100/"),
    "H200": Card((141,), f"{_CENTER}/h200/"),
    "RTX 3090": Card((24,), f"{_GEFORCE}/30-series/rtx-3090-3090ti/"),
    "RTX 4090": Card((24,), f"{_GEFORCE}/40-series/rtx-4090/"),
    "RTX 5090": Card((32,), f"{_GEFORCE}/50-series/rtx-5090/"),
    "RTX A6000": Card((48,), f"{_PAGES}/design-visualization/rtx-a6000/"),
    "RTX 6000 Ada": Card((48,), f"{_PAGES}/design-visualization/rtx-6000/"),
}
_FORM = re.compile(
    r"\s*(?:(?P<count>\d{1,3})\s*[x×]\s*)?(?P<name>.*?)[\s-]*(?P<memory>\d+(?:\.\d+)?\s*[kmgt]i?b)?\s*", re.IGNORECASE
)
_MAKERS = re.compile(r"\b(nvidia|tesla|geforce)\b", re.IGNORECASE)
"""Words that a name may have before it."""
_EXAMPLES = 'Write "1x A100 80GB", for example, "24GB" for another GPU, or "cpu 16GB"'


@dataclass(frozen=True, kw_only=True)
class PlannedDevice(Device):
    """A device that need not be here."""

    count: int
    """Devices of this kind; `free_bytes` and `total_bytes` are those of one."""
    precision: Literal["bf16", "fp32"]
    """What `auto` would choose there for the frozen weights."""


def find_device(text: str) -> PlannedDevice:
    """Find the devices that a text names: their number, kind and memory.

    Raises:
        ConfigError: There is no such device in the table, or its memory is not clear.
    """
    parts = _FORM.fullmatch(text)
    assert parts is not None, "its middle part takes any text"
    count, memory = int(parts["count"] or 1), parts["memory"]
    name = " ".join(_MAKERS.sub(" ", parts["name"]).split())
    if count == 0:
        raise ConfigError(f"--device {brief(text)} has no device. {_EXAMPLES}.", code="device")
    if name.lower() in ("", "gpu", "cpu"):
        if memory is None:
            raise ConfigError(f"--device {brief(text)} has no memory. {_EXAMPLES}.", code="device")
        size, is_cpu = parse_bytes(memory), name.lower() == "cpu"
        shown = f"{'CPU' if is_cpu else 'GPU'} {memory}"
        return _planned(shown, size, count, is_cpu=is_cpu, has_bf16=not is_cpu or bool(bf16_instructions()))
    card_name = next((card for card in CARDS if card.lower() == name.lower()), None)
    if card_name is None:
        raise ConfigError(
            f"--device {brief(text)} is not in the table: {', '.join(CARDS)}. {_EXAMPLES}.", code="device"
        )
    card = CARDS[card_name]
    sizes = [size for size in card.gigabytes if memory is None or parse_bytes(memory) in (size * 10**9, size * 2**30)]
    if len(sizes) != 1:
        made = " or ".join(f"{size}GB" for size in card.gigabytes)
        raise ConfigError(f"--device {brief(text)}: {card_name} has {made}. {_EXAMPLES}.", code="device")
    return _planned(f"{card_name} {sizes[0]}GB", sizes[0] * 10**9, count, is_cpu=False, has_bf16=card.has_bf16)


def _planned(name: str, size: int, count: int, *, is_cpu: bool, has_bf16: bool) -> PlannedDevice:
    return PlannedDevice(
        name=f"{count}x {name}" if count > 1 else name,
        is_cpu=is_cpu,
        free_bytes=size,
        total_bytes=size,
        count=count,
        precision="bf16" if has_bf16 else "fp32",
    )
