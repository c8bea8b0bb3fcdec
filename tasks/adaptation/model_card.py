"""The model card of a version, written from its record: what it is, what it learned, how well, and its limits."""

from __future__ import annotations

import json
from collections.abc import Sequence

from deal_core.data.schema import TaskSchema
from deal_core.evaluation.answering import ServedTask, ServedVersion
from infra.report import formatting as words
from infra.store.keys import dataset_sha256
from infra.tracking.registry import VersionFacts
from tasks.lineage.record import KnownTask, LineageRecord

NOT_STATED = "not stated by the base model's files; look it up before you pass this on"


def served_version(record: LineageRecord) -> ServedVersion:
    """What lies beside the adapter so that it can be served without the object store."""
    return ServedVersion(
        lineage=record.lineage,
        base_source=record.base.source,
        base_name=record.base.name,
        base_sha256=record.base.sha256,
        tasks=tuple(map(served_task, record.tasks)),
        newest_task=record.matrix.trained[-1],
    )


def served_task(known: KnownTask) -> ServedTask:
    """How a task is asked, as it lies beside the adapter."""
    return ServedTask(
        schema=known.schema, max_prompt_tokens=known.max_prompt_tokens, max_new_tokens=known.max_new_tokens
    )


def example_rows(record: LineageRecord) -> list[dict[str, str]]:
    """A row to try each task with; never one that was learned, since a model card is passed around."""
    return [{"input": _example(known.schema), "task": known.schema.name} for known in record.tasks]


def write_card(record: LineageRecord, facts: VersionFacts, licence: str | None, task_type: str) -> str:
    """The card as Markdown with the front matter that model hubs read.

    Args:
        record: the lineage at this version.
        facts: what is registered of the version.
        licence: the base model's; None where nothing states it.
        task_type: as the adapter's configuration says it.
    """
    base = record.base
    loader = f"AutoModelFor{'Seq2SeqLM' if task_type == 'SEQ_2_SEQ_LM' else 'CausalLM'}"
    origin = f"continues version {facts.parent_version}" if facts.parent_version else "starts from the base model"
    verdict = "accepted" if facts.accepted else "rejected: " + " ".join(facts.reasons)
    lines = [
        *_front_matter(record, licence), "",
        f"# {record.lineage}: {', '.join(known.schema.name for known in record.tasks)}", "",
        f"A LoRA adapter (PEFT) of **{base.name}**. It learned the task **{facts.task}** last, with the strategy "
        f"{facts.strategy}, and {origin}. Its gate: {verdict}.", "",
        "## Base model", "",
        f"- name: {base.name}",
        f"- digest of weights, config and tokenizer (sha256): `{base.sha256}`",
        f"- licence: {licence or NOT_STATED}; the adapter alone is of no use without it",
        "", "The base model's weights are not part of this folder.", "",
        "## Data", "",
        *words.markdown_table(("task", "format", "dataset whose test rows judge it (sha256)", "test rows"),
                [_data_row(known) for known in record.tasks]), "",
        f"Dataset of this version: {facts.task}, sha256 `{facts.dataset_sha256}`. Settings: sha256 "
        f"`{facts.config_sha256}`. Run: `{facts.run_key}`.", "",
        "## Accuracy", "",
        "Share of exact matches in % on the tasks' frozen test rows: a row for each version, a column for each task.",
        "", *_matrix(record), "", *_scores(facts), "",
        "## Limits", "", *_limits(record), "",
        "## Use", "",
        "With PEFT alone:", "",
        "```python",
        "from peft import PeftModel",
        f"from transformers import {loader}",
        f'base = {loader}.from_pretrained("{_loadable(record)}")',
        'model = PeftModel.from_pretrained(base, "THIS FOLDER")',
        "```", "",
        "As a server, with MLflow and deal-pipeline installed: "
        f"`mlflow models serve -m models:/{record.lineage}@champion --env-manager local`", "",
    ]  # fmt: skip
    return "\n".join(lines)


def _front_matter(record: LineageRecord, licence: str | None) -> list[str]:
    lines = ["---", "library_name: peft"]
    if "/" in record.base.name:  # a Hub id; other names would be dead links there
        lines.append(f"base_model: {json.dumps(record.base.name)}")
    lines += [f"license: {json.dumps(licence)}"] if licence else []
    return [*lines, "tags: [lora, continual-learning]", "---"]


def _data_row(known: KnownTask) -> Sequence[str]:
    return known.schema.name, known.schema.format, f"`{dataset_sha256(known.dataset_uri)}`", str(known.num_test)


def _matrix(record: LineageRecord) -> list[str]:
    matrix = record.matrix
    rows = [("base model", *map(words.percent, matrix.base))]
    rows += [(f"after {task}", *map(words.percent, row)) for task, row in zip(matrix.trained, matrix.rows, strict=True)]
    return words.markdown_table(("", *matrix.tasks), rows)


def _scores(facts: VersionFacts) -> list[str]:
    named = {
        "average accuracy": facts.average_accuracy, "forgetting": facts.forgetting,
        "backward transfer": facts.backward_transfer, "forward transfer": facts.forward_transfer,
    }  # fmt: skip
    return [f"- {name}: {100 * value:.1f} points" for name, value in named.items() if value is not None]


def _limits(record: LineageRecord) -> list[str]:
    few = [known.schema.name for known in record.tasks if known.num_test < 100]
    lines = [
        "- It was judged on the tasks above and nothing else; what else the base model could do may have changed.",
        "- It answers greedily in the form of each task's rows; a text of another kind gets such an answer too.",
        *(f"- {known.schema.name}: prompts of more than {known.max_prompt_tokens} tokens lose the end of their text, "
          f"answers end after {known.max_new_tokens} tokens." for known in record.tasks),
    ]  # fmt: skip
    if few:
        lines.append(f"- Fewer than 100 test rows judge {', '.join(few)}: the accuracies there are rough.")
    return [*lines, "- Biases of the base model and of the data are still in it; nobody has looked for them."]


def _loadable(record: LineageRecord) -> str:
    """What transformers can load the base model by, as far as it has a name that means something elsewhere."""
    return record.base.name if "/" in record.base.name else f"FOLDER OF {record.base.name}"


def _example(schema: TaskSchema) -> str:
    text = "The text to answer."
    return json.dumps([{"role": "user", "content": text}]) if schema.format == "chat" else text
