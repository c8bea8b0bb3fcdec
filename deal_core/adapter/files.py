"""What an adapter's folder holds: the method's state, and files whose bytes are checked against recorded digests."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from deal_core.errors import IntegrityError
from deal_core.regular_file import sha256_of_file

if TYPE_CHECKING:
    from torch import Tensor

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
METHOD_FILE, METHOD_TENSORS_FILE = "method.json", "method.safetensors"
PEFT_FILES = (CONFIG_FILE, WEIGHTS_FILE)
"""Files that answering needs."""
METHOD_FILES = (METHOD_FILE, METHOD_TENSORS_FILE)
"""Further files that training the adapter on needs; an adapter may lack them."""
ADAPTER_FILES = (*PEFT_FILES, *METHOD_FILES)
PROOF_FILE = "proof.json"
"""The proof beside an adapter, see `deal_core.evaluation.proof`; versions of earlier releases lack it."""

Recorded = Mapping[str, tuple[str, ...]]
"""The digests that a file may have, by the file's name.

A file has one digest. It has two while `deal data delete` replaces the file, so a killed process leaves no damage.
"""


def digests_of(folder: Path, names: Collection[str] = ADAPTER_FILES) -> dict[str, str]:
    """SHA-256 of those of the named files that the folder has, sorted by name."""
    return {name: sha256_of_file(folder / name) for name in sorted(names) if (folder / name).is_file()}


def sha256_together(digests: Mapping[str, str]) -> str:
    """A single digest of the names and contents of several files: a version's `adapter_sha256`."""
    together = hashlib.sha256()
    for name, digest in sorted(digests.items()):
        together.update(f"{name}\0{digest}\n".encode())
    return together.hexdigest()


def as_recorded(digests: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """`Recorded` for files that have one allowed digest each."""
    return {name: (digest,) for name, digest in digests.items()}


def require_undamaged(
    digests: Mapping[str, str],
    recorded: Recorded,
    names: Collection[str] = ADAPTER_FILES,
    *,
    what: str,
    where: str,
    remedy: str,
) -> None:
    """Refuse files if the digest of a named one is not the recorded one. `digests` are those of the files as they are.

    The message names the owner of the files (`what`, such as "Version 2 of 'support'"), the address of their folder
    (`where`) and what to do (`remedy`, whole sentences).

    Raises:
        IntegrityError: A file differs, is missing, or was not recorded. The message has both digests.
    """
    damage = []
    for name in sorted(names):
        digest, expected = digests.get(name), recorded.get(name, ())
        if digest is None and expected:
            damage.append(f"{name} is missing, recorded is sha256 {' or '.join(expected)}")
        elif digest is not None and digest not in expected:
            but = f"recorded is {' or '.join(expected)}" if expected else "and no such file is recorded"
            damage.append(f"{name} has sha256 {digest}, {but}")
    if damage:
        raise IntegrityError(f"{what} is damaged and was not used: in {where} {'; '.join(damage)}. {remedy}")


Stores = Literal["nothing", "data"]
KEPT_ROWS = "kept_rows."
"""Name prefix of tensors that hold rows of old tasks."""


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
