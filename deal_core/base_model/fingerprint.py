"""Digests of files and of whole base models, computed in a stream."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_TOKENIZER_FILES = (
    "added_tokens.json", "chat_template.jinja", "merges.txt", "special_tokens_map.json", "spiece.model",
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt",
)
_VOLATILE_KEYS = ("transformers_version", "_name_or_path", "_commit_hash")


def sha256_of_file(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_model(folder: Path, memo_folder: Path | None) -> str:
    """Identity of a base model: digest over its safetensors files, config and tokenizer.

    File names and contents count. The folder's place and the version of the library that wrote the config do not.
    Hashing 16 GB takes long, so the result is stored in `memo_folder` under the files' names, sizes and times. Without
    a `memo_folder` the files are always read.
    """
    files = [file for file in sorted(folder.iterdir())
             if file.suffix == ".safetensors" or file.name == "config.json" or file.name in _TOKENIZER_FILES]
    if memo_folder is None:
        return _digest_of(files)
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    key = hashlib.sha256(json.dumps([str(folder.resolve()), stats]).encode()).hexdigest()
    memo = memo_folder / f"{key}.txt"
    if memo.is_file():
        return memo.read_text(encoding="ascii").strip()
    digest = _digest_of(files)
    memo_folder.mkdir(parents=True, exist_ok=True)
    partial = memo_folder / f".{key}.{os.getpid()}"
    partial.write_text(digest + "\n", encoding="ascii")
    os.replace(partial, memo)
    return digest


def _digest_of(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        content = _config_digest(file) if file.name == "config.json" else sha256_of_file(file)
        digest.update(f"{file.name}\0{content}\n".encode())
    return digest.hexdigest()


def _config_digest(file: Path) -> str:
    config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    for key in _VOLATILE_KEYS:
        config.pop(key, None)
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
