"""What to run: the spec, one YAML file or the same thing as a flow's parameter.

Example:
    >>> read_spec(Path("examples/bank/spec.yaml")).task.name  # doctest: +SKIP
    'bank'
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, get_args, get_type_hints

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from deal_core.config import (
    AdapterConfig,
    DataConfig,
    DealConfig,
    EvaluateConfig,
    GateConfig,
    MethodConfig,
    RehearsalConfig,
    RivalConfig,
    TrainConfig,
)
from deal_core.errors import ConfigError
from deal_core.limits import describe
from deal_core.masking import holds_secret
from deal_core.printable import brief, shorten
from deal_core.yaml_file import read_yaml

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
Name = Annotated[str, Field(pattern=NAME_PATTERN)]
Format = Literal["labelled", "completion", "chat"]
Strategy = Literal["deal", "seq_lora", "inc_lora", "o_lora", "ella", "ewc", "lwf", "replay", "slao"]
DEFAULT_STRATEGY: Strategy = "deal"
MAX_PROBLEMS = 20
"""Of those that a file has; the others are counted."""
Model = TypeVar("Model", bound=BaseModel)


def refuse_secrets(address: str) -> str:
    """Return an address that holds no user, password or token.

    Raises:
        ConfigError: it holds one.
    """
    if holds_secret(address):
        raise ConfigError(
            f"{address!r} holds a user, password or token, which would be kept with every run; leave it out of the "
            "address. Credentials come from the environment: HF_TOKEN for a Hub, DEAL_S3_ACCESS_KEY_ID and "
            "DEAL_S3_SECRET_ACCESS_KEY for the store, DEAL_VLLM_API_KEY for a vLLM server."
        )
    return address


Address = Annotated[str, AfterValidator(refuse_secrets)]
"""A path, a name or an address without a secret in it."""


def _require_utf8(name: str) -> str:
    try:
        name.encode()
    except UnicodeEncodeError:
        raise ValueError("the file's name is not UTF-8; rename the file") from None
    return name


FileAddress = Annotated[Address, AfterValidator(_require_utf8)]


def _one(value: object) -> object:
    if type(value) is not int:  # true and 1.0 are equal to 1
        raise ValueError("give 1")
    return value


SchemaVersion = Annotated[Literal[1], BeforeValidator(_one)]


class TaskFields(BaseModel):
    """What can be said of a task besides its name; None where the lineage or the file itself has to tell."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Format | None = None
    """Kind of rows: (text, label), (prompt, completion) or (messages)."""
    labels: tuple[str, ...] | None = None
    """The answers of a labelled task; None: those of the lineage, else those found in the file."""
    instruction: str | None = None
    """First line of the prompt."""
    template: str | None = None
    """Replaces the built-in prompt layout; fields {instruction}, {options}, {text}."""
    columns: dict[str, str] = {}
    """Canonical column name to the name in the file, where convention does not find it."""

    def given(self) -> dict[str, Any]:
        """The fields that say something, as a dict."""
        fields = self.model_dump(include=set(TaskFields.model_fields))
        return {name: value for name, value in fields.items() if value not in (None, {})}


class TaskSpec(TaskFields):
    """One arrival: the task it belongs to, and its file."""

    name: Name
    data: FileAddress
    """Path or store uri of the file with training rows (and test rows, unless test_data is given)."""
    test_data: FileAddress | None = None
    """Path of a file whose rows are all test rows."""


class LineageSpec(BaseModel):
    """Everything of a run but the arrival: which lineage, learned how, judged by what."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: SchemaVersion = 1
    lineage: Name = "default"
    base_model: Address | None = None
    """Hub id, local folder or GGUF file; None: the lineage's own, else the built-in default."""
    strategy: Strategy | None = None
    """How a task is learned; None: as the lineage's champion was, else `deal`."""
    adapter: AdapterConfig | None = None
    """None: the shape of the lineage's adapter, else the default shape."""
    deal: DealConfig = DealConfig()
    rehearsal: RehearsalConfig = RehearsalConfig()
    rivals: RivalConfig = RivalConfig()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    data: DataConfig = DataConfig()
    gate: GateConfig = GateConfig()

    @property
    def method(self) -> MethodConfig:
        """Settings of the strategies."""
        return MethodConfig(deal=self.deal, rehearsal=self.rehearsal, rivals=self.rivals)

    def with_task(self, task: TaskSpec) -> AdaptSpec:
        """The spec of one arrival in this lineage."""
        shared = {name: getattr(self, name) for name in LineageSpec.model_fields}
        return AdaptSpec(task=task, **shared)


class AdaptSpec(LineageSpec):
    """One adaptation: the flow's parameter."""

    task: TaskSpec

    def resolved(self, folder: Path) -> Self:
        """The same spec with its relative paths taken from `folder`."""
        base = self.base_model and resolve_base(self.base_model, folder)
        return self.with_files_from(folder).model_copy(update={"base_model": base})

    def with_files_from(self, folder: Path) -> Self:
        """The same spec with the relative paths of its arrival taken from `folder`."""
        task = self.task.model_copy(
            update={
                "data": _resolve(self.task.data, folder),
                "test_data": self.task.test_data and _resolve(self.task.test_data, folder),
            }
        )
        return self.model_copy(update={"task": task})

    def config_sha256(self, adapter: AdapterConfig, strategy: str) -> str:
        """Digest of every setting that can change the run's result; where the files lie is none of them.

        Args:
            adapter: the adapter's shape after the lineage's was filled in.
            strategy: the strategy likewise.
        """
        settings = self.model_dump(
            mode="json", exclude={"lineage": True, "base_model": True, "schema_version": True,
                                  "task": {"name", "data", "test_data", "columns"},
                                  "data": {"retain_training_rows", "include_texts"}}
        )
        settings["train"] = self.train.deciding()
        settings |= {"adapter": asdict(adapter), "strategy": strategy}
        return hashlib.sha256(json.dumps(settings, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def resolve_base(base: str, folder: Path) -> str:
    """A base that is a path, made absolute; a name is left as it is.

    Raises:
        ConfigError: it can be no path.
    """
    path = _from(folder, base)
    return str(path) if os.path.exists(path) else base


def _resolve(path: str, folder: Path) -> str:
    return path if "://" in path else str(_from(folder, path))


def _from(folder: Path, path: str) -> Path:
    try:
        return Path(os.path.realpath(folder / os.path.expanduser(path)))
    except ValueError as error:
        raise ConfigError(f"{shorten(path)!r} is not the path of a file: {error}.") from None


def read_spec(path: Path) -> AdaptSpec:
    """Read the spec of one adaptation; relative paths in it are relative to its folder.

    Raises:
        ConfigError: the file is missing, is no YAML mapping, or a key or value does not fit.
    """
    return parse(AdaptSpec, read_yaml(path), str(path)).resolved(Path(os.path.realpath(path)).parent)


def read_lineage_values(path: Path) -> dict[str, Any]:
    """The mapping in a file of a lineage's settings; a relative base model in it is relative to its folder.

    Raises:
        ConfigError: the file is missing or holds something else.
    """
    values = read_yaml(path)
    if isinstance(values.get("base_model"), str):
        values["base_model"] = resolve_base(values["base_model"], Path(os.path.realpath(path)).parent)
    return values


def parse(model: type[Model], values: Mapping[str, Any], origin: str) -> Model:
    """Check `values` against `model`, and say in one line per problem what is wrong.

    Raises:
        ConfigError: with every problem found, its key and the remedy.
    """
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        found = error.errors()
        problems = "; ".join(dict.fromkeys(_describe(problem, model) for problem in found[:MAX_PROBLEMS]))
        more = f"; and {len(found) - MAX_PROBLEMS} more problems" if len(found) > MAX_PROBLEMS else ""
        raise ConfigError(f"{origin}: {problems}{more}") from None


def _describe(problem: Any, model: type[BaseModel]) -> str:
    where = ".".join(shorten(str(part)) for part in problem["loc"]) or "spec"
    if problem["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        known = _known_keys(model, problem["loc"][:-1])
        return f"unknown key '{where}'" + (f" (known: {', '.join(known)})" if known else "; remove it")
    if problem["type"] == "missing":
        return f"key '{where}' is missing; add it"
    if problem["type"] == "string_pattern_mismatch":
        return f"'{where}' is {brief(problem['input'])}; use letters, digits, '.', '_' and '-', at most 64"
    return describe(problem, where).rstrip(".")


def _known_keys(model: type[BaseModel], location: tuple[Any, ...]) -> list[str]:
    """Keys that the part of the spec at `location` may have."""
    current: Any = model
    for part in location:
        annotation = get_type_hints(current).get(part) if isinstance(current, type) else None
        current = next((kind for kind in (annotation, *get_args(annotation)) if isinstance(kind, type)), None)
    if isinstance(current, type) and issubclass(current, BaseModel):
        return list(current.model_fields)
    return [field.name for field in fields(current)] if is_dataclass(current) else []
