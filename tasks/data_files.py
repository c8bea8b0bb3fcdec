"""The local file behind an address of training or test rows: a path, the store, a bucket, or a dataset of the Hub."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from urllib.parse import unquote, urlsplit

from deal_core.base_model.sources import HUB_DATASET, fetch_snapshot
from deal_core.errors import ConfigError, DataValidationError, StoreError
from deal_core.safe_text import listed, without_secrets
from infra.settings import StoreSettings
from infra.store.base import ObjectStore, temporary_folder
from infra.store.local import FileStore, open_store

HUB_FILES = (
    "README.md",
    "*.parquet",
    "*.jsonl",
    "*.json",
    "*.csv",
    "*.tsv",
    "*.jsonl.gz",
    "*.json.gz",
    "*.csv.gz",
    "*.tsv.gz",
)
"""Files of a dataset's repository that are fetched: rows, and the page that names the splits. Never a script."""
CLOUDS = ("gs", "abfs", "abfss", "az")
"""Schemes that the extra `cloud` reads."""
NewFolder = Callable[[], Path]
"""Makes a folder that lasts as long as the file is used."""


@contextmanager
def local_file(store: ObjectStore, address: str) -> Iterator[Path]:
    """Give a local path of a file. A copy of a remote file is removed at the end.

    Args:
        store: The current store.
        address: A path, a file:// uri, a full uri in the store, an s3://, gs:// or abfs:// uri, or
            hf://datasets/OWNER/NAME[@REVISION][:SPLIT]. A path may be a folder that `datasets.save_to_disk` wrote.

    Raises:
        StoreError: There is no file, or a link leads out of the store's folder.
        ConfigError: The address has another form, or the Hub has no such dataset.
        DataValidationError: The path is a folder that cannot be read, or the dataset has no such split.
    """
    with ExitStack() as stack:
        yield _find(store, address, lambda: stack.enter_context(temporary_folder()))


def _find(store: ObjectStore, address: str, new_folder: NewFolder) -> Path:
    root = store.uri.rstrip("/") + "/"
    scheme = address.partition("://")[0] if "://" in address else ""
    if address.startswith(root):
        return _from_store(store, address.removeprefix(root), new_folder)
    if scheme == "s3":
        bucket, _, key = address.removeprefix("s3://").partition("/")
        return _from_store(open_store(f"s3://{bucket}", StoreSettings()), key, new_folder)
    if scheme in CLOUDS:
        return _from_cloud(address, new_folder)
    if scheme == "hf":
        return _from_hub(address, new_folder)
    if scheme not in ("", "file"):
        raise ConfigError(
            f"{without_secrets(address)} has a scheme that is not known; give a path, or a file://, s3://, gs://, "
            "abfs:// or hf://datasets/ address."
        )
    return _from_path(Path(unquote(urlsplit(address).path) if scheme else address), new_folder)


def _from_store(store: ObjectStore, key: str, new_folder: NewFolder) -> Path:
    if isinstance(store, FileStore):
        return store.path_of(key)
    path = new_folder() / key.rsplit("/", 1)[-1]
    store.download_file(key, path)
    return path


def _from_cloud(address: str, new_folder: NewFolder) -> Path:
    """Copy a file of Google's or Azure's object store. Their usual variables of the environment give the keys."""
    try:
        import obstore
        from obstore.exceptions import BaseError
        from obstore.store import from_url
    except ImportError:
        raise ConfigError(f"{address} needs the extra `cloud`; in the checkout: pip install '.[cloud]'.") from None
    folder, _, name = address.rpartition("/")
    path = new_folder() / name
    try:
        with path.open("wb") as file:
            for chunk in obstore.get(from_url(folder), name):
                file.write(chunk)
    except (BaseError, OSError, ValueError) as error:
        reason = without_secrets(str(error).strip() or type(error).__name__).splitlines()[0]
        raise StoreError(f"{address} could not be read ({reason}).") from None
    return path


def _from_hub(address: str, new_folder: NewFolder) -> Path:
    """Write one split of a dataset of the Hub, by default train, as a temporary Parquet file. No code of it runs."""
    found = HUB_DATASET.fullmatch(address)
    if found is None:
        raise ConfigError(f"{address} is not a dataset of the Hub; give hf://datasets/OWNER/NAME[@REVISION][:SPLIT].")
    snapshot = fetch_snapshot(found["repository"], "dataset", HUB_FILES, revision=found["revision"])
    split, folder = found["split"] or "train", new_folder()
    file = folder / f"{found['repository'].replace('/', '--')}-{split}.parquet"
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


def _from_path(path: Path, new_folder: NewFolder) -> Path:
    """Return a file as it is, and a folder that `datasets.save_to_disk` wrote as a temporary Parquet file."""
    if os.path.isfile(path / "dataset_dict.json"):  # Path.is_file raises if the name is too long
        splits = sorted(each.name for each in path.iterdir() if (each / "state.json").is_file())
        raise DataValidationError(
            f"{path} holds the splits {listed(splits)}; give the folder of one of them, and of another as test rows "
            "(test_data)."
        )
    if not os.path.isfile(path / "state.json"):
        return path
    import datasets

    datasets.disable_progress_bars()
    file = new_folder() / f"{path.name or 'rows'}.parquet"
    try:
        datasets.load_from_disk(str(path)).to_parquet(str(file))
    except Exception as error:  # damaged folders break the library in many ways
        raise DataValidationError(
            f"{path} looks like a folder of datasets.save_to_disk and cannot be read ({type(error).__name__}); "
            "save it again, or write it with Dataset.to_parquet."
        ) from error
    return file
