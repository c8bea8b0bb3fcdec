"""Hand versions to vLLM servers: load the champion into one server, or publish a folder that every replica finds.

`sync_vllm` loads the champion under its own name, tests it, writes the route, and unloads the others. The route,
`serving/LINEAGE.json` in the object store, has the model name that answers for the lineage. Clients read the route. A
name never gets another adapter, because servers cache by name.

`publish` writes a folder for vLLM's plugin `lora_filesystem_resolver`, which looks for an unknown model name among the
folders of VLLM_LORA_RESOLVER_CACHE_DIR. It loads the adapter if `base_model_name_or_path` in adapter_config.json is
exactly the model that `vllm serve` was started with (https://docs.vllm.ai, LoRA Resolver Plugins);
`--served-model-name` does not count.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tempfile
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field

from deal_core.adapter.files import CONFIG_FILE, PEFT_FILES, digests_of, require_undamaged
from deal_core.base_model.sources import resolve_base
from deal_core.errors import ConfigError, DealError
from deal_core.safe_text import without_secrets
from infra.serving.vllm import VllmClient, VllmError
from infra.settings import HomeSettings, VllmSettings
from infra.store import keys
from infra.store.base import ObjectStore
from infra.store.local import FileStore
from infra.store.stored import Stored, read_stored, write_stored
from infra.versions import Version
from tasks.context import current_store
from tasks.lineage.history import find_version
from tasks.lineage.record import read_record
from tasks.lineage.version_files import borrowed_adapter, reading_beside, require_recorded, require_stored
from tasks.progress import reporter
from tasks.serving.export import require_exportable

TRIAL_PROMPT = "The text to answer."
TRIAL_TOKENS = 4


class ServingRoute(Stored):
    """The model name that answers for a lineage, and whether it is the champion."""

    lineage: str
    engine: Literal["vllm"] = "vllm"
    url: str
    """Address of the server."""
    model: str | None = None
    """The model name for requests; None: no version is served yet."""
    version: str | None = None
    """The version that answers."""
    adapter_sha256: str | None = None
    since: datetime | None = None
    """When the server began to answer with this model."""
    champion: str
    """The lineage's champion when the route was written."""
    state: Literal["in step", "behind"]
    problem: str | None = None
    """Why the route is behind."""
    names: dict[str, str] = Field(default_factory=dict)
    """The digest of the adapter by name, for every name that was ever loaded."""


def sync_vllm(lineage: str, settings: VllmSettings) -> ServingRoute:
    """Make a vLLM server serve the lineage's champion. If it does already, nothing changes.

    After an error, the version that answered before still answers.

    Raises:
        ConfigError: There is no server or no shared folder, or the server does not accept such an adapter.
        RegistryError: The lineage has no champion.
        VllmError: The server refuses a request or does not answer. The route has the error too.
    """
    store = current_store()
    champion = find_version(store, lineage, None)
    client = VllmClient(settings)
    before = read_route(store, lineage)
    try:
        route = _move(store, client, settings, champion, before)
        # the lineage's other adapters go, after clients had time to read the new route
        own = re.compile(rf"{re.escape(lineage)}-v\d+")
        others = [name for name in client.models() if own.fullmatch(name) and name != route.model]
        if others:
            assert route.since is not None
            time.sleep(max(0.0, settings.grace_seconds - (datetime.now(UTC) - route.since).total_seconds()))
        for name in others:
            client.unload(name)
            reporter().said(f"{name} is unloaded")
        if settings.adapter_dir is not None:
            _remove_copies(settings.adapter_dir, lineage, _copy_name(champion))
    except DealError as error:
        # the version that answered before still does; the route may have moved before the error
        number, url = champion.version, without_secrets(client.url)
        last = read_route(store, lineage) or ServingRoute(lineage=lineage, url=url, champion=number, state="behind")
        state = "in step" if last.version == number else "behind"
        problem = {"champion": number, "state": state, "problem": " ".join(str(error).split())}
        write_stored(store, keys.route_key(lineage), last.model_copy(update=problem))
        raise
    return route


def read_route(store: ObjectStore, lineage: str) -> ServingRoute | None:
    """Read the route of a lineage; None: vLLM never served the lineage; StoreError: it is damaged."""
    what = f"the route by which vLLM serves '{lineage}'"
    remedy = "Restore it from a backup of the store, or delete it: deal vllm sync writes it anew."
    return read_stored(store, keys.route_key(lineage), ServingRoute, what=what, remedy=remedy)


def require_servable(config: dict[str, Any], settings: VllmSettings) -> None:
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
            f"--max-lora-rank {rank} or more and set DEAL_VLLM_MAX_LORA_RANK to the same"
        )
    if unknown:
        problems.append(
            f"it is on the layers {', '.join(unknown)}, and the server allows "
            f"{', '.join(sorted(settings.target_modules))} (DEAL_VLLM_TARGET_MODULES)"
        )
    if config.get("task_type") == "SEQ_2_SEQ_LM":
        problems.append("its base model is an encoder-decoder, which vLLM serves no adapters on")
    if config.get("use_dora") or config.get("modules_to_save") or config.get("bias", "none") != "none":
        problems.append("it uses DoRA, a bias or whole modules, which vLLM does not take")
    if problems:
        raise ConfigError(f"The adapter cannot be served by vLLM: {'; '.join(problems)}. Nothing was changed.")


def _move(
    store: ObjectStore, client: VllmClient, settings: VllmSettings, champion: Version, before: ServingRoute | None
) -> ServingRoute:
    """Load the champion, test it with one request, and write the route."""
    require_stored(store, champion.adapter_uri)
    require_servable(config_of(store, champion), settings)
    name, names = model_name(champion), dict(before.names) if before else {}
    if names.setdefault(name, champion.adapter_sha256) != champion.adapter_sha256:
        raise ConfigError(
            f"The name {name} was served with another adapter ({names[name][:12]}) than version {champion.version} has "
            f"({champion.adapter_sha256[:12]}), and the server may have cached it; give the lineage a new name."
        )
    folder, path = _published(store, champion, settings)
    loaded = client.models()
    if name not in loaded:
        if settings.adapter_dir is None:
            require_recorded(store, champion, folder)
        else:
            require_undamaged(
                folder,
                champion.files_sha256,
                PEFT_FILES,
                what=f"The server's copy of version {champion.version} of '{champion.lineage}'",
                where=str(folder),
                remedy="Remove that folder and run this again: the adapter is copied anew.",
            )
        client.load(name, path)
        reporter().said(f"{name} is loaded from {path}")
    elif loaded[name] != path:
        raise VllmError(
            f"The server has another adapter under the name {name} ({loaded[name]}, not {path}); restart it, since it "
            "caches by name."
        )
    try:
        client.complete(name, TRIAL_PROMPT, TRIAL_TOKENS)
    except VllmError:
        if before is None or before.model != name:
            client.unload(name)
        raise
    is_same = before is not None and before.model == name and before.url == without_secrets(client.url)
    route = ServingRoute(
        lineage=champion.lineage,
        url=without_secrets(client.url),
        model=name,
        version=champion.version,
        adapter_sha256=champion.adapter_sha256,
        champion=champion.version,
        state="in step",
        names=names,
        since=before.since if before and is_same else datetime.now(UTC),
    )
    if route != before:
        write_stored(store, keys.route_key(route.lineage), route)
    return route


def model_name(version: Version) -> str:
    """Return the name of a version in vLLM. It never stands for another adapter, since servers cache by name."""
    return f"{version.lineage}-v{version.version}"


def config_of(store: ObjectStore, version: Version) -> dict[str, Any]:
    """Return the adapter's adapter_config.json; raise StoreError if it is damaged."""
    with reading_beside(store, version.adapter_uri, CONFIG_FILE):
        return dict(json.loads(store.get_bytes(f"{version.adapter_uri}/{CONFIG_FILE}")))


def _copy_name(version: Version) -> str:
    """Name of a version's copy in the shared folder. `_remove_copies` keeps the copy of this name."""
    return f"{model_name(version)}-{version.adapter_sha256[:12]}"


def _published(store: ObjectStore, champion: Version, settings: VllmSettings) -> tuple[Path, str]:
    """Copy the adapter to the shared folder if necessary; return the folder, and its path on the server."""
    if settings.adapter_dir is None:
        if isinstance(store, FileStore):
            return store.root / champion.adapter_uri, str(store.root / champion.adapter_uri)
        raise ConfigError(
            f"The adapter is in {store.uri}, which the server does not read; set DEAL_VLLM_ADAPTER_DIR to a folder "
            "that this machine and the server share."
        )
    folder = settings.adapter_dir / _copy_name(champion)
    if not folder.exists():
        _write_folder(store, champion, folder)
    return folder, f"{settings.server_adapter_dir or settings.adapter_dir}/{folder.name}"


def _write_folder(store: ObjectStore, info: Version, target: Path, config: str | None = None) -> bool:
    """Copy the two PEFT files of a version to a new folder, which appears at once and complete.

    `config` replaces the content of adapter_config.json. The result is False if another process was faster.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with (
        borrowed_adapter(store, info) as adapter,
        tempfile.TemporaryDirectory(prefix=".", dir=target.parent) as temporary,
    ):
        part = Path(temporary) / target.name
        part.mkdir()
        for file in PEFT_FILES:
            shutil.copyfile(adapter / file, part / file)
        if config is not None:
            (part / CONFIG_FILE).write_text(config, encoding="utf-8")
        part.chmod(0o755)
        if target.exists():
            return False
        part.rename(target)
        return True


def _remove_copies(folder: Path, lineage: str, current: str) -> None:
    """Remove the lineage's copies except one. Each is renamed first, so no partial copy has a valid name."""
    own = re.compile(rf"\.?{re.escape(lineage)}-v\d+-[0-9a-f]{{12}}")
    for copy in sorted(folder.iterdir()):  # hidden folders of an interrupted call come first
        if own.fullmatch(copy.name) and copy.name != current:
            hidden = copy.with_name(f".{copy.name.removeprefix('.')}")
            copy.rename(hidden)
            shutil.rmtree(hidden)


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
    store = current_store()
    info = find_version(store, lineage, version)
    require_exportable(store, info)
    config = config_of(store, info)
    require_servable(config, settings)
    base = model
    if not base:  # what such a server is given: the base model's Hub id, or its folder on this machine
        recorded = read_record(store, info.adapter_uri).base
        is_on_hub = "/" in recorded.name and not Path(recorded.source).expanduser().exists()
        base = recorded.name if is_on_hub else str(resolve_base(recorded.source, HomeSettings().cache_dir))
    content = json.dumps({**config, "base_model_name_or_path": base}, indent=2, sort_keys=True) + "\n"
    target = folder / model_name(info)
    is_new = not target.exists() and _write_folder(store, info, target, content)
    if not is_new:  # servers that have loaded it would not notice a change, and others would load something else
        with borrowed_adapter(store, info) as adapter:
            wanted = digests_of(adapter, PEFT_FILES) | {CONFIG_FILE: hashlib.sha256(content.encode()).hexdigest()}
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
    return Published(
        lineage=lineage, version=info.version, model=target.name, folder=str(target), base_model=base, is_new=is_new
    )
