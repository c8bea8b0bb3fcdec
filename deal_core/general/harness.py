"""Tasks of lm-evaluation-harness as suites of general ability: `lm_eval:NAME`.

A row's score is the first metric of the task's first filter, such as acc or exact_match. Prompts are the task's own,
without a chat template. A group, such as mmlu, is all rows of its tasks.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deal_core.config import HARNESS
from deal_core.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from deal_core.base_model.language_model import LanguageModel
    from deal_core.evaluation.generation import OnProgress

FOLDER_VARIABLE = "DEAL_LM_EVAL_TASKS"
"""Environment variable: a folder with tasks of one's own. They may run code, so who runs the worker sets it."""
MAX_ROWS = 100
"""The first rows of each task that are asked."""
BATCH_ROWS = 8
FEWSHOT_SEED = 1234


@dataclass(frozen=True)
class HarnessTask:
    """A task or group of lm-evaluation-harness.

    Raises:
        ConfigError: The harness is not installed, or cannot load the task.
    """

    name: str
    """With the prefix."""

    def __post_init__(self) -> None:
        _load(self.name, _folder())

    @property
    def identity(self) -> str:
        """Digest of the harness's version, the task's name and the files of the folder of own tasks."""
        folder = _folder()
        files = sorted(path for path in Path(folder).rglob("*") if path.suffix in (".yaml", ".py")) if folder else []
        digest = hashlib.sha256(f"{self.name}\0{metadata.version('lm_eval')}\0{MAX_ROWS}".encode())
        for path in files:
            digest.update(path.read_bytes())
        return digest.hexdigest()

    def __len__(self) -> int:
        """Number of its rows."""
        return sum(min(MAX_ROWS, len(task.eval_docs)) for task in _load(self.name, _folder())["tasks"].values())

    def score(
        self,
        model: LanguageModel,
        tokenizer: PreTrainedTokenizerBase,
        answer: object = None,
        on_progress: OnProgress | None = None,
    ) -> tuple[float, ...]:
        """Return the score of every row. The model itself is always asked: the harness reads its probabilities.

        Raises:
            ConfigError: The task gives a row no score from 0 to 1.
        """
        from lm_eval.evaluator import evaluate
        from lm_eval.models.huggingface import HFLM

        del answer
        loaded = _load(self.name, _folder())
        reader = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=BATCH_ROWS)
        found = evaluate(lm=reader, task_dict=loaded, limit=MAX_ROWS, bootstrap_iters=0)
        scores = [self._score(row) for rows in found["samples"].values() for row in _of_one_filter(rows)]
        if on_progress is not None:
            on_progress(len(scores))
        return tuple(scores)

    def _score(self, row: dict[str, Any]) -> float:
        value = row[row["metrics"][0]]
        if not isinstance(value, int | float) or not 0 <= value <= 1:
            raise ConfigError(
                f"evaluate.general has {self.name}, whose metric {row['metrics'][0]} gives a row no score from 0 to 1; "
                "leave the task out."
            )
        return float(value)


def _folder() -> str | None:
    return os.environ.get(FOLDER_VARIABLE) or None


def _of_one_filter(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of the first filter, in order. The others are the same answers, read in another way."""
    return sorted((row for row in rows if row["filter"] == rows[0]["filter"]), key=lambda row: int(row["doc_id"]))


@cache
def _manager(folder: str | None) -> Any:
    """The harness's index of tasks, which it takes seconds to make."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=folder)


@cache
def _load(name: str, folder: str | None) -> dict[str, Any]:
    """Load a task with its rows, once in a process."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(
            f"evaluate.general has {name}, which needs lm-evaluation-harness; install it, in the project's checkout: "
            "pip install '.[harness]'"
        )
    try:
        loaded: dict[str, Any] = _manager(folder).load([name.removeprefix(HARNESS)])
    except Exception as error:  # a task is YAML and code, and its rows may be on a Hub
        raise ConfigError(
            f"evaluate.general has {name}, which lm-evaluation-harness cannot load ({type(error).__name__}: {error}); "
            f"correct the name, see that its rows are on this machine, or set {FOLDER_VARIABLE} to a folder of tasks."
        ) from error
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
    return loaded
