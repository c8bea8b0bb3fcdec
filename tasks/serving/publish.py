"""Folders for vLLM's filesystem resolver, by which every replica finds an adapter by its name.

vLLM with the plugin `lora_filesystem_resolver` looks for an unknown model name among the folders of
VLLM_LORA_RESOLVER_CACHE_DIR. It loads the adapter if `base_model_name_or_path` in adapter_config.json is exactly the
model that `vllm serve` was started with (https://docs.vllm.ai, LoRA Resolver Plugins). `--served-model-name` does not
count. A replica or a restarted server needs no further command.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

from pydantic import BaseModel

from deal_core.adapter.files import CONFIG_FILE, WEIGHTS_FILE, digests_of
from deal_core.base_model.sources import resolve_base
from deal_core.errors import ConfigError
from infra.settings import HomeSettings, VllmSettings
from infra.store.base import ObjectStore
from infra.tracking.facts import VersionInfo
from infra.tracking.registry import open_registry
from tasks.context import current_store
from tasks.lineage.history import find_version
from tasks.lineage.record import LineageRecord, read_record
from tasks.lineage.version_files import borrowed_adapter
from tasks.serving.export import require_exportable
from tasks.vllm import config_of, model_name, require_champion, require_servable


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
    lineage: str, folder: Path, settings: VllmSettings, *, version: str | None = None, model: str | None = None
) -> Published:
    """Write a version into a folder of adapters. The new folder appears at once and complete, and never changes.

    Args:
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
    store, registry = current_store(), open_registry()
    info = find_version(registry, lineage, version) if version else require_champion(registry, store, lineage)
    require_exportable(store, registry, info)
    config = config_of(store, info)
    require_servable(config, settings)
    base = model or _base_for_vllm(read_record(store, info.adapter_uri))
    content = json.dumps({**config, "base_model_name_or_path": base}, indent=2, sort_keys=True) + "\n"
    name = model_name(info)
    is_new = _write(store, info, folder, name, content)
    return Published(
        lineage=lineage, version=info.version, model=name, folder=str(folder / name), base_model=base, is_new=is_new
    )


def _base_for_vllm(record: LineageRecord) -> str:
    """Return what `vllm serve` is given for a base model: its Hub id, or its folder on this machine."""
    source = record.base.source
    if "/" in record.base.name and not Path(source).expanduser().exists():
        return record.base.name
    return str(resolve_base(source, HomeSettings().cache_dir))


def _write(store: ObjectStore, info: VersionInfo, folder: Path, name: str, config: str) -> bool:
    """Write the folder of a version, unless it is there with the same files. Return whether it was written."""
    target = folder / name
    folder.mkdir(parents=True, exist_ok=True)
    with borrowed_adapter(store, info) as adapter, tempfile.TemporaryDirectory(prefix=".", dir=folder) as temporary:
        part = Path(temporary) / name
        part.mkdir()
        shutil.copyfile(adapter / WEIGHTS_FILE, part / WEIGHTS_FILE)
        (part / CONFIG_FILE).write_text(config, encoding="utf-8")
        part.chmod(0o755)
        if not target.exists():
            part.rename(target)
            return True
        _require_same(part, target)
    return False


def _require_same(wanted: Path, found: Path) -> None:
    """Refuse to change a folder: servers that have loaded it would not notice, and others would load something else.

    Raises:
        ConfigError: The files differ.
    """
    expected, there = digests_of(wanted), digests_of(found)
    if expected == there:
        return
    names = ", ".join(name for name in expected if expected[name] != there.get(name))
    base = _base_named(found)
    other = f" It was published for the base model {base}." if base else ""
    raise ConfigError(
        f"{found} is there with other content ({names}), and a published name never changes.{other} Give another "
        "folder, or stop the servers that use this one and remove it."
    )


def _base_named(folder: Path) -> str | None:
    try:
        return str(json.loads((folder / CONFIG_FILE).read_bytes())["base_model_name_or_path"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
