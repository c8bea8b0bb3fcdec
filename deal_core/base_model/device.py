"""The device of a run, its memory, and what the processor is."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from accelerate import PartialState
from pydantic import ByteSize, TypeAdapter, ValidationError

from deal_core.errors import ConfigError

_SIZE = re.compile(r"\s*\d+(\.\d+)?\s*([kmgt]i?b|b)?\s*", re.IGNORECASE)
"""pydantic reads only the start of a text."""


@dataclass(frozen=True, kw_only=True)
class Device:
    """A device's memory."""

    name: str
    is_cpu: bool
    """Whether this is the machine's main memory."""
    free_bytes: int
    """Memory that a new process can use now."""
    total_bytes: int


def current_device() -> Device:
    """Return the device that accelerate chooses."""
    device = PartialState().device
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return Device(name=torch.cuda.get_device_name(device), is_cpu=False, free_bytes=free, total_bytes=total)
    memory = psutil.virtual_memory()
    name = "this machine's memory" if device.type == "cpu" else device.type
    return Device(name=name, is_cpu=device.type == "cpu", free_bytes=memory.available, total_bytes=memory.total)


def visible_gpus() -> list[str]:
    """The CUDA devices that this process may use, as the variable CUDA_VISIBLE_DEVICES names them."""
    count, named = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return named.split(",")[:count] if named else [str(number) for number in range(count)]


CPUINFO = Path("/proc/cpuinfo")


def bf16_instructions(cpuinfo: Path = CPUINFO) -> tuple[str, ...]:
    """The CPU's instructions for bf16 products, from the flags that Linux lists; empty if there is no list."""
    flags = cpu_info("flags", cpuinfo).split()
    return tuple(name for name in ("avx512_bf16", "amx_bf16") if name in flags)


def cpu_info(key: str, cpuinfo: Path = CPUINFO) -> str:
    """What Linux says of the first core, such as its "model name"; empty if it says nothing."""
    try:
        lines = cpuinfo.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.partition(":")[0].strip() == key), "")


def parse_bytes(text: str) -> int:
    """Read a size such as 24GiB, 80 GB or 512MiB.

    Raises:
        ConfigError: The text is not a size.
    """
    try:
        size = int(TypeAdapter(ByteSize).validate_python(text)) if _SIZE.fullmatch(text) else 0
    except ValidationError:
        size = 0
    if size <= 0:
        raise ConfigError(f"{text!r} is not a size of memory; write 24GiB or 80GB, for example.")
    return size
