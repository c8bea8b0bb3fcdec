"""The licence of a base model, as far as its own files state it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from deal_core.base_sources import DEFAULT_BASE

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
    stated = _front_matter(card.read_text(encoding="utf-8", errors="replace")).get("license")
    return stated if isinstance(stated, str) else None


def _front_matter(text: str) -> dict[str, Any]:
    if not text.startswith("---\n") or "\n---" not in text[4:]:
        return {}
    try:
        values = yaml.safe_load(text[4:].split("\n---", 1)[0])
    except yaml.YAMLError:
        return {}
    return values if isinstance(values, dict) else {}
