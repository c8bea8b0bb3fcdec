"""Jobs for one or several processes: what each of them reads from a file, and does on its own base model.

A job names files in place of rows and adapters. `inputs` and `moved` let a caller bring these files to another machine.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
from accelerate import PartialState
from accelerate.utils import gather, pad_across_processes
from accelerate.utils.memory import clear_device_cache
from datasets import Dataset
from pydantic import Field, TypeAdapter

from deal_core.adapter.state import adapter_on
from deal_core.base_model.load import BaseModel, Precision
from deal_core.base_model.sharding import in_step, shard_base
from deal_core.config import Quantize, Shard
from deal_core.data.schema import TaskSchema
from deal_core.errors import DeviceMemoryError
from deal_core.evaluation.answering import ServedTask
from deal_core.evaluation.evaluate import Given, given_answers
from deal_core.general.perplexity import perplexity
from deal_core.training.train import KeptSource, TrainingResult, TrainingSetup, train_adapter
from deal_core.training.trainer import OnCheckpoint

Send = Callable[[Mapping[str, Any]], None]
"""Takes a message for whoever started a job: its progress or its result."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What every job needs.

    Attributes:
        base_source: As for `load_base`, like `cache_folder` and `precision`.
        base_sha256: Digest of the base model that `base_source` must hold.
        shard: Whether each process holds a part of the base model instead of the whole.
    """

    base_source: str
    base_sha256: str
    cache_folder: Path
    precision: Precision = "auto"
    shard: Shard = "none"

    def write(self, path: Path) -> None:
        """Write the job as JSON."""
        path.write_bytes(TypeAdapter(type(self)).dump_json(self, indent=2))


@dataclass(frozen=True, kw_only=True)
class JoinedFile:
    """One of several tasks that are learned together."""

    task: TaskSchema
    rows_file: Path
    """Parquet file of its training rows."""


@dataclass(frozen=True, kw_only=True)
class TrainingJob(Job):
    """The arguments of `train_adapter`.

    Attributes:
        rows_file: Parquet file of the training rows.
        joined: Further tasks that are learned in the same run.
    """

    kind: Literal["train"] = "train"
    parent_folder: Path | None
    rows_file: Path
    setup: TrainingSetup
    output_folder: Path
    checkpoint_folder: Path
    joined: tuple[JoinedFile, ...] = ()
    kept: KeptSource | None = None

    @property
    def quantize(self) -> Quantize:
        """Precision of the base model's linear layers."""
        return self.setup.train.quantize

    @property
    def num_processes(self) -> int:
        """Processes that share the job."""
        return self.setup.train.num_processes

    def inputs(self) -> dict[str, Path]:
        """The files and folders that the job reads, by their names in a folder of `moved`."""
        parent = {} if self.parent_folder is None else {"parent": self.parent_folder}
        kept = {} if self.kept is None else {self._name_of_kept: self.kept.folder}
        joined = {f"joined-{number}.parquet": other.rows_file for number, other in enumerate(self.joined)}
        return {"train.parquet": self.rows_file, **parent, **kept, **joined}

    def moved(self, folder: Path) -> Self:
        """The job with its inputs and outputs in a folder."""
        return replace(
            self,
            rows_file=folder / "train.parquet",
            parent_folder=None if self.parent_folder is None else folder / "parent",
            output_folder=folder / "adapter",
            checkpoint_folder=folder / "checkpoints",
            joined=tuple(
                replace(other, rows_file=folder / f"joined-{number}.parquet")
                for number, other in enumerate(self.joined)
            ),
            kept=None if self.kept is None else replace(self.kept, folder=folder / self._name_of_kept),
        )

    @property
    def _name_of_kept(self) -> str:
        """A training that starts from the parent whose kept rows it hands on reads one folder."""
        return "parent" if self.kept is not None and self.kept.folder == self.parent_folder else "kept"

    def run(self, base: BaseModel, send: Send = lambda _: None, on_checkpoint: OnCheckpoint | None = None) -> Any:
        """Train; `send` gets the figures of every step. Returns a `TrainingResult`."""
        return train_adapter(
            base,
            _read_rows(self.rows_file),
            self.setup,
            parent_folder=self.parent_folder,
            output_folder=self.output_folder,
            checkpoint_folder=self.checkpoint_folder,
            joined=[(other.task, _read_rows(other.rows_file)) for other in self.joined],
            kept=self.kept,
            shard=self.shard,
            on_log=lambda step, values: send({"step": step, "values": dict(values)}),
            on_checkpoint=on_checkpoint,
        )


def train_within_memory(job: TrainingJob, train: Callable[[TrainingJob], TrainingResult]) -> TrainingResult:
    """Do a training. Out of memory, it goes on from its last checkpoint with half the rows at once.

    A step has the same rows as before, in more micro-batches, so the result differs by rounding.

    Args:
        job: The training.
        train: Does it, in this process or in others.

    Raises:
        DeviceMemoryError: A step does not fit with one row at once.
    """
    notes: tuple[str, ...] = ()
    while True:
        try:
            result = train(job)
            return replace(result, notes=(*notes, *result.notes))
        except DeviceMemoryError:
            smaller = job.setup.train.with_smaller_batches()
            if smaller is None:
                raise
        clear_device_cache(garbage_collection=True)  # the error is gone here, and with it the failed step's tensors
        job = replace(job, setup=replace(job.setup, train=smaller))
        notes = (
            f"memory: a step had too many rows at once, so it was divided into micro-batches of {smaller.batch_size}",
        )


@dataclass(frozen=True, kw_only=True)
class AnswerJob(Job):
    """Answer the rows of several tasks with one adapter, each process its share.

    Attributes:
        kind: `score` measures the adapter on plain English too.
        adapter_folder: None: the untouched base model answers.
        tasks: The tasks, as they are asked.
        rows_files: A Parquet file of each task's rows.
    """

    kind: Literal["answer", "score"]
    quantize: Quantize = "none"
    num_processes: int
    adapter_folder: Path | None
    tasks: tuple[ServedTask, ...]
    rows_files: tuple[Path, ...]

    def inputs(self) -> dict[str, Path]:
        """The files and folders that the job reads, by their names in a folder of `moved`."""
        adapter = {} if self.adapter_folder is None else {"adapter": self.adapter_folder}
        return {**{f"rows-{number}.parquet": file for number, file in enumerate(self.rows_files)}, **adapter}

    def moved(self, folder: Path) -> Self:
        """The job with its inputs in a folder."""
        return replace(
            self,
            rows_files=tuple(folder / f"rows-{number}.parquet" for number in range(len(self.rows_files))),
            adapter_folder=None if self.adapter_folder is None else folder / "adapter",
        )

    def run(self, base: BaseModel, send: Send = lambda _: None, on_checkpoint: OnCheckpoint | None = None) -> Any:
        """Answer; `send` gets the numbers of rows that were answered. Returns an `AnswerResult`."""
        del on_checkpoint  # it is short enough to begin again
        answers: list[list[Given]] = []
        with adapter_on(base.model, self.adapter_folder) as model:
            if self.shard == "base":
                shard_base(model)
            for number, (task, file) in enumerate(zip(self.tasks, self.rows_files, strict=True)):
                answers.append(_answer_together(model, base, task, _read_rows(file), number, send))
            on_english = perplexity(model, base.tokenizer) if self.kind == "score" else None
        return AnswerResult(answers=tuple(map(tuple, answers)), perplexity=on_english)


AnyJob = Annotated[TrainingJob | AnswerJob, Field(discriminator="kind")]


@dataclass(frozen=True, kw_only=True)
class AnswerResult:
    """What an `AnswerJob` found."""

    answers: tuple[tuple[Given, ...], ...]
    """For each task its answers, in the rows' order."""
    perplexity: float | None
    """Perplexity on plain English; None: not asked, or not defined."""


def read_job(path: Path) -> TrainingJob | AnswerJob:
    """Read a job from a file of `write`."""
    job: TrainingJob | AnswerJob = TypeAdapter(AnyJob).validate_json(path.read_bytes())
    return job


def read_result(job: TrainingJob | AnswerJob, values: Any) -> Any:
    """Read the result of a job from its message: a `TrainingResult` or an `AnswerResult`."""
    kind: Any = TrainingResult if isinstance(job, TrainingJob) else AnswerResult
    return TypeAdapter(kind).validate_python(values)


def _read_rows(file: Path) -> Dataset:
    """Rows that stay on disk and are memory-mapped."""
    return Dataset.from_parquet(str(file), cache_dir=str(file.parent))


def _answer_together(
    model: Any, base: BaseModel, task: ServedTask, rows: Dataset, number: int, send: Send
) -> list[Given]:
    """Answer the rows of a task, of which each process takes every nth; all processes return all answers."""
    state = PartialState()
    rank, num_processes = state.process_index, state.num_processes
    own = rows.select(range(rank, len(rows), num_processes))

    def report(num_rows: int) -> None:
        send({"task": number, "rows": num_rows * num_processes})

    with in_step(model):
        answered = given_answers(model, base.tokenizer, task, own, report) if len(own) else []
    shares = TypeAdapter(list[list[Given]]).validate_python(gather_json(answered))
    return [shares[place % num_processes][place // num_processes] for place in range(len(rows))]


def gather_json(values: Sequence[Any]) -> list[Any]:
    """Return what each process gave, by rank; every process calls this. The values go through JSON."""
    state = PartialState()
    if state.num_processes == 1:
        return [json.loads(json.dumps(values))]
    content = bytearray(json.dumps(values).encode())
    own = torch.frombuffer(content, dtype=torch.uint8).to(state.device)[None]
    lengths = gather(torch.tensor([own.shape[1]], device=state.device)).tolist()
    padded = gather(pad_across_processes(own, dim=1))
    return [json.loads(row[:length].numpy().tobytes()) for row, length in zip(padded.cpu(), lengths, strict=True)]
