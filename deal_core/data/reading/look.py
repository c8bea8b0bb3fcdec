"""A first look at a file: its columns, what their cells look like, and the names of classes that it carries."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

_MAX_DEPTH = 4
_METADATA = b"huggingface"
"""Key of the file's metadata under which the library `datasets` describes the columns."""


@dataclass(frozen=True)
class FileLook:
    """The columns of a file before its rows are read."""

    columns: tuple[str, ...]
    """Names with repetitions."""
    examples: Mapping[str, Any] = field(default_factory=dict)
    """One cell of a column: of JSON lines the first that is not empty, of Parquet a stand-in of the column's type. A
    CSV has none, because all its cells are texts."""
    class_names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Names of the classes 0, 1, 2, … of a column, from the file's own metadata (`ClassLabel` of `datasets`)."""


def look_at_schema(schema: pa.Schema) -> FileLook:
    """The look of a file with Arrow's schema."""
    examples = {each.name: _example_of(each.type, _MAX_DEPTH) for each in schema}
    return FileLook(tuple(schema.names), examples, _class_names((schema.metadata or {}).get(_METADATA)))


def _example_of(kind: pa.DataType, depth: int) -> Any:
    """A value of the type, as deep as the recognition of shapes looks."""
    if depth and (pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)):
        return [_example_of(kind.value_type, depth - 1)]
    if depth and pa.types.is_struct(kind):
        fields = (kind.field(index) for index in range(kind.num_fields))
        return {each.name: _example_of(each.type, depth - 1) for each in fields}
    if pa.types.is_boolean(kind):
        return True
    return 0 if pa.types.is_integer(kind) else ""


def _class_names(metadata: bytes | None) -> dict[str, tuple[str, ...]]:
    """Names by column. Metadata of another form have none."""
    try:
        features = json.loads(metadata or b"{}")["info"]["features"]
        columns = dict(features.items())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}
    found = {}
    for column, feature in columns.items():
        names = feature.get("names") if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" else None
        if isinstance(names, list) and names and all(isinstance(name, str) and name.strip() for name in names):
            found[column] = tuple(names)
    return found
