"""The spec of an adaptation: a YAML file or the parameter of a flow.

Example:
    >>> read_spec(Path("examples/bank/spec.yaml")).task.name  # doctest: +SKIP
    'bank'
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, get_args, get_type_hints

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    model_validator,
)

from deal_core.config import AdapterConfig, DataConfig, EvaluateConfig, TrainConfig, check_metric
from deal_core.data.schema import AssistantTurns, Format, PromptForm
from deal_core.errors import ConfigError, DataValidationError
from deal_core.judging_config import GateConfig, MonitorConfig
from deal_core.limits import describe
from deal_core.method_config import (
    DealConfig,
    MethodConfig,
    RehearsalConfig,
    SelectionConfig,
)
from deal_core.safe_text import brief, holds_secret, shorten
from deal_core.selection import check_score
from deal_core.strategies import PLUGINS, strategy_class
from deal_core.yaml_file import read_yaml

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
Name = Annotated[str, Field(pattern=NAME_PATTERN)]
Strategy = Annotated[
    str,
    AfterValidator(lambda name: PLUGINS.entry(name).name),
    Field(json_schema_extra=lambda schema: schema.update(enum=[*PLUGINS.find()])),
]
"""The name of one of this project's strategies, or of an installed package's."""
DEFAULT_STRATEGY = "deal"
SPEC_SCHEMA = Path(__file__).with_name("spec.schema.json")
"""The JSON schema of a spec, for editors. `make schema` writes it."""
MAX_PROBLEMS = 15
"""Problems of a file that a message lists; further problems are only counted."""
Model = TypeVar("Model", bound=BaseModel)
AZURE_CONTAINER = re.compile(r"^(abfss?://)[^/@:]+@")
"""In an address of Azure the part before the @ is a container, not a user."""


def refuse_secrets(address: str) -> str:
    """Return the address.

    Raises:
        ConfigError: The address contains a user, password or token.
    """
    if holds_secret(AZURE_CONTAINER.sub(r"\1", address)):
        raise ConfigError(
            f"{address!r} contains a user, password or token, and every run would store it; remove it from the "
            "address. Credentials come from the environment: HF_TOKEN for a Hub, DEAL_S3_ACCESS_KEY_ID and "
            "DEAL_S3_SECRET_ACCESS_KEY for the store, DEAL_ENGINE_API_KEY for a vLLM server."
        )
    return address


Address = Annotated[str, AfterValidator(refuse_secrets)]
"""A path, a name or an address without a secret."""


def _require_utf8(name: str) -> str:
    try:
        name.encode()
    except UnicodeEncodeError:
        raise ValueError("the file's name is not UTF-8; rename the file") from None
    return name


FileAddress = Annotated[Address, AfterValidator(_require_utf8)]
_ONE, _SEVERAL = "a file", "a list of files"
FileAddresses = Annotated[
    Annotated[FileAddress, Tag(_ONE)] | Annotated[tuple[FileAddress, ...], Field(min_length=1), Tag(_SEVERAL)],
    Discriminator(lambda files: _SEVERAL if isinstance(files, list | tuple) else _ONE),
]
"""A file, a folder or a pattern; or several of them, which are one arrival."""


def _require_int(value: object) -> object:
    if type(value) is not int:  # true and 1.0 equal 1
        raise ValueError("give 1")
    return value


SchemaVersion = Annotated[Literal[1], BeforeValidator(_require_int)]
_LIST, _MAPPING = "labels as a list", "labels as a mapping"
Labels = Annotated[
    Annotated[tuple[str, ...], Tag(_LIST)] | Annotated[dict[str, str], Tag(_MAPPING)],
    Discriminator(lambda labels: _MAPPING if isinstance(labels, Mapping) else _LIST),
]


class TaskFields(BaseModel, frozen=True, extra="forbid"):
    """The settings of a task without its name. None: the lineage or the file decides."""

    format: Format | None = None
    """Columns of a row: (text, label), (prompt, completion) or (messages)."""
    labels: Labels | None = None
    """The answers of a labelled task, or a mapping from the file's numbers or codes to the answers; None: the lineage's
    labels, or else the labels in the file."""
    instruction: str | None = None
    """First line of the prompt."""
    template: str | None = None
    """Replaces the built-in layout of prompts; fields {instruction}, {options}, {text}."""
    prompt: PromptForm | None = None
    """Form of a prompt. chat: the text under the instruction is a user's message in the base model's chat template.
    None: the lineage's form; plain for a new task."""
    metric: Annotated[str, AfterValidator(check_metric)] | None = None
    """How an answer is scored: exact, contains, rouge_l, json_fields, loss, preference, or module:function. None: the
    lineage's metric; for a new task exact if it has labels, preference if it has chosen and rejected answers, else
    rouge_l."""
    columns: dict[str, str] = {}
    """Canonical column name to the name in the file, for columns with unusual names."""
    assistant_turns: AssistantTurns | None = None
    """The assistant's turns of a training chat that are learned; None: those that the lineage's task learns, or else
    all."""

    def given(self) -> dict[str, Any]:
        """Return the fields that were given."""
        fields = self.model_dump(include=set(TaskFields.model_fields))
        return {name: value for name, value in fields.items() if value not in (None, {})}


class TaskSpec(TaskFields):
    """One arrival: its task and its files."""

    name: Name
    """Name of the task."""
    data: FileAddresses
    """Path or store uri of the training rows, and of the test rows unless test_data is given: a file, a folder, or a
    pattern such as may/*.csv; or a list of them. All files have one format and are one arrival."""
    test_data: FileAddresses | None = None
    """As `data`, for test rows only."""


class LineageSpec(BaseModel, frozen=True, extra="forbid"):
    """The settings of a run without its arrival."""

    schema_version: SchemaVersion = 1
    """Version of the file's format."""
    lineage: Name = "default"
    """Name of the lineage. A command without it takes DEAL_LINEAGE, or else the only lineage of the home."""
    base_model: Address | None = None
    """Hub id, local folder or GGUF file; None: the lineage's base model, or else the built-in default."""
    strategy: Strategy | None = None
    """None: the strategy of the lineage's champion, or else `deal`."""
    adapter: AdapterConfig | None = None
    """None: the shape of the lineage's adapter, or else the default shape."""
    deal: DealConfig = DealConfig()
    rehearsal: RehearsalConfig = RehearsalConfig()
    strategy_options: dict[str, Any] = {}
    """Settings of a strategy of another package, by name. The strategy checks them. Those of `deal` and `replay` have
    sections of their own."""
    selection: SelectionConfig = SelectionConfig()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    data: DataConfig = DataConfig()
    gate: GateConfig = GateConfig()
    monitor: MonitorConfig = MonitorConfig()

    @property
    def method(self) -> MethodConfig:
        """Settings of the strategies."""
        return MethodConfig(
            deal=self.deal,
            rehearsal=self.rehearsal,
            selection=self.selection,
            strategy_options=self.strategy_options,
        )

    @model_validator(mode="after")
    def _check_parts(self) -> Self:
        check_score(self.selection)
        if self.strategy and self.strategy_options:  # without a strategy it is the lineage's, which is not known here
            strategy_class(self.strategy).options_of(self.method)
        return self

    def with_task(self, task: TaskSpec) -> AdaptSpec:
        """Return the spec of one arrival in this lineage."""
        shared = {name: getattr(self, name) for name in LineageSpec.model_fields}
        return AdaptSpec(task=task, **shared)


class AdaptSpec(LineageSpec):
    """The spec of one adaptation."""

    task: TaskSpec

    def with_files_from(self, folder: Path) -> Self:
        """Return the spec with the relative paths of its arrival resolved against `folder`."""
        files = {"data": self.task.data, "test_data": self.task.test_data}
        resolved = {name: paths and _resolve(paths, folder) for name, paths in files.items()}
        return self.model_copy(update={"task": self.task.model_copy(update=resolved)})

    def config_sha256(self, adapter: AdapterConfig, strategy: str) -> str:
        """Return the digest of every setting that can change the run's result. The paths of the files do not count.

        `adapter` and `strategy` have the lineage's values where the spec has none.
        """
        settings = self.model_dump(
            mode="json",
            exclude={
                "lineage": True,
                "base_model": True,
                "schema_version": True,
                "monitor": True,
                "task": {"name", "data", "test_data", "columns"},
                "data": {"retain_training_rows", "include_texts"},
                "gate": {"arrival", "arrival_drop_points", "rollout", "rollout_share", "rollout_rows"},
            },
        )
        settings |= {"train": self.train.deciding()}
        if self.gate.max_total_drop_points is None:  # the digests of runs before there was a budget stay
            del settings["gate"]["max_total_drop_points"]
        if not self.selection.is_on:  # its other settings change nothing then
            del settings["selection"]
        settings |= {"adapter": asdict(adapter), "strategy": strategy}
        return hashlib.sha256(json.dumps(settings, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def resolve_base(base: str, folder: Path) -> str:
    """Make a base model's path absolute. A name that is not a path stays as it is.

    Raises:
        ConfigError: The text contains characters that no path may contain.
    """
    path = _from(folder, base)
    return str(path) if os.path.exists(path) else base


def _resolve(paths: str | tuple[str, ...], folder: Path) -> str | tuple[str, ...]:
    if not isinstance(paths, str):
        return tuple(str(_resolve(path, folder)) for path in paths)
    return paths if "://" in paths else str(_from(folder, paths))


def _from(folder: Path, path: str) -> Path:
    try:
        return Path(os.path.realpath(folder / os.path.expanduser(path)))
    except ValueError as error:
        raise ConfigError(f"{shorten(path)!r} is not the path of a file: {error}.") from None


class TaskFieldsError(ConfigError, DataValidationError):
    """A setting of an arrival's task is not valid, or contradicts the lineage."""

    code = "task-fields"


@contextmanager
def reading_the_task() -> Iterator[None]:
    """Turn a ConfigError in the block into a TaskFieldsError, which a later try cannot cure."""
    try:
        yield
    except ConfigError as error:
        raise TaskFieldsError(str(error)) from None


def read_spec(path: Path) -> AdaptSpec:
    """Read the spec of one adaptation. Relative paths in the file are relative to its folder.

    Raises:
        ConfigError: The file is missing or is not a YAML mapping, or a key or a value is not valid.
    """
    spec = parse(AdaptSpec, read_lineage_values(path), str(path))
    return spec.with_files_from(Path(os.path.realpath(path)).parent)


def read_lineage_values(path: Path) -> dict[str, Any]:
    """Read the settings of a lineage. A relative path of a base model is relative to the file's folder.

    Raises:
        ConfigError: The file is missing or is not a YAML mapping.
    """
    values = read_yaml(path)
    if isinstance(values.get("base_model"), str):
        values["base_model"] = resolve_base(values["base_model"], Path(os.path.realpath(path)).parent)
    return values


def parse(model: type[Model], values: Mapping[str, Any], origin: str) -> Model:
    """Make a `model` of the values. `origin` names their source in messages.

    Raises:
        ConfigError: A value is not valid. The message lists every problem with its key and the remedy.
    """
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        problems = error.errors()
        codes = {getattr(problem.get("ctx", {}).get("error"), "code", ConfigError.code) for problem in problems}
        shown = "; ".join(dict.fromkeys(_describe(problem, model) for problem in problems[:MAX_PROBLEMS]))
        more = f"; and {len(problems) - MAX_PROBLEMS} more problems" if len(problems) > MAX_PROBLEMS else ""
        raise ConfigError(f"{origin}: {shown}{more}", code=codes.pop() if len(codes) == 1 else None) from None


def _describe(problem: Any, model: type[BaseModel]) -> str:
    location = [part for part in problem["loc"] if part not in (_LIST, _MAPPING)]
    where = ".".join(shorten(str(part)) for part in location) or "spec"
    if problem["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        if where == "memory":  # of earlier releases
            return (
                f"'{where}' is no setting any more: set rehearsal.rows, the training rows that are kept of each task "
                "(0 keeps none), and rehearsal.per_step"
            )
        known = _known_keys(model, problem["loc"][:-1])
        places = [f"'{part}.{where}'" for part in known if len(location) == 1 and where in _known_keys(model, (part,))]
        if places:
            return f"unknown key '{where}'; write it as {' or '.join(places)}"
        return f"unknown key '{where}'; remove it" + (f", or give one of {', '.join(known)}" if known else "")
    if problem["type"] == "missing":
        return f"key '{where}' is missing; add it"
    if problem["type"] == "string_pattern_mismatch":
        return f"'{where}' is {brief(problem['input'])}; use letters, digits, '.', '_' and '-', at most 64"
    return describe(problem, where).rstrip(".")


def _known_keys(model: type[BaseModel], location: tuple[Any, ...]) -> list[str]:
    """The keys that are allowed in the part of the spec at `location`."""
    current: Any = model
    for part in location:
        annotation = get_type_hints(current).get(part) if isinstance(current, type) else None
        current = next((kind for kind in (annotation, *get_args(annotation)) if isinstance(kind, type)), None)
    if isinstance(current, type) and issubclass(current, BaseModel):
        return list(current.model_fields)
    return [field.name for field in fields(current)] if is_dataclass(current) else []
