"""The frames in which a process passes on what it reads from a file."""

from __future__ import annotations

import json
import struct
from typing import Any

HEADER = struct.Struct(">cI")
"""A frame's letter and the length of its content."""
MAX_FRAME_BYTES = 2**26
"""Largest content. A row of MAX_LINE_CHARS characters takes less in any encoding."""
OUT_OF_MEMORY = 3
"""Exit status of a process that found no more memory."""
_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


def as_json(value: Any) -> bytes:
    """JSON text as bytes. Two lone surrogates beside each other stay two, as escapes would not leave them."""
    return _ENCODER.encode(value).encode("utf-8", "surrogatepass")


def from_json(content: bytes) -> Any:
    """The value of `as_json`.

    Raises:
        ValueError: The content is no JSON.
        RecursionError: It is nested too deeply.
    """
    return json.loads(content.decode("utf-8", "surrogatepass"))
