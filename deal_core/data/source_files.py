"""The files of one arrival: where each of them is on this machine, and how people call it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from deal_core.data.reading.lines import sha256_of_input
from deal_core.data.reading.parsing import Kind
from deal_core.data.reading.readers import file_kind
from deal_core.errors import DataValidationError
from deal_core.safe_text import listed


class SourceFile(NamedTuple):
    """A file of an arrival."""

    path: Path
    """Where it is on this machine; it may be a temporary copy."""
    name: str
    """How messages and the quarantine name it: the file's name, in a folder with the folder's name before it."""


SourceFiles = tuple[SourceFile, ...]
"""The files of an arrival, in the order in which they are read."""


def files_at(*paths: Path) -> SourceFiles:
    """Return files of an arrival that have their own names."""
    return tuple(SourceFile(path, path.name) for path in paths)


def name_of(files: Sequence[SourceFile]) -> str:
    """Return the name of an arrival: that of its file, that of the folder of its files, or its first file's."""
    first = files[0].name
    if len(files) == 1:
        return first
    folders = {file.name.rpartition("/")[0].partition("/")[0] for file in files}
    return folders.pop() if len(folders) == 1 and "" not in folders else f"{first} and {len(files) - 1} more"


def digests_of(files: Sequence[SourceFile]) -> tuple[str, ...]:
    """Return the SHA-256 of the bytes of each file, each digest once.

    Raises:
        DataValidationError: A file does not exist, or it is not a regular file.
    """
    return tuple(dict.fromkeys(sha256_of_input(file.path) for file in files))


@contextmanager
def naming(file: SourceFile) -> Iterator[None]:
    """Put a file's name before a message that does not have it: the reader knows only the last part."""
    try:
        yield
    except DataValidationError as error:
        if file.name in str(error) or file.name.rpartition("/")[2] == file.name:
            raise
        raise DataValidationError(f"{file.name}: {error}", code=error.code) from error


def require_one_kind(files: Sequence[SourceFile]) -> None:
    """Check by their names that all files of an arrival have one format. A single file is checked by its reader.

    Raises:
        DataValidationError: Some files have another format than most, or none. The message has their names.
    """
    if len(files) == 1:
        return
    kinds: dict[str, Kind | None] = dict.fromkeys(file.name for file in files)
    for file in files:
        with suppress(DataValidationError):
            kinds[file.name] = file_kind(file.path)
    most = next((kind for kind, _ in Counter(kinds.values()).most_common() if kind), None)
    others = [name for name, kind in kinds.items() if kind != most or kind is None]
    if others:
        wanted = f"the others are {most} files" if most else "no name ends in .csv, .jsonl, .json or .parquet"
        raise DataValidationError(
            f"{name_of(files)} has files of more than one format: {listed(others)}, and {wanted}. Give all files of an "
            "arrival one format, or take these files out. Files whose name begins with . or _ are not read."
        )
