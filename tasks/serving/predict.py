"""Answer one text with a version of a lineage."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from deal_core.adapter.state import adapter_on
from deal_core.base_model.sources import resolve_base
from deal_core.config import EvaluateConfig
from deal_core.data.prompts import render_prompt
from deal_core.errors import ConfigError
from deal_core.evaluation.score import first_answer_logits, generate_answers
from infra.settings import HomeSettings
from infra.tracking.registry import VersionInfo, open_registry, require_through_gate
from tasks.adaptation.model_card import served_task
from tasks.base import lend_base
from tasks.context import current_store
from tasks.lineage.adapters import borrowed_adapter
from tasks.lineage.history import find_version
from tasks.lineage.record import KnownTask, LineageRecord, read_record

NUM_TOKENS = 5


class Answer(BaseModel):
    """A text and its answer."""

    model_config = ConfigDict(frozen=True)

    answer: str
    first_token_logits: dict[str, float]
    """The likeliest first tokens of the answer and their logits: what a plain PEFT load must give too."""
    prompt: str
    """What the model was asked, the text in its task's template."""
    base_model: str
    """Folder or Hub id that the base model was loaded from."""
    adapter: str
    """Address of the version's PEFT folder."""
    precision: str
    """Type of the base model's weights, such as bfloat16."""
    task: str
    lineage: str
    version: str


def predict(text: str, *, lineage: str, task: str | None, version: str | None) -> Answer:
    """Answer a text as the task's rows are answered.

    Args:
        text: the text; for a chat task the JSON list of messages.
        lineage: whose adapter answers.
        task: whose prompt is used; None: that of the task learned last.
        version: number of the version; None: the champion.

    Raises:
        ConfigError: the lineage does not know the task, or the text is none that it can be asked with.
        IntegrityError: the version's adapter is damaged.
        RegistryError: the lineage has no such version, or no champion that may serve.
    """
    store = current_store()
    info = choose_version(lineage, version)
    record = read_record(store, info.adapter_uri)
    known = choose_task(record, task)
    text = served_task(known).readable(text, "The question")
    base = lend_base(record.base)
    with borrowed_adapter(store, info) as folder, adapter_on(base.model, folder) as model:
        limit = known.max_prompt_tokens
        answers = generate_answers(
            model, base.tokenizer, known.schema, [text], EvaluateConfig(max_new_tokens=known.max_new_tokens),
            max_prompt_tokens=limit,
        )
        logits = first_answer_logits(model, base.tokenizer, known.schema, text, max_prompt_tokens=limit)
    likeliest = logits.topk(NUM_TOKENS)
    tokens = (base.tokenizer.decode([index]) for index in likeliest.indices.tolist())
    return Answer(
        answer=answers[0],
        prompt="".join(render_prompt(known.schema, text, base.tokenizer)),
        base_model=str(resolve_base(record.base.source, HomeSettings().cache_dir)),
        adapter=store.uri_of(info.adapter_uri),
        precision=str(base.model.dtype).removeprefix("torch."),
        first_token_logits=dict(zip(tokens, likeliest.values.tolist(), strict=True)),
        task=known.schema.name,
        lineage=lineage,
        version=info.version,
    )


def choose_version(lineage: str, number: str | None) -> VersionInfo:
    """The version of that number; None: the champion.

    Raises:
        RegistryError: there is none, or the alias champion was moved by hand to one that did not come through its gate.
    """
    info = find_version(open_registry(), lineage, number)
    if number is None:
        require_through_gate(info)
    return info


def choose_task(record: LineageRecord, name: str | None) -> KnownTask:
    """The task of that name; None: the one learned last.

    Raises:
        ConfigError: the lineage does not know it.
    """
    name = record.matrix.trained[-1] if name is None else name
    known = record.task(name)
    if known is None:
        names = ", ".join(task.schema.name for task in record.tasks)
        raise ConfigError(f"Lineage '{record.lineage}' knows no task '{name}'; it knows {names}.")
    return known
