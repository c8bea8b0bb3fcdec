"""Run one cell of the benchmark. A second run continues at the task at which a first run died."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset
from filelock import FileLock

from benchmarks.continual.cell import Cell, pack_answers
from benchmarks.continual.suites import Rows, SuiteTask
from benchmarks.output import describe_machine
from deal_core.adapter.files import WEIGHTS_FILE
from deal_core.adapter.state import adapter_on, load_method_state
from deal_core.base_model.language_model import LanguageModel
from deal_core.base_model.load import BaseModel
from deal_core.data.prompts import encode_prompt
from deal_core.evaluation.answering import ServedTask
from deal_core.evaluation.evaluate import evaluate_answers, evaluate_task
from deal_core.evaluation.label_scores import label_log_probs
from deal_core.evaluation.report import outcome_text
from deal_core.general.perplexity import perplexity
from deal_core.method_config import MethodConfig
from deal_core.regular_file import complete_file
from deal_core.selection.choose import choose_rows
from deal_core.training.train import KeptSource, TrainingSetup, train_adapter

OnProgress = Callable[[float, float, str], None]
VERSION_FILE = "version.json"


@dataclass(frozen=True, kw_only=True)
class CellRun:
    """Inputs and folders of the run of a cell.

    Attributes:
        base: The base model, without an adapter.
        tasks: The cell's tasks by name.
        work: Folder of this cell's versions; the caller removes it at the end.
        shared: Folder of first versions that cells share.
        keep: Folder for the versions of a finished cell, one folder each, by number; None: they are deleted.
        on_progress: Called with the number of finished versions, of all versions, and the current step's text.
    """

    base: BaseModel
    cell: Cell
    tasks: Mapping[str, SuiteTask]
    method: MethodConfig
    work: Path
    shared: Path
    keep: Path | None = None
    on_progress: OnProgress = lambda *_: None


def run_cell(run: CellRun) -> dict[str, Any]:
    """Learn the cell's tasks and return its result.

    Returns:
        JSON values. `versions` is a list: each has the learned task, its cost, `adapter_bytes`, and the scores of every
        scored task: ROUGE-1, a string with 0 or 1 per test row, and what `pack_answers` keeps. `unused` has the last
        version's scores on training rows that were not used, if the cell asks for them. `perplexity` is that of the
        base and of the last version. `stores` and `state_bytes` describe the last version's method state.

    Raises:
        ConfigError: A task's prompt does not fit without any text.
        DealError: the errors of `train_adapter`.
        Timeout: Another process makes the first version, which cells share.
    """
    cell, base = run.cell, run.base
    for name in cell.tasks:  # before hours of training, not after them
        encode_prompt(base.tokenizer, run.tasks[name].schema, "", cell.train.max_prompt_tokens)
    if cell.strategy == "base":
        return {
            "versions": [{"task": None, "scores": _score(run, base.model, _test_rows(run, cell.tasks), 0, 1)}],
            **_score_unused(run, base.model, 0, 1),
            "perplexity": {"base": perplexity(base.model, base.tokenizer)},
        }
    stages = _stages(cell)
    for number, stage in enumerate(stages):
        with _alone(run, number):
            if not (_folder(run, number) / VERSION_FILE).is_file():
                _make_version(run, number, stage)
    folders = [_folder(run, number) for number in range(len(stages))]
    with adapter_on(base.model, folders[-1]) as model:
        after = perplexity(model, base.tokenizer)
        unused = _score_unused(run, model, len(stages), len(stages))
    state = load_method_state(folders[-1])
    versions = [json.loads((folder / VERSION_FILE).read_text()) for folder in folders]
    if run.keep is not None:
        for number, folder in enumerate(folders):
            shutil.copytree(folder, run.keep / str(number), dirs_exist_ok=True)
    return {
        "versions": versions,
        **unused,
        "perplexity": {"base": perplexity(base.model, base.tokenizer), "adapted": after},
        "stores": state.stores,
        "state_bytes": state.num_bytes,
    }


class _Stage(NamedTuple):
    """The tasks of one version."""

    learned: tuple[str, ...]
    """Tasks that the version learns: one, or all together."""
    scored: tuple[str, ...]
    old: tuple[str, ...] = ()
    """Tasks that its parent has learned."""
    is_together: bool = False
    """Whether it learns all of them together, from the base model: a bound or a consolidation."""


def _stages(cell: Cell) -> list[_Stage]:
    if cell.strategy == "joint":
        return [_Stage(cell.tasks, cell.tasks, is_together=True)]
    if cell.strategy == "per_task":
        return [_Stage((name,), (name,), is_together=True) for name in cell.tasks]
    stages = []
    for number, name in enumerate(cell.tasks):
        stages.append(_Stage((name,), cell.scored_after(number), old=cell.tasks[:number]))
        so_far = cell.tasks[: number + 1]
        if cell.consolidate_every is not None and len(so_far) % cell.consolidate_every == 0:
            stages.append(_Stage(so_far, so_far, old=so_far, is_together=True))
    return stages


def _folder(run: CellRun, number: int) -> Path:
    shared = run.cell.shared_digest()
    return run.shared / shared if number == 0 and shared else run.work / str(number)


@contextmanager
def _alone(run: CellRun, number: int) -> Iterator[None]:
    """Lock a shared version while it is made. If another process makes it, Timeout is raised at once."""
    folder = _folder(run, number)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock", timeout=0) if folder.parent == run.shared else nullcontext():
        yield


def _make_version(run: CellRun, number: int, stage: _Stage) -> None:
    """Train and score one version. VERSION_FILE is written last and marks the version as complete."""
    cell, folder, num_versions = run.cell, _folder(run, number), len(_stages(run.cell))
    first, *more = stage.learned
    setup = TrainingSetup(
        task=run.tasks[first].schema,
        strategy="seq_lora" if stage.is_together else cell.strategy,
        adapter=cell.adapter,
        method=MethodConfig() if stage.is_together else run.method,
        train=cell.train,
        old_tasks=() if stage.is_together else tuple(run.tasks[name].schema for name in stage.old),
    )
    before = _folder(run, number - 1) if stage.old else None
    parent_folder = None if stage.is_together else before
    started = time.perf_counter()
    rows, chosen = _rows(run, first), None
    if setup.method.selection.is_on:
        chosen = choose_rows(
            rows,
            setup,
            lambda: run.base,
            parent_folder=parent_folder,
            journal=run.work / f"{number}-selection.json",
            on_progress=lambda done, total: run.on_progress(number, num_versions, f"{first}: choosing rows"),
        )
        rows = rows.select(chosen.rows)
    joined = [(run.tasks[name].schema, _rows(run, name)) for name in more]
    num_rows = len(rows) + sum(len(others) for _, others in joined)
    num_steps = cell.train.num_steps(num_rows)

    def on_log(step: int, _: Mapping[str, float]) -> None:
        run.on_progress(number + 0.7 * step / num_steps, num_versions, f"{first}: step {step} of {num_steps}")

    result = train_adapter(
        run.base,
        rows,
        setup,
        parent_folder=parent_folder,
        joined=joined,
        kept=KeptSource(folder=before) if stage.is_together and before else None,
        output_folder=folder,
        checkpoint_folder=run.work / f"{number}-checkpoints",
        on_log=on_log,
    )
    trained = time.perf_counter()
    with adapter_on(run.base.model, folder) as model:
        scores = _score(run, model, _test_rows(run, stage.scored), number + 0.7, num_versions)
    version: dict[str, Any] = {
        "task": None if more else first,
        "scores": scores,
        "num_steps": result.num_steps,
        "seconds": {"train": trained - started, "evaluate": time.perf_counter() - trained},
        "rows_per_second": result.rows_per_second,
        "adapter_bytes": (folder / WEIGHTS_FILE).stat().st_size,
        "fill": sum(result.fill.values()) / len(result.fill) if result.fill else None,
        "notes": [*(chosen.notes if chosen else ()), *result.notes],
        "machine": describe_machine(),
    }
    if chosen is not None:  # the numbers say which rows methods have in common; a benchmark's rows are public
        version["chosen"] = list(chosen.rows)
    with complete_file(folder / VERSION_FILE) as part:
        part.write_text(json.dumps(version))


def _rows(run: CellRun, name: str) -> Dataset:
    """The rows of a task that the cell trains on."""
    return Dataset.from_list(list(run.tasks[name].train[: run.cell.rows]))


def _test_rows(run: CellRun, names: Sequence[str]) -> dict[str, Rows]:
    return {name: run.tasks[name].part(run.cell.part, run.cell.max_test_rows) for name in names}


def _score_unused(run: CellRun, model: LanguageModel, done: float, num_versions: float) -> dict[str, Any]:
    """Score training rows that no cell of this many rows learns, if the cell asks for it.

    They are as good as test rows, for the last version.
    """
    if not run.cell.scores_unused:
        return {}
    rows_of = {name: run.tasks[name].train[run.cell.rows :] for name in run.cell.tasks}
    return {"unused": _score(run, model, rows_of, done, num_versions)}


def _score(
    run: CellRun, model: LanguageModel, rows_of: Mapping[str, Rows], done: float, num_versions: float
) -> dict[str, dict[str, Any]]:
    """Return every task's right rows, mean ROUGE-1, majority rate, answers and log-probabilities of labels.

    A task without rows is left out.
    """
    tokenizer, longest, scores = run.base.tokenizer, run.cell.train.max_prompt_tokens, {}
    for name, rows in rows_of.items():
        if not rows:
            continue
        run.on_progress(done, num_versions, f"scoring {name}")
        task, dataset, log_probs_NL = run.tasks[name].schema, Dataset.from_list(list(rows)), None
        if task.labels:
            log_probs_NL = label_log_probs(model, tokenizer, task, [*dataset["input"]], max_prompt_tokens=longest)
        if log_probs_NL is not None and run.cell.scoring == "likeliest":
            likeliest = [task.labels[best] for best in log_probs_NL.argmax(1).tolist()]
            evaluation = evaluate_answers(task, dataset, likeliest)
        else:
            asked = ServedTask(
                schema=task, max_prompt_tokens=longest, max_new_tokens=run.cell.train.answer_tokens(task.labels)
            )
            evaluation = evaluate_task(model, tokenizer, asked, dataset)
        scores[name] = {
            "correct": outcome_text(evaluation.outcomes),
            "rouge1": evaluation.rouge1,
            "majority_rate": evaluation.majority_rate,
        }
        if log_probs_NL is not None:
            scores[name] |= pack_answers(evaluation.answers, [*dataset["output"]], task.labels, log_probs_NL)
    return scores
