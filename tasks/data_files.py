"""The local file behind an address of training or test rows: a path, the store, a bucket, or a dataset of the Hub."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote, urlsplit

from deal_core.base_model.sources import HUB_DATASET, fetch_snapshot
from deal_core.errors import ConfigError, DataValidationError, StoreError
from deal_core.regular_file import complete_file
from deal_core.safe_text import listed, without_secrets
from infra.settings import StoreSettings
from infra.store.base import ObjectStore, temporary_folder
from infra.store.local import FileStore, open_store

HUB_FILES = ("README.md", "*.parquet", "*.jsonl", "*.json", "*.csv")
"""Files of a dataset's repository that are fetched: rows, and the page that names the splits. Never a script."""
CLOUDS = ("gs", "abfs", "abfss", "az")
"""Schemes that the extra `cloud` reads."""


@contextmanager
def local_file(store: ObjectStore, address: str) -> Iterator[Path]:
    """Give a local path of a file. A copy of a remote file is removed at the end.

    Args:
        store: The current store.
        address: A path, a file:// uri, a full uri in the store, an s3://, gs:// or abfs:// uri, or
            hf://datasets/OWNER/NAME[@REVISION][:SPLIT]. A path may be a folder, see `as_file`.

    Raises:
        StoreError: There is no file, or a link leads out of the store's folder.
        ConfigError: The address has another form, or the Hub has no such dataset.
        DataValidationError: The path is a folder that cannot be read, or the dataset has no such split.
    """
    root = store.uri.rstrip("/") + "/"
    scheme = address.partition("://")[0] if "://" in address else ""
    if address.startswith(root):
        key = address.removeprefix(root)
        if isinstance(store, FileStore):
            yield store.path_of(key)
            return
        with _copied(store, key) as path:
            yield path
    elif scheme == "s3":
        bucket, _, key = address.removeprefix("s3://").partition("/")
        with _copied(open_store(f"s3://{bucket}", StoreSettings()), key) as path:
            yield path
    elif scheme in CLOUDS:
        with _from_cloud(address) as path:
            yield path
    elif scheme == "hf":
        with _from_hub(address) as path:
            yield path
    else:
        with as_file(_local_path(address, scheme)) as path:
            yield path


@contextmanager
def _copied(store: ObjectStore, key: str) -> Iterator[Path]:
    with temporary_folder() as temporary:
        path = temporary / key.rsplit("/", 1)[-1]
        store.download_file(key, path)
        yield path


@contextmanager
def _from_cloud(address: str) -> Iterator[Path]:
    """Copy a file of Google's or Azure's object store. Their usual variables of the environment give the keys."""
    try:
        import obstore
        from obstore.exceptions import BaseError
        from obstore.store import from_url
    except ImportError:
        raise ConfigError(f"{address} needs the extra `cloud`; in the checkout: pip install '.[cloud]'.") from None
    folder, _, name = address.rpartition("/")
    with temporary_folder() as temporary:
        path = temporary / name
        try:
            with complete_file(path) as part, part.open("wb") as file:
                for chunk in obstore.get(from_url(folder), name):
                    file.write(chunk)
        except (BaseError, OSError, ValueError) as error:
            reason = without_secrets(str(error).strip() or type(error).__name__).splitlines()[0]
            raise StoreError(f"{address} could not be read ({reason}).") from None
        yield path


@contextmanager
def _from_hub(address: str) -> Iterator[Path]:
    """Write one split of a dataset of the Hub, by default train, as a temporary Parquet file. No code of it runs."""
    found = HUB_DATASET.fullmatch(address)
    if found is None:
        raise ConfigError(f"{address} is not a dataset of the Hub; give hf://datasets/OWNER/NAME[@REVISION][:SPLIT].")
    folder = fetch_snapshot(found["repository"], "dataset", HUB_FILES, revision=found["revision"])
    split = found["split"] or "train"
    import datasets

    datasets.disable_progress_bars()
    with temporary_folder() as temporary:
        file = temporary / f"{found['repository'].replace('/', '--')}-{split}.parquet"
        try:
            rows = datasets.load_dataset(str(folder), split=split, cache_dir=str(temporary / "cache"))
            rows.to_parquet(str(file))
        except Exception as error:  # the library fails in many ways on odd repositories, and may quote a row
            raise DataValidationError(
                f"{address} could not be read as a dataset with the split {split!r} ({type(error).__name__}); name a "
                "split with :SPLIT, or download the file of rows that you want and give its path."
            ) from None
        yield file


def _local_path(address: str, scheme: str) -> Path:
    if not scheme:
        return Path(address)
    if scheme != "file":
        raise ConfigError(
            f"{without_secrets(address)} has a scheme that is not known; give a path, or a file://, s3://, gs://, "
            "abfs:// or hf://datasets/ address."
        )
    return Path(unquote(urlsplit(address).path))


@contextmanager
def as_file(path: Path) -> Iterator[Path]:
    """Give a file as it is, and a folder that `datasets.save_to_disk` wrote as a temporary Parquet file.

    Raises:
        DataValidationError: The folder holds several splits, or cannot be read.
    """
    if os.path.isfile(path / "dataset_dict.json"):  # Path.is_file raises if the name is too long
        splits = sorted(each.name for each in path.iterdir() if (each / "state.json").is_file())
        raise DataValidationError(
            f"{path} holds the splits {listed(splits)}; give the folder of one of them, and of another as test rows "
            "(test_data)."
        )
    if not os.path.isfile(path / "state.json"):
        yield path
        return
    import datasets

    with temporary_folder() as temporary:
        file = temporary / f"{path.name or 'rows'}.parquet"
        try:
            datasets.disable_progress_bars()
            datasets.load_from_disk(str(path)).to_parquet(str(file))
        except Exception as error:  # damaged folders break the library in many ways
            raise DataValidationError(
                f"{path} looks like a folder of datasets.save_to_disk and cannot be read ({type(error).__name__}); "
                "save it again, or write it with Dataset.to_parquet."
            ) from error
        yield file
