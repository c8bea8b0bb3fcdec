"""Rows answered per second by our evaluation, against plain loops over Transformers' generate on the same adapter.

    python -m benchmarks.speed.evaluation

An adapter learns two of the examples first. With --texts it learns the one whose answers are sentences. So answers end
as a trained model's do. Then all their rows are answered by each variant in turn, in random order. The loops run on a
base model as Transformers loads it, with the same prompts and the same limit of new tokens. `first_token_only` is our
evaluation ended after the reading of the prompts: no way of choosing among labels by their likelihood can be faster,
since each has to read the prompts.
"""

from __future__ import annotations

import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from datasets import Dataset, disable_progress_bars
from peft import PeftModel
from transformers import AutoModelForCausalLM

from benchmarks.method.versions import train_into
from benchmarks.output import RESULTS, Base, write_result
from benchmarks.tiny_base import EXAMPLES
from deal_core.adapter.state import load_adapter
from deal_core.base_model.load import BaseModel, load_base
from deal_core.base_model.sources import DEFAULT_BASE, resolve_base
from deal_core.config import AdapterConfig, TrainConfig
from deal_core.data.prompts import encode_prompt
from deal_core.data.schema import TaskSchema
from deal_core.evaluation.answering import ServedTask
from deal_core.evaluation.generation import answer_inputs, answer_limit
from deal_core.method_config import MethodConfig
from deal_core.training.train import TrainingSetup
from infra.settings import HomeSettings

MAX_NEW_TOKENS = 50
MAX_PROMPT_TOKENS = 512
BANK, PARCELS = EXAMPLES / "bank", EXAMPLES / "parcels"
LABELS = {"bank": (BANK / "train.jsonl", BANK / "test.jsonl"), "parcels": (PARCELS / "messages.jsonl",)}
TEXTS = {"repairs": (Path(__file__).parents[2] / "examples" / "repairs" / "messages.jsonl",)}
TOPIC = "What is the topic of the following message? Choose one from the option."
WORK_ORDER = "Write the work order for this message."
LOOPS = {"loop_batch_1": 1, "loop_batch_16": 16}
"""Variant → rows of its batches."""
Task = tuple[TaskSchema, Dataset]


def read_tasks(*, texts: bool) -> list[Task]:
    """The examples' rows, columns input and output."""
    tasks = []
    for name, files in (TEXTS if texts else LABELS).items():
        lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
        if texts:
            rows = [{"input": row["message"], "output": row["work_order"]} for row in lines]
            task = TaskSchema(name=name, instruction=WORK_ORDER)
        else:
            rows = [{"input": row["text"], "output": row["label"]} for row in lines]
            task = TaskSchema(name=name, labels=tuple(sorted({row["output"] for row in rows})), instruction=TOPIC)
        tasks.append((task, Dataset.from_list(rows)))
    return tasks


def learn(base: BaseModel, tasks: Sequence[Task], steps: int, folder: Path) -> None:
    """Train one adapter on all tasks."""
    (task, rows), *others = tasks
    setup = TrainingSetup(
        task=task,
        strategy="seq_lora",
        adapter=AdapterConfig(),
        method=MethodConfig(),
        train=TrainConfig(max_steps=steps, checkpoint_steps=0),
    )
    train_into(folder, base, rows, setup, joined=others)


@torch.inference_mode()
def answer_in_a_loop(model: PeftModel, base: BaseModel, tasks: Sequence[Task], batch_size: int) -> list[str]:
    """Generate as one does without further thought: rows in their order, a batch padded to its longest."""
    answers = []
    for task, rows in tasks:
        limit = answer_limit(base.tokenizer, task, MAX_NEW_TOKENS)
        prompts = [encode_prompt(base.tokenizer, task, text, MAX_PROMPT_TOKENS) for text in rows["input"]]
        for start in range(0, len(prompts), batch_size):
            batch = base.tokenizer.pad(
                {"input_ids": prompts[start : start + batch_size]}, padding_side="left", return_tensors="pt"
            ).to(model.device)
            tokens = model.generate(
                **batch, max_new_tokens=limit, do_sample=False, pad_token_id=base.tokenizer.pad_token_id
            )
            texts = base.tokenizer.batch_decode(tokens[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
            answers += [text.strip() for text in texts]
    return answers


def answer_as_evaluated(model: PeftModel, base: BaseModel, tasks: Sequence[Task], max_new_tokens: int) -> list[str]:
    """Generate as an adaptation's evaluation does."""
    answers = []
    for task, rows in tasks:
        asked = ServedTask(schema=task, max_prompt_tokens=MAX_PROMPT_TOKENS, max_new_tokens=max_new_tokens)
        answers += [answer.text for answer in answer_inputs(model, base.tokenizer, asked, rows["input"])]
    return answers


def main(
    base: Base = DEFAULT_BASE,
    steps: Annotated[int, typer.Option(help="Steps that the adapter learns.")] = 60,
    precision: Annotated[str, typer.Option(help="Of the base model: auto, bf16 or fp32.")] = "auto",
    texts: Annotated[bool, typer.Option("--texts", help="Answers are sentences, not labels.")] = False,
    measurements: Annotated[int, typer.Option(help="Measurements of each variant.")] = 5,
    out: Annotated[
        Path | None, typer.Option(help="Where the figures go.", show_default="evaluation.json, _texts or _fp32")
    ] = None,
) -> None:
    """Print and write rows per second of each variant, the ratios, and the share of identical answers."""
    disable_progress_bars()
    tasks = read_tasks(texts=texts)
    references = [output for _, rows in tasks for output in rows["output"]]
    with tempfile.TemporaryDirectory(prefix="deal-evaluation-") as work:
        ours = load_base(base, HomeSettings().cache_dir, precision=precision)  # type: ignore[arg-type]
        learn(ours, tasks, steps, Path(work))
        model = load_adapter(ours.model, Path(work), is_trainable=False)
        stock = AutoModelForCausalLM.from_pretrained(
            resolve_base(base, HomeSettings().cache_dir), dtype=ours.model.dtype, trust_remote_code=False
        )
        plain = load_adapter(stock, Path(work), is_trainable=False)
    variants: dict[str, Callable[[], list[str]]] = {
        "deal": lambda: answer_as_evaluated(model, ours, tasks, MAX_NEW_TOKENS),
        "first_token_only": lambda: answer_as_evaluated(model, ours, tasks, 1),
        **{name: partial(answer_in_a_loop, plain, ours, tasks, size) for name, size in LOOPS.items()},
    }
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    answers: dict[str, list[str]] = {}
    order = random.Random(0)
    for _ in range(measurements):
        for name in order.sample(list(variants), len(variants)):
            started = time.perf_counter()
            answers[name] = variants[name]()
            seconds[name].append(time.perf_counter() - started)
    best = min(LOOPS, key=lambda name: statistics.median(seconds[name]))

    def times(slower: str, faster: str) -> float:
        return statistics.median(a / b for a, b in zip(seconds[slower], seconds[faster], strict=True))

    def share(answered: Sequence[str], wanted: Sequence[str]) -> float:
        return sum(a == b for a, b in zip(answered, wanted, strict=True)) / len(wanted)

    kind = "_texts" if texts else "_fp32" if precision == "fp32" else ""
    write_result(
        out or RESULTS / f"evaluation{kind}.json",
        {
            "base": base,
            "precision": str(ours.model.dtype),
            "num_rows": len(references),
            "num_measurements": measurements,
            "median_rows_per_second": {
                name: len(references) / statistics.median(found) for name, found in seconds.items()
            },
            "best_loop": best,
            "times_best_loop": times(best, "deal"),
            "identical_answers": {name: share(answers["deal"], answers[name]) for name in LOOPS},
            "accuracy": {name: share(answers[name], references) for name in variants if name != "first_token_only"},
            "label_scoring_at_most_times": times("deal", "first_token_only"),
        },
    )


if __name__ == "__main__":
    typer.run(main)
