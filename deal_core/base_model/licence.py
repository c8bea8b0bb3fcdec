"""The licence of a base model, as far as its own files state it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deal_core.base_model.sources import DEFAULT_BASE
from deal_core.errors import ConfigError
from deal_core.regular_file import read_start
from deal_core.yaml_file import MAX_BYTES, yaml_mapping

_OF_BUILT_IN = {DEFAULT_BASE: "apache-2.0"}
"""A GGUF file that was converted brings no model card along."""


def licence_of_base(source: str, folder: Path) -> str | None:
    """The licence's identifier, such as apache-2.0; None where nothing says it.

    Args:
        source: what the base model was asked for by.
        folder: where it lies; a model card (README.md) there may state it in its front matter.
    """
    if source in _OF_BUILT_IN:
        return _OF_BUILT_IN[source]
    card = folder / "README.md"
    if not card.is_file():
        return None
    text = read_start(card, MAX_BYTES).decode("utf-8", errors="replace").replace("\r\n", "\n")
    stated = _front_matter(text).get("license")
    return stated if isinstance(stated, str) else None


def _front_matter(text: str) -> dict[str, Any]:
    if not text.startswith("---\n") or "\n---" not in text[4:]:
        return {}
    try:
        return yaml_mapping(text[4:].split("\n---", 1)[0].encode(), "The model card")
    except ConfigError:
        return {}
