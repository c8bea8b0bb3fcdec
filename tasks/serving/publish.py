"""Publish a version for vLLM's plugin `lora_filesystem_resolver`: a folder that every replica finds by its name.

The plugin looks for an unknown model name among the folders of VLLM_LORA_RESOLVER_CACHE_DIR. It loads the adapter if
`base_model_name_or_path` in adapter_config.json is exactly the model that `vllm serve` was started with
(https://docs.vllm.ai, LoRA Resolver Plugins); `--served-model-name` does not count.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from deal_core.adapter.files import CONFIG_FILE, PEFT_FILES, digests_of
from deal_core.base_model.sources import hub_address, resolve_base
from deal_core.errors import ConfigError
from infra.serving.version_files import write_peft_folder
from infra.settings import EngineSettings, HomeSettings
from infra.store.base import ObjectStore
from tasks.lineage.history import find_version
from tasks.lineage.record import read_record
from tasks.lineage.version_files import borrowed_adapter, reading_beside
from tasks.serving.export import require_exportable
from tasks.serving.exports import note_export


class Published(BaseModel, frozen=True):
    """A version in the folder of vLLM's resolver."""

    lineage: str
    version: str
    model: str
    """The model name for requests; the name of the folder."""
    folder: str
    base_model: str
    """The model that `vllm serve` must have been started with."""
    is_new: bool
    """False: the folder was there already, with the same files."""


def publish(
    store: ObjectStore,
    lineage: str,
    folder: Path,
    settings: EngineSettings,
    *,
    version: str | None = None,
    model: str | None = None,
) -> Published:
    """Write a version into a folder of adapters. The new folder appears at once and complete, and never changes.

    Args:
        store: The store, which has the version.
        lineage: The lineage.
        folder: The servers' VLLM_LORA_RESOLVER_CACHE_DIR, as this machine sees it.
        settings: Limits of the servers.
        version: Number of the version; None: the champion.
        model: The model that `vllm serve` was started with, word for word; None: the Hub id of the lineage's base
            model, or its folder on this machine.

    Raises:
        ConfigError: The servers cannot load such an adapter, or the folder has another adapter or another base model
            under the name.
        RegistryError: There is no such version, or it may not be used elsewhere.
    """
    info = find_version(store, lineage, version)
    require_exportable(store, info)
    with reading_beside(store, info.adapter_uri, CONFIG_FILE):
        config = dict(json.loads(store.get_bytes(f"{info.adapter_uri}/{CONFIG_FILE}")))
    require_servable(config, settings)
    base = model
    if not base:  # what such a server is given: the base model's Hub id, or its folder on this machine
        recorded = read_record(store, info).base
        address = hub_address(recorded.source)
        base = address.repository if address else str(resolve_base(recorded.source, HomeSettings().cache_dir))
    content = json.dumps({**config, "base_model_name_or_path": base}, indent=2, sort_keys=True) + "\n"
    target = folder / f"{lineage}-v{info.version}"  # never another adapter, since servers cache by name
    with borrowed_adapter(store, info) as adapter:
        wanted = digests_of(adapter, PEFT_FILES) | {CONFIG_FILE: hashlib.sha256(content.encode()).hexdigest()}
        was_there = target.exists()
        if was_there:
            _require_same(target, wanted)
        note_export(store, lineage, info.version, str(target.absolute()), adapter)  # first, so that none is unknown
        is_new = not was_there and write_peft_folder(adapter, target, content)
    if not (was_there or is_new):  # another process was faster
        _require_same(target, wanted)
    return Published(
        lineage=lineage, version=info.version, model=target.name, folder=str(target), base_model=base, is_new=is_new
    )


def _require_same(target: Path, wanted: Mapping[str, str]) -> None:
    """Raise ConfigError if a folder has other files than those that are to be published.

    Servers that have loaded it would not notice a change, and others would load something else.
    """
    there = digests_of(target, PEFT_FILES)
    if names := ", ".join(name for name in PEFT_FILES if there.get(name) != wanted[name]):
        other = ""
        with suppress(OSError, ValueError, KeyError, TypeError):
            named = json.loads((target / CONFIG_FILE).read_bytes())["base_model_name_or_path"]
            other = f" It was published for the base model {named}."
        raise ConfigError(
            f"{target} is there with other content ({names}), and a published name never changes.{other} Give "
            "another folder, or stop the servers that use this one and remove it."
        )


def require_servable(config: dict[str, Any], settings: EngineSettings) -> None:
    """Raise ConfigError, with every reason, if the server would refuse a version or answer otherwise than judged.

    `config` is the adapter's adapter_config.json.
    """
    rank = max([int(config["r"]), *map(int, (config.get("rank_pattern") or {}).values())])
    targets = config["target_modules"]
    unknown = sorted(set(targets) - settings.target_modules) if isinstance(targets, list) else [str(targets)]
    problems = []
    if rank > settings.max_lora_rank:
        problems.append(
            f"its rank is {rank} and the server allows {settings.max_lora_rank}: start the server with "
            f"--max-lora-rank {rank} or more and set DEAL_ENGINE_MAX_LORA_RANK to the same"
        )
    if unknown:
        problems.append(
            f"it is on the layers {', '.join(unknown)}, and the server allows "
            f"{', '.join(sorted(settings.target_modules))} (DEAL_ENGINE_TARGET_MODULES)"
        )
    if config.get("task_type") == "SEQ_2_SEQ_LM":
        problems.append("its base model is an encoder-decoder, which vLLM serves no adapters on")
    if config.get("use_dora") or config.get("modules_to_save") or config.get("bias", "none") != "none":
        problems.append("it uses DoRA, a bias or whole modules, which vLLM does not take")
    if problems:
        raise ConfigError(f"The adapter cannot be served by vLLM: {'; '.join(problems)}. Nothing was changed.")
