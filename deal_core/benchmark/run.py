"""Run one cell of the benchmark. A second run continues at the task at which a first run died.

Some bounds train nothing: a classifier per task answers from features of the untouched base model, so nothing can be
forgotten. It knows a row's task, as the prompt of every strategy does.

frozen_head: linear discriminant analysis with Ledoit-Wolf shrinkage, as RanPAC's head without its random projection
    (arXiv 2307.02251).
knn: the stored rows nearest to a text vote, after Reference Trustable Decoding (arXiv 2409.20181) with one head.
knn_means: the nearest mean of a label's rows.

Shapes: N rows, K neighbours, D width of the base model.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset
from filelock import FileLock
from numpy.typing import NDArray
from sklearn.base import ClassifierMixin
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.neighbors import KNeighborsClassifier, NearestCentroid
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from deal_core.adapter.files import WEIGHTS_FILE
from deal_core.adapter.state import adapter_on, load_method_state
from deal_core.base_model.device import describe_machine
from deal_core.base_model.language_model import LanguageModel
from deal_core.base_model.load import BaseModel
from deal_core.benchmark.cell import BOUNDS, UNTRAINED, Cell, pack_answers
from deal_core.benchmark.suites import Rows, SuiteTask
from deal_core.data.prompts import encode_prompt
from deal_core.errors import ConfigError
from deal_core.evaluation.answering import ServedTask
from deal_core.evaluation.general_ability import perplexity
from deal_core.evaluation.label_scores import label_log_probs
from deal_core.evaluation.report import outcome_text
from deal_core.evaluation.score import TaskEvaluation, evaluate_answers, evaluate_task
from deal_core.method_config import MethodConfig
from deal_core.regular_file import complete_file
from deal_core.selection.choose import choose_rows
from deal_core.selection.label_noise import features
from deal_core.strategies import strategy_class
from deal_core.strategies.strategy import TaskTexts
from deal_core.training.train import TrainingSetup, train_adapter

OnProgress = Callable[[float, float, str], None]
VERSION_FILE = "version.json"
NUM_NEIGHBOURS = 32
NUM_FURTHER_ROWS = 50
"""Training rows of a task after those that a cell learns, for strategies that ask for further rows."""


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
    on_progress: OnProgress


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
    if cell.strategy in UNTRAINED:
        is_base = cell.strategy == "base"
        scores = _score(run, base.model, _test_rows(run, cell.tasks), 0, 1) if is_base else _score_heads(run)
        return {
            "versions": [{"task": None, "scores": scores}],
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


def _stages(cell: Cell) -> list[_Stage]:
    if cell.strategy in ("joint", "joint_memory"):
        return [_Stage(cell.tasks, cell.tasks)]
    if cell.strategy == "per_task":
        return [_Stage((name,), (name,)) for name in cell.tasks]
    return [_Stage((name,), cell.scored_after(number)) for number, name in enumerate(cell.tasks)]


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
    is_bound = cell.strategy in BOUNDS
    setup = TrainingSetup(
        task=run.tasks[first].schema,
        strategy="seq_lora" if is_bound else cell.strategy,
        adapter=cell.adapter,
        method=MethodConfig() if is_bound else run.method,
        train=cell.train,
        old_tasks=() if is_bound else tuple(run.tasks[name].schema for name in cell.tasks[:number]),
    )
    parent_folder = None if number == 0 or is_bound else _folder(run, number - 1)
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
    num_steps = cell.train.num_steps(len(rows) + sum(len(others) for _, others in joined))

    def on_log(step: int, _: Mapping[str, float]) -> None:
        run.on_progress(number + 0.7 * step / num_steps, num_versions, f"{first}: step {step} of {num_steps}")

    asks_further_rows = not is_bound and strategy_class(cell.strategy).asks_further_rows
    old_texts = [_further_rows(run, name) for name in cell.tasks[:number]] if asks_further_rows else []
    result = train_adapter(
        run.base,
        rows,
        setup,
        parent_folder=parent_folder,
        joined=joined,
        old_texts=old_texts,
        output_folder=folder,
        checkpoint_folder=run.work / f"{number}-checkpoints",
        on_log=on_log,
    )
    trained = time.perf_counter()
    with adapter_on(run.base.model, folder) as model:
        scores = _score(run, model, _test_rows(run, stage.scored), number + 0.7, num_versions)
    without = [f"{old.task.name} has no training rows left to rehearse" for old in old_texts if not len(old.rows)]
    version: dict[str, Any] = {
        "task": None if more else first,
        "scores": scores,
        "num_steps": result.num_steps,
        "seconds": {"train": trained - started, "evaluate": time.perf_counter() - trained},
        "rows_per_second": result.rows_per_second,
        "adapter_bytes": (folder / WEIGHTS_FILE).stat().st_size,
        "fill": sum(result.fill.values()) / len(result.fill) if result.fill else None,
        "notes": [*(chosen.notes if chosen else ()), *result.notes, *without],
        "machine": describe_machine(),
    }
    if chosen is not None:  # the numbers say which rows methods have in common; a benchmark's rows are public
        version["chosen"] = list(chosen.rows)
    with complete_file(folder / VERSION_FILE) as part:
        part.write_text(json.dumps(version))


def _further_rows(run: CellRun, name: str) -> TaskTexts:
    """Training rows of a task that the cell does not train on; there may be none."""
    task, cell = run.tasks[name], run.cell
    return TaskTexts(
        task=task.schema,
        rows=Dataset.from_list(list(task.train[cell.rows : cell.rows + NUM_FURTHER_ROWS])),
        max_prompt_tokens=cell.train.max_prompt_tokens,
        max_new_tokens=cell.train.answer_tokens(task.schema.labels),
    )


def _rows(run: CellRun, name: str) -> Dataset:
    """The rows of a task that the cell trains on."""
    rows = list(run.tasks[name].train[: run.cell.rows])
    if run.cell.strategy == "joint_memory":
        rows = rows[: max(1, round(len(rows) / 10))]
    return Dataset.from_list(rows)


def _test_rows(run: CellRun, names: Sequence[str]) -> dict[str, Rows]:
    return {name: run.tasks[name].part(run.cell.part, run.cell.max_test_rows) for name in names}


def _score_unused(run: CellRun, model: LanguageModel, done: float, num_versions: float) -> dict[str, Any]:
    """Score training rows that no cell of this many rows learns or rehearses, if the cell asks for it.

    They are as good as test rows, for the last version.
    """
    if not run.cell.scores_unused:
        return {}
    rows_of = {name: run.tasks[name].train[run.cell.rows + NUM_FURTHER_ROWS :] for name in run.cell.tasks}
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
        scores[name] = _kept(evaluation)
        if log_probs_NL is not None:
            scores[name] |= pack_answers(evaluation.answers, [*dataset["output"]], task.labels, log_probs_NL)
    return scores


def _kept(evaluation: TaskEvaluation) -> dict[str, Any]:
    return {
        "correct": outcome_text(evaluation.outcomes),
        "rouge1": evaluation.rouge1,
        "majority_rate": evaluation.majority_rate,
    }


def _score_heads(run: CellRun) -> dict[str, dict[str, Any]]:
    """Fit a classifier for every task and score its answers, in the form of `_score`."""
    base, bound, scores = run.base, run.cell.strategy, {}
    for number, (name, rows) in enumerate(_test_rows(run, run.cell.tasks).items()):
        run.on_progress(number, len(run.cell.tasks), f"features of {name}")
        task, learned, tested = run.tasks[name].schema, _rows(run, name), Dataset.from_list(list(rows))
        if not task.labels:
            raise ConfigError(f"{bound} answers with labels, and task {name} has none; leave {bound} out.")
        train_ND, test_ND = (
            features(
                base.model, base.tokenizer, task, [*texts["input"]], max_prompt_tokens=run.cell.train.max_prompt_tokens
            )
            for texts in (learned, tested)
        )
        answers = answer_by_head(bound, train_ND, list(learned["output"]), test_ND, task.labels)
        scores[name] = _kept(evaluate_answers(task, tested, answers))
    return scores


def _nearest_rows(train_ND: NDArray[np.float64]) -> ClassifierMixin:
    """Neighbours that vote with weight exp(-d^2 / T); T is the stored rows' mean d^2 to their own K-th neighbour."""
    num_neighbours = min(NUM_NEIGHBOURS, len(train_ND))
    scaled_ND = StandardScaler().fit_transform(train_ND)
    index = KNeighborsClassifier(num_neighbours).fit(scaled_ND, np.zeros(len(train_ND)))
    distances_NK, _ = index.kneighbors(scaled_ND)
    temperature = max(float(np.mean(distances_NK[:, -1] ** 2)), np.finfo(float).tiny)
    return KNeighborsClassifier(num_neighbours, weights=lambda distances: np.exp(-(distances**2) / temperature))


HEADS: dict[str, Callable[[NDArray[np.float64]], ClassifierMixin]] = {
    "frozen_head": lambda _: LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto"),
    "knn": _nearest_rows,
    "knn_means": lambda _: NearestCentroid(),
}
"""Name of a bound -> its classifier for these training rows. Features are standardised before it."""


def answer_by_head(
    bound: str, train_ND: Tensor, labels: Sequence[str], test_ND: Tensor, known: Sequence[str]
) -> list[str]:
    """Fit a bound's classifier on the features and labels of training rows, and return its label for every test row.

    A label of the task (`known`) without a training row is never answered.
    """
    if len(set(labels)) < 2:  # a classifier needs two classes
        return [labels[0] if labels else known[0]] * len(test_ND)
    rows_ND, others_ND = (part_ND.double().numpy() for part_ND in (train_ND, test_ND))
    head = make_pipeline(StandardScaler(), HEADS[bound](rows_ND))
    head.fit(rows_ND, list(labels))
    return [str(label) for label in head.predict(others_ND)]
