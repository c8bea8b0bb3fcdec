"""Export a version: the base model with the adapter merged into it, or the PEFT folder, here or to the Hub.

Before an export counts, it is loaded and asked prompts of its own tasks. Its logits must be those of the version that
is served, computed in the same precision. A merged model is computed and written in fp32: rounding the merged weights
to bf16 would lose much of a small adapter.
"""

from __future__ import annotations

import gc
import json
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel

from deal_core.base_model.sources import HUB_ID, licence_of_base, resolve_base
from deal_core.errors import ConfigError, IntegrityError, RegistryError
from deal_core.evaluation.answering import SERVED_FILE, read_served
from infra.serving.version_files import fetch_version
from infra.settings import HomeSettings
from infra.store.base import ObjectStore, temporary_folder
from infra.versions import Version, Versions, descent
from tasks.base import cached_base, release_base, require_base
from tasks.lineage.frozen_rows import first_rows, load_test_set
from tasks.lineage.history import find_version, rejected_by_person
from tasks.lineage.model_card import NOT_STATED, example_rows, served_task, served_version
from tasks.lineage.record import KnownTask, LineageRecord, read_record
from tasks.lineage.tombstones import TestRowsForgottenError, find_tombstone
from tasks.lineage.version_files import CARD_FILE, borrowed_adapter, reading_beside
from tasks.progress import reporter
from tasks.serving.exports import note_export

if TYPE_CHECKING:
    from torch import Tensor

Target = Literal["merged", "peft", "hub"]
ROWS_PER_TASK = 4
MAX_PROMPTS = 32
TOLERANCE = 1e-3
"""Largest difference of a logit."""
Prompt = tuple[KnownTask, str]
"""A task, and a text that it is asked."""
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")


class Exported(BaseModel, frozen=True):
    """An export, and its comparison with the served version."""

    lineage: str
    version: str
    to: Target
    address: str
    """The folder, or the address of the repository."""
    num_prompts: int
    max_difference: float
    """Largest difference between a logit of the export and of the served version, at the first token of the answer."""
    tolerance: float
    """The largest difference that is allowed."""
    precision: str
    """Type of the base model's weights in the comparison. A merged model has it too."""


def export_version(store: ObjectStore, lineage: str, version: str, to: Target, target: str) -> Exported:
    """Export a version and check what was exported.

    Args:
        store: The store, which has the version.
        lineage: Its lineage.
        version: Its number.
        to: merged: a transformers folder with base model and adapter in one. peft: the PEFT folder with its model card.
            hub: the same as a repository on the Hub. A new repository is made private; one that is there must be
            private.
        target: The new folder, or the repository OWNER/NAME.

    Raises:
        ConfigError: The target is not free, no valid name or a public repository, the base model is quantized, or the
            Hub refuses.
        IntegrityError: The export answers otherwise than the served version; nothing was written.
        RegistryError: The version may not leave: it was rejected, waits for a person, or learned from forgotten rows.
    """
    info = find_version(store, lineage, version)
    require_exportable(store, info)
    record = read_record(store, info)
    if to == "merged" and record.base.quantize != "none":
        raise ConfigError(
            f"Lineage '{info.lineage}' adapts its base model in {record.base.quantize}; a merged model would be "
            "another one than the served version. Export the adapter with --format peft or hub."
        )
    prompts = _prompts(store, record)
    if to == "hub":
        return _export_to_hub(store, info, record, prompts, target)
    return _export_to_folder(store, info, record, prompts, target, _merge if to == "merged" else _write_peft)


def require_exportable(store: ObjectStore, info: Version) -> None:
    """Raise RegistryError for a version that must not be used elsewhere.

    It did not pass its gate, a person rejected it or has not approved it yet, or rows that it learned were forgotten.
    """
    name = f"Version {info.version} of '{info.lineage}'"
    if not info.accepted:
        raise RegistryError(f"{name} did not pass its gate: {' '.join(info.reasons)} It is not exported.")
    if info.approval == "refused":
        raise RegistryError(rejected_by_person(info))
    if info.approval == "awaiting":
        raise RegistryError(
            f"{name} waits for a person's approval; approve it first: deal version promote {info.version} --lineage "
            f"{info.lineage}"
        )
    for version in descent(Versions(store).all(info.lineage), info):
        tombstone = find_tombstone(store, version.task, version.digests)
        if tombstone is not None and f"{version.lineage}/{version.version}" in tombstone.versions:
            learned = "it" if version.version == info.version else f"version {version.version}, which it continues,"
            raise RegistryError(
                f"{name} is not exported: rows of '{version.task}' that {learned} learned were {tombstone.said}, and "
                f"its weights still hold them. Export a version that did not learn them (deal version list --lineage "
                f"{info.lineage})."
            )


def _prompts(store: ObjectStore, record: LineageRecord) -> list[Prompt]:
    """Return texts to compare with: test rows of each task, or an invented text where its rows are gone."""
    examples = {row["task"]: row["input"] for row in example_rows(record)}
    num_rows = max(1, min(ROWS_PER_TASK, MAX_PROMPTS // len(record.tasks)))
    prompts = []
    for task in record.tasks:
        try:
            rows = load_test_set(store, task).rows
            texts: Sequence[str] = first_rows(rows, min(num_rows, len(rows)))["input"]
        except TestRowsForgottenError:
            texts = [served_task(task).readable(examples[task.schema.name], "The example")]
        prompts += [(task, text) for text in texts]
    return prompts


def _export_to_folder(
    store: ObjectStore,
    info: Version,
    record: LineageRecord,
    prompts: Sequence[Prompt],
    address: str,
    write: Callable[[ObjectStore, Version, LineageRecord, Sequence[Prompt], Path, str], Exported],
) -> Exported:
    """Make a new folder, which appears at once and complete."""
    target = Path(address).absolute()  # "." has no name
    part = target.with_name(f".{target.name}.part")
    try:  # before the model is merged, which takes long
        is_there = target.exists() and (not target.is_dir() or any(target.iterdir()) or target.samefile(Path.cwd()))
        if not is_there:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it has a NUL in its name"
        raise ConfigError(f"{target} cannot be made ({reason}); name a new folder that you may write.") from None
    if is_there:
        raise ConfigError(f"{target} is there already; name a new folder.")
    try:
        exported = write(store, info, record, prompts, part, str(target))
        note_export(store, info.lineage, info.version, str(target), part)  # first: no export is unknown
        if target.is_dir():
            target.rmdir()
        part.rename(target)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    return exported


def _merge(
    store: ObjectStore, info: Version, record: LineageRecord, prompts: Sequence[Prompt], folder: Path, address: str
) -> Exported:
    """Write the merged model into a folder, load it again, and compare it."""
    from transformers import AutoTokenizer

    from deal_core.adapter.state import load_adapter
    from deal_core.base_model.load import load_base

    cache = HomeSettings().cache_dir
    release_base()  # only one base model fits
    base = load_base(record.base.source, cache, precision="fp32")
    require_base(record.base, base.sha256)
    model_class, device = type(base.model), base.model.device
    with borrowed_adapter(store, info) as adapter:
        model = load_adapter(base.model, adapter)
        served = _logits(model, base.tokenizer, prompts)
        reporter().said(f"merging version {info.version} into {base.name}")
        merged: Any = model.merge_and_unload(safe_merge=True)
    merged.save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)
    (folder / SERVED_FILE).write_text(json.dumps(served_version(record).to_json(), indent=2), encoding="utf-8")
    del model, merged, base
    gc.collect()
    loaded = model_class.from_pretrained(folder, dtype="float32", trust_remote_code=False).to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    exported = _compared(info, "merged", address, "float32", served, _logits(loaded, tokenizer, prompts))
    licence = licence_of_base(record.base.source, resolve_base(record.base.source, cache))
    (folder / CARD_FILE).write_text(_merged_card(record, info, licence, exported), encoding="utf-8")
    return exported


def _export_to_hub(
    store: ObjectStore, info: Version, record: LineageRecord, prompts: Sequence[Prompt], target: str
) -> Exported:
    """Compare the PEFT folder with the served version, and upload it to a private repository."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    if not REPOSITORY.fullmatch(target):
        raise ConfigError(f"{target!r} is not the name of a repository of the Hub; give OWNER/NAME.")
    with temporary_folder() as temporary:
        folder = temporary / "version"
        exported = _write_peft(store, info, record, prompts, folder, target).model_copy(update={"to": "hub"})
        api = HfApi()
        try:
            url = api.create_repo(target, private=True, exist_ok=True)
            if not api.repo_info(target).private:  # it was there before
                raise ConfigError(
                    f"{target} is a public repository of the Hub: everyone could read the adapter. Make it private in "
                    "its settings on the Hub, or name another one. Nothing was uploaded."
                )
            message = f"{info.lineage}, version {info.version}"
            note_export(store, info.lineage, info.version, str(url))
            api.upload_folder(repo_id=target, folder_path=folder, commit_message=message)
        except (HfHubHTTPError, OfflineModeIsEnabled, OSError) as error:  # OSError: the Hub does not answer
            reason = " ".join(str(error).split("\n")[0].split()).rstrip(".")
            raise ConfigError(
                f"{target} could not be written on the Hub ({reason}). The token of HF_TOKEN must be allowed to write "
                "there."
            ) from None
    return exported.model_copy(update={"address": str(url)})


def _write_peft(
    store: ObjectStore, info: Version, record: LineageRecord, prompts: Sequence[Prompt], folder: Path, address: str
) -> Exported:
    """Write the PEFT folder, load it with PEFT alone, and compare it."""
    from peft import PeftModel

    from deal_core.adapter.state import adapter_on

    peft_folder(store, info, folder)
    base = cached_base(record.base)
    with borrowed_adapter(store, info) as adapter, adapter_on(base.model, adapter) as model:
        served = _logits(model, base.tokenizer, prompts)
    plain = PeftModel.from_pretrained(base.model, folder)
    try:
        logits = _logits(plain, base.tokenizer, prompts)
    finally:
        plain.unload()
    return _compared(info, "peft", address, str(base.model.dtype).removeprefix("torch."), served, logits)


def peft_folder(store: ObjectStore, info: Version, folder: Path) -> None:
    """Fetch a version for other programs: the PEFT files, the model card, and how each task is asked. No rows.

    Where the base model's source is a path of this machine, deal.json has the base model's name instead.

    Raises:
        IntegrityError: A file differs from the recorded one.
        ObjectNotFoundError: The model card is missing.
    """
    fetch_version(store, info, folder)
    with reading_beside(store, info.adapter_uri, CARD_FILE):
        store.download_file(f"{info.adapter_uri}/{CARD_FILE}", folder / CARD_FILE)
    served = read_served(folder)
    if not HUB_ID.fullmatch(served.base_source):
        served = replace(served, base_source=served.base_name)
        (folder / SERVED_FILE).write_text(json.dumps(served.to_json(), indent=2), encoding="utf-8")


def _logits(model: Any, tokenizer: Any, prompts: Sequence[Prompt]) -> list[Tensor]:
    """Return the logits of the first answer token of each prompt, each of shape (vocabulary,)."""
    from deal_core.evaluation.generation import first_answer_logits

    return [
        first_answer_logits(model, tokenizer, task.schema, text, max_prompt_tokens=task.max_prompt_tokens)
        for task, text in prompts
    ]


def _compared(
    info: Version, to: Target, address: str, precision: str, served: list[Tensor], exported: list[Tensor]
) -> Exported:
    import torch

    largest = float((torch.stack(served) - torch.stack(exported)).abs().max())  # NaN if one of them is NaN
    if not largest <= TOLERANCE:
        raise IntegrityError(
            f"The export of version {info.version} of '{info.lineage}' answers otherwise than the served version: a "
            f"logit differs by {largest:.3g} in {precision}, and {TOLERANCE:g} is allowed. Nothing was exported."
        )
    return Exported(
        lineage=info.lineage,
        version=info.version,
        to=to,
        address=address,
        num_prompts=len(served),
        max_difference=largest,
        tolerance=TOLERANCE,
        precision=precision,
    )


def _merged_card(record: LineageRecord, info: Version, licence: str | None, exported: Exported) -> str:
    tasks = ", ".join(task.schema.name for task in record.tasks)
    lines = [
        "---",
        "library_name: transformers",
        *([f"license: {json.dumps(licence)}"] if licence else []),
        "---",
        f"# {info.lineage}, version {info.version}: {tasks}",
        "",
        f"{record.base.name} with the LoRA adapter of version {info.version} merged into its weights. The file "
        "`deal.json` has the prompt of each task.",
        "",
        f"- base model: {record.base.name}, sha256 `{record.base.sha256}`",
        f"- licence of the base model: {licence or NOT_STATED}",
        f"- adapter: sha256 `{info.adapter_sha256}`",
        f"- logits against the served version: {exported.max_difference:.3g} at most on {exported.num_prompts} prompts "
        f"of its tasks, in {exported.precision}",
        "",
    ]
    return "\n".join(lines)
