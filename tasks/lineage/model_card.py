"""Write the model card of a version from its record: origin, tasks, accuracy and limits."""

from __future__ import annotations

import json

from deal_core.base_model.sources import hub_address
from deal_core.evaluation.answering import ServedTask, ServedVersion
from deal_core.evaluation.interval import score_text
from deal_core.evaluation.metrics import scored_otherwise
from infra.report import page as words
from infra.store.keys import dataset_sha256
from infra.versions import SCORES, Version
from tasks.lineage.record import KnownTask, LineageRecord

NOT_STATED = "not stated by the base model's files; look it up before you pass this on"


def served_version(record: LineageRecord) -> ServedVersion:
    """Return the facts that serving needs without the object store."""
    base = record.base
    return ServedVersion(
        lineage=record.lineage,
        base_source=base.source,
        base_name=base.name,
        base_sha256=base.sha256,
        tasks=tuple(map(served_task, record.tasks)),
        newest_task=record.matrix.trained[-1],
        quantize=base.quantize,
    )


def served_task(known: KnownTask) -> ServedTask:
    """Return the task's part of `served_version`."""
    return ServedTask(
        schema=known.schema, max_prompt_tokens=known.max_prompt_tokens, max_new_tokens=known.max_new_tokens
    )


def example_rows(record: LineageRecord) -> list[dict[str, str]]:
    """Return an invented row for each task. A real row must not leave with the model."""
    text = "The text to answer."
    chat = json.dumps([{"role": "user", "content": text}])
    return [
        {"input": chat if task.schema.format == "chat" else text, "task": task.schema.name} for task in record.tasks
    ]


def write_card(record: LineageRecord, version: Version, licence: str | None, task_type: str) -> str:
    """Return the card as Markdown with the front matter of model hubs.

    `licence` is the base model's licence, or None if its files state none. `task_type` is a field of the adapter's
    configuration.
    """
    base, matrix = record.base, record.matrix
    address = hub_address(base.source)
    front = [f"base_model: {json.dumps(address.repository)}"] if address else []  # a hub shows others as dead links
    front += [f"license: {json.dumps(licence)}"] if licence else []
    place = f'"FOLDER OF {base.name}"'
    if address:
        place = f'"{address.repository}"' + (f', revision="{address.revision}"' if address.revision else "")
    loader = f"AutoModelFor{'Seq2SeqLM' if task_type == 'SEQ_2_SEQ_LM' else 'CausalLM'}"
    verdict = "accepted" if version.accepted else "rejected: " + " ".join(version.reasons)
    metrics = scored_otherwise({task.schema.name: task.schema.metric for task in record.tasks})
    few = [task.schema.name for task in record.tasks if task.num_test < 100]
    data = [
        (
            task.schema.name,
            task.schema.format,
            ", ".join(f"`{dataset_sha256(uri)}`" for uri in task.test_uris),
            str(task.num_test),
        )
        for task in record.tasks
    ]
    names = ("base model", *(f"after {name}" for name in matrix.learned))
    accuracies = [(name, *(score_text(*cell) for cell in row)) for name, row in zip(names, matrix.cells, strict=True)]
    scores = {name.replace("_", " "): getattr(version, name) for name in SCORES}
    lines = [
        "---",
        "library_name: peft",
        *front,
        "tags: [lora, continual-learning]",
        "---",
        "",
        f"# {record.lineage}: {', '.join(task.schema.name for task in record.tasks)}",
        "",
        "```python",
        "# With deal-pipeline, which asks each task as it was trained:",
        f'mlflow.pyfunc.load_model("models:/{record.lineage}@champion").predict([{{"input": "...", "task": "..."}}])',
        "",
        "# With PEFT alone; deal.json says how each task is asked:",
        f"base = transformers.{loader}.from_pretrained({place})",
        'model = peft.PeftModel.from_pretrained(base, "THIS FOLDER")',
        "```",
        "",
        f"A LoRA adapter (PEFT) of **{base.name}**. It learned the task **{version.task}** last, with the strategy "
        f"{version.strategy}, and {version.origin}. Its gate: {verdict}.",
        "",
        "## Base model",
        "",
        f"- name: {base.name}",
        f"- digest of weights, config and tokenizer (sha256): `{base.sha256}`",
        f"- licence: {licence or NOT_STATED}; the adapter alone is of no use without it",
        "",
        "The base model's weights are not part of this folder.",
        "",
        "## Data",
        "",
        *words.markdown_table(("task", "format", "dataset whose test rows judge it (sha256)", "rows that judge"), data),
        "",
        f"Dataset of this version: {version.task}, sha256 `{version.dataset_sha256}`. Settings: sha256 "
        f"`{version.config_sha256}`. Run: `{version.run_key}`.",
        "",
        "## Accuracy",
        "",
        "Share of exact matches in % on the tasks' frozen test rows: a row for each version, a column for each task. "
        "Below 400 rows (n) with the 95 % interval.",
        *([metrics] if metrics else ()),
        "",
        *words.markdown_table(("", *matrix.tasks), accuracies),
        "",
        *(f"- {name}: {100 * value:.1f} points" for name, value in scores.items() if value is not None),
        "",
        "## Limits",
        "",
        "- It was judged only on the tasks above; other abilities of the base model may have changed.",
        "- It answers greedily in the form of each task's rows, even to a text of another kind.",
        *(
            f"- {task.schema.name}: prompts of more than {task.max_prompt_tokens} tokens lose the end of their text, "
            f"answers end after {task.max_new_tokens} tokens."
            for task in record.tasks
        ),
        *([f"- Fewer than 100 test rows judge {', '.join(few)}: the accuracies there are rough."] if few else ()),
        "- It has the biases of the base model and of the data. They were not measured.",
        "",
    ]
    return "\n".join(lines)
