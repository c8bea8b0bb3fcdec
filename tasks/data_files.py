"""The files on this machine behind the addresses of an arrival: paths, the store, buckets, and datasets of the Hub."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from fnmatch import fnmatchcase
from glob import glob, has_magic
from itertools import islice
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

from deal_core.base_model.sources import HUB_DATASET, fetch_snapshot
from deal_core.data.source_files import SourceFile, SourceFiles, files_at, name_of
from deal_core.errors import ConfigError, DataValidationError, StoreError
from deal_core.safe_text import listed, shorten, without_secrets
from infra.store.base import ObjectStore, temporary_folder
from infra.store.keys import is_read
from infra.store.local import FileStore
from infra.store.opening import store_at

TABLES = ("*.jsonl", "*.json", "*.csv", "*.tsv")
HUB_FILES = ("README.md", "*.parquet", *TABLES, *(f"{name}.gz" for name in TABLES))
"""Files of a dataset's repository that are fetched: rows, and the page that names the splits. Never a script."""
CLOUDS = ("gs", "abfs", "abfss", "az")
"""Schemes that the extra `cloud` reads."""
MAX_FILES = 10_000
"""Most files of an arrival."""
NOT_READ = "files whose name begins with . or _ are not read."
STATE_FILE = "state.json"
"""The file by which a folder that `datasets.save_to_disk` wrote is known."""
SPLITS_FILE = "dataset_dict.json"
"""The file by which a saved folder of several splits is known."""
NewFolder = Callable[[], Path]
"""Makes a folder that lasts as long as the file is used."""


@contextmanager
def local_files(store: ObjectStore, addresses: str | Sequence[str]) -> Iterator[SourceFiles]:
    """Give the files of an arrival on this machine, in the order of their rows. Copies of remote files are removed.

    The files of each address follow those of the address before it. Those of a folder and of a pattern are sorted by
    name; names that begin with `.` or `_` are left out, see `is_read`.

    Args:
        store: The current store.
        addresses: A path, a file:// uri, a full uri in the store, an s3://, gs:// or abfs:// uri, or
            hf://datasets/OWNER/NAME[@REVISION][:SPLIT]; or several of them. Each is a file, a folder, or a pattern with
            *, ?, [] or **. A folder may be one that `datasets.save_to_disk` wrote.

    Raises:
        StoreError: There is no file, or a link leads out of the store's folder.
        ConfigError: The address has another form, or the Hub has no such dataset.
        DataValidationError: A folder cannot be read or has no file of rows, or the dataset has no such split.
    """
    with ExitStack() as stack:

        def new_folder() -> Path:
            return stack.enter_context(temporary_folder())

        several = [addresses] if isinstance(addresses, str) else addresses
        files = tuple(file for address in several for file in _find(store, address, new_folder))
        if len(files) > MAX_FILES:
            raise DataValidationError(f"{name_of(files)} has more than {MAX_FILES:,} files; write fewer, larger files.")
        yield files


def _find(store: ObjectStore, address: str, new_folder: NewFolder) -> SourceFiles:
    root = store.uri.rstrip("/") + "/"
    scheme = address.partition("://")[0] if "://" in address else ""
    if address.startswith(root):
        return _from_store(store, address.removeprefix(root), new_folder)
    if scheme == "s3":
        bucket, _, key = address.removeprefix("s3://").partition("/")
        return _from_store(store_at(f"s3://{bucket}"), key, new_folder)
    if scheme in CLOUDS:
        return _from_cloud(address, new_folder)
    if scheme == "hf":
        return files_at(_from_hub(address, new_folder))
    if scheme not in ("", "file"):
        raise ConfigError(
            f"{without_secrets(address)} has a scheme that is not known; give a path, or a file://, s3://, gs://, "
            "abfs:// or hf://datasets/ address."
        )
    return _from_path(Path(unquote(urlsplit(address).path) if scheme else address), new_folder)


def _below(address: str, list_names: Callable[[str], Iterable[str]]) -> dict[str, tuple[str, str]]:
    """Find the files of a folder or of a pattern in an object store.

    `list_names` lists the names below a folder. The result has the folder and the name of each file that is read, by
    what messages call it, in order: by the part of its key that the pattern describes, or else with the folder's name.
    """
    folder = address.rstrip("/")
    if names := _readable(list_names(folder), folder):
        return {_join(folder.rpartition("/")[2], name): (folder, name) for name in names}
    if not has_magic(address):
        return {}
    parts = folder.split("/")
    num_fixed = next(place for place, part in enumerate(parts) if has_magic(part))
    fixed, pattern = "/".join(parts[:num_fixed]), parts[num_fixed:]
    names = _readable((name for name in list_names(fixed) if _is_matched(name.split("/"), pattern)), address)
    return {name: (fixed, name) for name in names}


def _is_matched(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether a pattern describes a file or a folder above it. `**` stands for any number of folders."""
    if not pattern or not parts:
        return not pattern
    if pattern[0] == "**":
        return _is_matched(parts, pattern[1:]) or _is_matched(parts[1:], pattern)
    return fnmatchcase(parts[0], pattern[0]) and _is_matched(parts[1:], pattern[1:])


def _readable(names: Iterable[str], shown: str) -> list[str]:
    """The names of files that are read, in order."""
    readable = sorted(islice(filter(is_read, names), MAX_FILES + 1))
    if len(readable) > MAX_FILES:
        raise DataValidationError(f"{shown} has more than {MAX_FILES:,} files; give a folder of one arrival.")
    return readable


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def _copied(
    files: Mapping[str, tuple[str, str]], folder: Path, download: Callable[[str, str, Path], None]
) -> SourceFiles:
    """Copy remote files, each into a folder of its own, because only the ends of their names are known to be usable."""
    sources = []
    for number, (shown, (remote_folder, name)) in enumerate(files.items()):
        path = folder / str(number) / name.rpartition("/")[2]
        path.parent.mkdir()
        download(remote_folder, name, path)
        sources.append(SourceFile(path, shown))
    return tuple(sources)


def _from_store(store: ObjectStore, address: str, new_folder: NewFolder) -> SourceFiles:
    """The files of a key, a folder or a pattern in a store; without any, the file of the key, which does not exist."""
    folder, _, name = address.rpartition("/")
    files = {name: (folder, name)}
    if not name or not store.exists(address):
        below = _below(address, lambda place: (info.key.removeprefix(_join(place, "")) for info in store.list(place)))
        if not below and (not name or has_magic(address)):
            raise DataValidationError(f"{store.uri.rstrip('/')}/{address} has no file of rows; {NOT_READ}")
        if below and not {STATE_FILE, SPLITS_FILE}.isdisjoint(name for _, name in below.values()):
            folder, _ = next(iter(below.values()))
            copy = new_folder() / folder.rpartition("/")[2]
            store.download_folder(folder, copy)  # no link of a folder store leads out of a copy
            return _from_path(copy, new_folder)
        files = below or files
    if isinstance(store, FileStore):
        return tuple(SourceFile(store.path_of(_join(*place)), shown) for shown, place in files.items())
    return _copied(files, new_folder(), lambda place, name, path: store.download_file(_join(place, name), path))


def _from_cloud(address: str, new_folder: NewFolder) -> SourceFiles:
    """Copy files of Google's or Azure's object store. Their usual variables of the environment give the keys."""
    try:
        import obstore
        from obstore.exceptions import BaseError
        from obstore.store import from_url
    except ImportError:
        raise ConfigError(f"{address} needs the extra `cloud`; in the checkout: pip install '.[cloud]'.") from None

    def download(folder: str, name: str, path: Path) -> None:
        with path.open("wb") as file:
            file.writelines(obstore.get(from_url(folder), name))

    folder, _, name = address.rpartition("/")
    try:
        if name and not has_magic(name):
            with suppress(FileNotFoundError):
                return _copied({name: (folder, name)}, new_folder(), download)
        files = _below(
            address, lambda place: (meta["path"] for batch in obstore.list(from_url(place)) for meta in batch)
        )
        if not files:
            raise FileNotFoundError("there is no such object, and no file of rows below it")
        return _copied(files, new_folder(), download)
    except (BaseError, OSError, ValueError) as error:
        reason = without_secrets(str(error).strip() or type(error).__name__).splitlines()[0]
        raise StoreError(f"{address} could not be read ({reason}).") from None


def _from_hub(address: str, new_folder: NewFolder) -> Path:
    """Write one split of a dataset of the Hub, by default train, as a temporary Parquet file. No code of it runs."""
    parts = HUB_DATASET.fullmatch(address)
    if parts is None:
        raise ConfigError(f"{address} is not a dataset of the Hub; give hf://datasets/OWNER/NAME[@REVISION][:SPLIT].")
    snapshot = fetch_snapshot(parts["repository"], "dataset", HUB_FILES, revision=parts["revision"])
    split, folder = parts["split"] or "train", new_folder()
    file = folder / f"{parts['repository'].replace('/', '--')}-{split}.parquet"
    import datasets

    datasets.disable_progress_bars()
    try:
        rows = datasets.load_dataset(str(snapshot), split=split, cache_dir=str(folder / "cache"))
        rows.to_parquet(str(file))
    except Exception as error:  # the library fails in many ways on odd repositories, and may quote a row
        raise DataValidationError(
            f"{address} could not be read as a dataset with the split {split!r} ({type(error).__name__}); name a "
            "split with :SPLIT, or download the file of rows that you want and give its path."
        ) from None
    return file


def _from_path(path: Path, new_folder: NewFolder) -> SourceFiles:
    """The files of a path. A file that does not exist is left to the reader, whose message says so."""
    if os.path.isdir(path):  # Path.is_dir raises if the name is too long
        return _from_folder(path, new_folder)
    if os.path.lexists(path) or not has_magic(str(path)):
        if not path.suffix and not os.path.lexists(path):  # the reader would say how files are named
            raise DataValidationError(f"There is no file or folder {shorten(str(path), 200)}; check the path.")
        return files_at(path)
    parts = path.parts
    fixed = Path(*parts[: next(place for place, part in enumerate(parts) if has_magic(part))])
    names: set[str] = set()
    for matched in glob(os.path.relpath(path, fixed), root_dir=fixed, recursive=True):
        below = _list_folder(fixed / matched) if os.path.isdir(fixed / matched) else [""]
        names |= {PurePosixPath(matched, name).as_posix() for name in below}
    readable = _readable(names, str(path))
    if not readable:
        raise DataValidationError(f"No file of rows fits the pattern {path}; {NOT_READ}")
    return tuple(SourceFile(fixed / name, name) for name in readable)


def _from_folder(folder: Path, new_folder: NewFolder) -> SourceFiles:
    """The files below a folder; a folder that `datasets.save_to_disk` wrote becomes a temporary Parquet file."""
    if (folder / SPLITS_FILE).is_file():
        splits = sorted(split.name for split in folder.iterdir() if (split / STATE_FILE).is_file())
        raise DataValidationError(
            f"{folder} holds the splits {listed(splits)}; give the folder of one of them, and of another as test rows "
            "(test_data)."
        )
    if (folder / STATE_FILE).is_file():
        return files_at(_from_saved(folder, new_folder))
    names = _readable(_list_folder(folder), str(folder))
    if not names:
        raise DataValidationError(f"{folder} has no file of rows; {NOT_READ}")
    shown = folder.name or folder.resolve().name
    return tuple(SourceFile(folder / name, _join(shown, name)) for name in names)


def _list_folder(folder: Path) -> Iterator[str]:
    """Yield the names of all files below a folder, relative to it.

    Raises:
        DataValidationError: A subfolder is a link, which may lead anywhere, or cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise DataValidationError(f"{error.filename} cannot be read ({error.strerror}); check the folder.") from error

    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if is_read(name)]
        if links := [name for name in folders if os.path.islink(os.path.join(parent, name))]:
            raise DataValidationError(
                f"{os.path.join(parent, links[0])} is a link to a folder, which is not read; put the folder there."
            )
        yield from (Path(parent, name).relative_to(folder).as_posix() for name in names)


def _from_saved(folder: Path, new_folder: NewFolder) -> Path:
    import datasets

    datasets.disable_progress_bars()
    file = new_folder() / f"{folder.name or 'rows'}.parquet"
    try:
        named = [part["filename"] for part in json.loads((folder / STATE_FILE).read_bytes())["_data_files"]]
        if any(Path(name).name != name for name in named):
            raise ValueError("a file of it lies elsewhere")
        datasets.load_from_disk(str(folder)).to_parquet(str(file))
    except Exception as error:  # damaged folders break the library in many ways
        raise DataValidationError(
            f"{folder} looks like a folder of datasets.save_to_disk and cannot be read ({type(error).__name__}); "
            "save it again, or write it with Dataset.to_parquet."
        ) from error
    return file
