"""The base model of a process: an adapter stays on it for the same version, and for nobody else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from peft import PeftModel

from deal_core.adapter.files import MethodState
from deal_core.adapter.state import attach_adapter, save_adapter
from deal_core.config import AdapterConfig
from tasks.adaptation.run import identify_base
from tasks.base import cached_base, cached_base_with_adapter, release_base


@pytest.mark.usefixtures("home")
def test_an_adapter_stays_until_the_base_model_is_lent_again(tiny_base: Path, tmp_path: Path) -> None:
    reference = identify_base(str(tiny_base))
    for name in ("a", "b"):
        new = attach_adapter(cached_base(reference).model, AdapterConfig(), seed=1)
        save_adapter(new, tmp_path / name, MethodState(strategy="seq_lora", stores="nothing"), base_name="tiny")
        new.unload()
    borrowed: list[str] = []

    def lend(name: str) -> PeftModel:
        @contextmanager
        def folder() -> Iterator[Path]:
            borrowed.append(name)
            yield tmp_path / name

        return cached_base_with_adapter(reference, name, folder)[1]

    def adapters() -> set[str]:
        return {name for name, _ in cached_base(reference).model.named_parameters() if "lora" in name}

    try:
        first = lend("a")
        assert lend("a") is first and borrowed == ["a"]
        assert lend("b") is not first and borrowed == ["a", "b"]
        assert adapters() == set(), "who borrows the base model gets it without an adapter"
        lend("b")
        assert borrowed == ["a", "b", "b"], "somebody else has used the base model since"
    finally:
        release_base()
