"""Tables of the Python API: rows that are given as a table become a file, and results become a DataFrame."""

from __future__ import annotations

import json
import os
import sys
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from deal_core.errors import ConfigError, StoreError
from deal_pipeline.home import kind_of, require

if TYPE_CHECKING:
    import pandas as pd
    from datasets import Dataset
    from pydantic import BaseModel

    from deal_core.evaluation.accuracy_matrix import AccuracyMatrix
    from tasks.references import VersionScores

Rows: TypeAlias = "str | os.PathLike[str] | list[dict[str, Any]] | pd.DataFrame | Dataset"
"""A file, an address, or a table with the columns that a file would have: a list of rows, a DataFrame or a Dataset."""


def as_file(data: Rows, folder: Path, written: list[Path]) -> str:
    """Return a file's path from the root, or an address as it is. A table becomes a file in `folder`.

    `written` gets the path of that file, also where writing it fails.

    Raises:
        ConfigError: The data is no rows (code "argument"), or a table that no file can hold (code "table").
        StoreError: The file cannot be written.
    """
    if isinstance(data, str | os.PathLike):
        address = os.fspath(data)
        return address if "://" in address else os.path.abspath(os.path.expanduser(address))
    if isinstance(data, Mapping):
        keys = ", ".join(map(str, data))
        raise ConfigError(
            f"The data is a dict of {keys}; give one split of it, or its rows as a list of dicts.", code="argument"
        )
    table: Any = data  # the library of its class may not be installed
    is_list, is_frame = isinstance(table, list), _is_of(table, "pandas.DataFrame")
    if not (is_list or is_frame or _is_of(table, "datasets.Dataset")):
        raise ConfigError(
            f"The data is {kind_of(data)}; give a file, an address, a list of rows as dicts, a pandas DataFrame or a "
            "datasets.Dataset.",
            code="argument",
        )
    lines = []
    for number, row in enumerate(table if is_list else (), start=1):
        require(row, Mapping, f"row {number} of the data", "a dict with the columns that a file would have")
        try:
            lines.append(json.dumps(row) + "\n")
        except (TypeError, ValueError, RecursionError) as error:
            raise ConfigError(
                f"Row {number} of the data is no JSON: {error}; give texts, numbers, lists and dicts.", code="table"
            ) from None
    file = folder / (uuid.uuid4().hex + (".jsonl" if is_list else ".parquet"))
    written.append(file)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if is_list:
            file.write_text("".join(lines), encoding="utf-8")
        elif is_frame:
            table.to_parquet(file, index=False)
        else:
            table.to_parquet(file)
    except OSError as error:
        raise StoreError(f"The table cannot be written to {file} ({error.strerror}); check the home.") from None
    except Exception as error:  # the cells may be of any type, and each has its own errors
        why = " ".join(str(error).split()).rstrip(".")
        raise ConfigError(
            f"The table cannot be kept as Parquet: {why}. Give each column its own name and one type, or leave it out.",
            code="table",
        ) from None
    return str(file)


def as_texts(texts: Any) -> list[str]:
    """Return texts as a list; a single text counts as a list of one.

    Raises:
        ConfigError: It is no text, list, tuple, pandas Series or array of texts (code "argument").
    """
    if _is_of(texts, "pandas.Series") or _is_of(texts, "numpy.ndarray"):
        texts = texts.tolist()
    require(texts, str | list | tuple, "the argument texts", "a text or a list of texts")
    listed = [texts] if isinstance(texts, str) else list(texts)
    for number, text in enumerate(listed, start=1):
        require(text, str, f"text {number}", "a text")
    return listed


def _is_of(value: object, kind: str) -> bool:
    """Whether a value is of a class of a library. Who has such a value has imported the library."""
    module, _, name = kind.partition(".")
    return module in sys.modules and isinstance(value, getattr(sys.modules[module], name))


def frame(result: AccuracyMatrix | VersionScores | Sequence[BaseModel]) -> pd.DataFrame:
    """Return a result as a pandas DataFrame.

    Args:
        result: An accuracy matrix: one row for each version, labelled with the task that it learned, and one column
            for each task; shares from 0 to 1, missing where nothing was measured. Scores of a version: one row for
            each task with `score` and `recorded` (shares from 0 to 1) and `num_rows`. A list of results: one row for
            each, one column for each field; of versions also what became of them, such as `aliases`.
    """
    import pandas as pd

    from deal_core.evaluation.accuracy_matrix import AccuracyMatrix
    from infra.versions import Version
    from tasks.references import VersionScores

    if isinstance(result, AccuracyMatrix):
        rows = pd.Index(result.learned, name="learned")
        return pd.DataFrame(result.rows, index=rows, columns=list(result.tasks), dtype=float)
    if isinstance(result, VersionScores):
        columns = {"score": result.accuracies, "recorded": result.recorded, "num_rows": result.num_rows}
        return pd.DataFrame(columns).rename_axis("task")
    return pd.DataFrame([vars(entry) | (vars(entry.since) if isinstance(entry, Version) else {}) for entry in result])
