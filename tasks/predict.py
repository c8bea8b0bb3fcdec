"""Answer one text or a whole file, of any size, with a version of a lineage."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel

from deal_core.adapter.state import adapter_on
from deal_core.base_model.sources import resolve_base
from deal_core.data.answer_files import in_chunks, output_kind, own_names, survey_rows, writing_answers
from deal_core.data.columns import find_input
from deal_core.data.prompts import render_prompt
from deal_core.data.reading.batches import RowList
from deal_core.data.reading.readers import file_kind, read_rows
from deal_core.data.row_checks import RowChecker
from deal_core.errors import ConfigError
from deal_core.evaluation.generation import GivenAnswer, answer_inputs, counting, first_answer_logits
from infra.settings import HomeSettings
from infra.store.base import ObjectStore
from infra.store.keys import INBOX
from infra.store.local import FileStore
from infra.versions import Version
from tasks.base import cached_base, cached_base_with_adapter
from tasks.context import only_process
from tasks.lineage.history import find_version
from tasks.lineage.model_card import served_task
from tasks.lineage.record import KnownTask, LineageRecord, choose_task, read_record
from tasks.lineage.version_files import borrowed_adapter

NUM_TOKENS = 5
CHUNK_ROWS = 1024
"""Rows that are read, answered in batches of similar length, and written."""
OnProgress = Callable[[int, int], None]
AnswerInputs = Callable[[Sequence[str], Callable[[int], None]], list[GivenAnswer]]
"""Answers inputs in their order. The second argument is called with the number of rows just answered."""


class Answer(BaseModel, frozen=True):
    """A text and its answer."""

    answer: str
    problem: str | None
    """What is wrong with it: it is no label of its task; None: nothing is."""
    first_token_logits: dict[str, float]
    """The most likely first tokens of the answer and their logits. A plain PEFT load gives the same."""
    prompt: str
    """The prompt: the text in its task's template."""
    base_model: str
    """Folder or Hub id of the base model."""
    adapter: str
    """Address of the version's PEFT folder."""
    precision: str
    """Type of the base model's weights, such as bfloat16."""
    task: str
    lineage: str
    version: str


def predict(store: ObjectStore, text: str, *, lineage: str, task: str | None, version: str | None) -> Answer:
    """Answer a text with the prompt of a task, by default the task learned last.

    The text for a chat task is the JSON list of messages. `version` is a number; None: the champion.

    Raises:
        ConfigError: The lineage does not know the task, or the text does not fit the task's format.
        IntegrityError: The version's adapter is damaged.
        RegistryError: The lineage has no such version, or no champion.
    """
    asked = Asked.find(store, lineage, task, version)
    schema, served = asked.known.schema, served_task(asked.known)
    text = served.readable(text, "The question")
    base = cached_base(asked.record.base)
    with borrowed_adapter(store, asked.info) as folder, adapter_on(base.model, folder) as model:
        (answer,) = answer_inputs(model, base.tokenizer, served, [text])
        logits = first_answer_logits(
            model, base.tokenizer, schema, text, max_prompt_tokens=asked.known.max_prompt_tokens
        )
    likeliest = logits.topk(NUM_TOKENS)
    tokens = (base.tokenizer.decode([index]) for index in likeliest.indices.tolist())
    return Answer(
        answer=answer.text,
        problem=served.problem_of(answer.text),
        prompt=render_prompt(schema, text, base.tokenizer),
        base_model=str(resolve_base(asked.record.base.source, HomeSettings().cache_dir)),
        adapter=store.uri_of(asked.info.adapter_uri),
        precision=str(base.model.dtype).removeprefix("torch."),
        first_token_logits=dict(zip(tokens, likeliest.values.tolist(), strict=True)),
        task=schema.name,
        lineage=lineage,
        version=asked.info.version,
    )


def predict_texts(
    store: ObjectStore, texts: Sequence[str], *, lineage: str, task: str | None, version: str | None
) -> list[str]:
    """Answer texts together, in their order. For the arguments and errors see `predict`."""
    asked = Asked.find(store, lineage, task, version)
    served = served_task(asked.known)
    inputs = [served.readable(text, f"Text {number}") for number, text in enumerate(texts, start=1)]
    return [given.text for given in answering(store, asked)(inputs, lambda num_rows: None)]


class FileAnswers(BaseModel, frozen=True):
    """A file and its answers."""

    data: str
    """The file whose rows were answered."""
    out: str
    """The file with the answers."""
    num_rows: int
    num_bad: int
    """Rows without an answer. The column `problem` has the reason."""
    num_no_label: int
    """Rows whose answer is no label of the task, as their column `problem` says."""
    columns: dict[str, str]
    """The name of each added column in the output."""
    task: str
    lineage: str
    version: str
    seconds: float


class Asked(NamedTuple):
    """The version that answers, and the task."""

    info: Version
    record: LineageRecord
    known: KnownTask

    @classmethod
    def find(cls, store: ObjectStore, lineage: str, task: str | None, version: str | None) -> Asked:
        """Find them. Without a task, it is the task learned last; without a version, the champion."""
        info = find_version(store, lineage, version)
        record = read_record(store, info)
        return cls(info, record, choose_task(record, task))


def predict_file(
    store: ObjectStore,
    data: Path,
    *,
    lineage: str,
    task: str | None,
    version: str | None,
    out: Path | None,
    column: str | None,
    on_progress: OnProgress = lambda done, total: None,
) -> FileAnswers:
    """Answer every row of a file with the prompt of a task.

    Rows keep their order and all their columns. The output appears when all rows are answered; after an interruption
    there is none.

    Args:
        store: The store, which has the lineage.
        data: CSV, JSON lines or Parquet, as for ingest. Answers are not needed.
        lineage: The lineage.
        task: None: the task learned last.
        version: Number; None: the champion.
        out: A .jsonl or .parquet file; None: a file next to `data`, named after it.
        column: The column with the text; None: the task's column, or the conventional one.
        on_progress: Called with the number of answered rows and of all rows.

    Raises:
        ConfigError: The lineage does not know the task, or the output exists already or lies in the inbox.
        DataValidationError: The file cannot be read.
        IntegrityError: The version's adapter is damaged.
        RegistryError: The lineage has no such version, or no champion.
    """
    started = time.perf_counter()
    if out is None:  # for example june.answers.jsonl for june.csv.gz
        unpacked = data.with_suffix("") if data.suffix.casefold() == ".gz" else data
        out = unpacked.with_suffix(".answers.parquet" if file_kind(data) == "parquet" else ".answers.jsonl")
    output = Path(os.path.realpath(out))
    output_kind(output)
    if isinstance(store, FileStore) and output.is_relative_to(os.path.realpath(store.root / INBOX)):
        raise ConfigError(
            f"The answers would go to {output}, into the inbox, and be learned as an arrival; give a file elsewhere "
            "with --out.",
            code="answers-in-inbox",
        )
    survey = survey_rows(data)
    asked = Asked.find(store, lineage, task, version)
    who = {"task": asked.known.schema.name, "lineage": lineage, "version": asked.info.version}
    columns = find_input(list(survey.types), asked.known.schema, data.name, column)
    names = own_names(survey.types)
    checker = RowChecker(asked.known.schema, columns, max_text_chars=sys.maxsize)  # a long prompt is cut by tokens
    served = served_task(asked.known)
    num_bad = num_no_label = num_done = 0
    with _alone(output), writing_answers(output, survey.types, names) as write:
        answer = answering(store, asked)
        for rows in in_chunks(read_rows(data), CHUNK_ROWS):
            checked = checker.check_inputs(RowList(rows))
            texts = [text for text in checked if isinstance(text, str)]
            answers = [given.text for given in answer(texts, counting(on_progress, survey.num_rows, num_done))]
            answered = iter([{"answer": text, "problem": served.problem_of(text), **who} for text in answers])
            own = [
                next(answered)
                if isinstance(text, str)
                else {"problem": "; ".join(f"{reason}: {value}" for reason, value, _ in text), **who}
                for text in checked
            ]
            write([row.values for row in rows], own)
            num_bad += len(rows) - len(texts)
            num_no_label += sum(served.problem_of(text) is not None for text in answers)
            num_done += len(rows)
            on_progress(num_done, survey.num_rows)
    return FileAnswers(
        data=str(data),
        out=str(output),
        num_rows=num_done,
        num_bad=num_bad,
        num_no_label=num_no_label,
        columns=names,
        **who,
        seconds=time.perf_counter() - started,
    )


@contextmanager
def _alone(output: Path) -> Iterator[None]:
    """Lock the output against other processes. The lock file does not stay beside it."""
    lock = output.with_name(f".{output.name}.lock")
    with only_process(lock, f"Another process writes {output}; wait for it, or give another --out."):
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def answering(store: ObjectStore, asked: Asked) -> AnswerInputs:
    """Return a function from inputs to answers: the base model with the version's adapter, which stays on it."""
    base, model = cached_base_with_adapter(
        asked.record.base, asked.info.adapter_sha256, lambda: borrowed_adapter(store, asked.info)
    )
    task = served_task(asked.known)
    return lambda inputs, on_rows: answer_inputs(model, base.tokenizer, task, inputs, on_rows)
