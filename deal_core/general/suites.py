"""The suites of general ability: requests that tell how much of an ability a model has.

Each suite is a task of lm-evaluation-harness. Five are this project's, and each has a file in `rows/`: on each line
a request; the checks of its answer, see `deal_core.general.checks`; and an answer that passes. All others are named
`lm_eval:NAME`, with a task or a group of the harness: their prompts are the task's own, without a chat template. A
row's score is the task's first metric after its first filter, such as acc or exact_match.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deal_core.config import HARNESS
from deal_core.data.schema import TaskSchema
from deal_core.errors import ConfigError
from deal_core.evaluation.answering import ServedTask
from deal_core.general.checks import passes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from deal_core.base_model.language_model import LanguageModel
    from deal_core.evaluation.evaluate import AnswerInputs
    from deal_core.evaluation.generation import OnProgress

ROWS_FOLDER = Path(__file__).with_name("rows")
MAX_PROMPT_TOKENS = 1024
"""No request of this project's suites is as long, with any tokenizer."""
MAX_NEW_TOKENS = {"arithmetic": 32, "instructions": 96, "json": 128, "refusal": 48, "tools": 96}
"""Longest answers. Those that pass are at most half as long."""
VERSIONS = {"arithmetic": 1, "instructions": 1, "json": 1, "refusal": 1, "tools": 1}
"""Raise the number of a suite when its rows, its checks, its longest answer or its prompt change: then no score of
before is compared with a new one."""
FOLDER_VARIABLE = "DEAL_LM_EVAL_TASKS"
"""Environment variable: a folder with tasks of one's own. They may run code, so who runs the worker sets it."""
MAX_ROWS = 100
"""The first rows of each task that are asked."""
BATCH_ROWS = 8
FEWSHOT_SEED = 1234


@dataclass(frozen=True)
class Suite:
    """A suite by its name in `evaluate.general`.

    Raises:
        ConfigError: lm-evaluation-harness is not installed, or cannot load the task.
    """

    name: str

    def __post_init__(self) -> None:
        _load(self.name, _folder())

    @property
    def identity(self) -> str:
        """What stands for all that decides the scores, apart from the model. Scores of one identity are compared.

        It is the name and version of a suite of this project; else a digest of the harness's version, the task's name
        and the files of the folder of own tasks.
        """
        if self.name in VERSIONS:
            return f"{self.name} {VERSIONS[self.name]}"
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
        answer: AnswerInputs | None = None,
        on_progress: OnProgress | None = None,
    ) -> tuple[float, ...]:
        """Return the score of every row, 0 to 1.

        `answer`, such as an engine, answers this project's suites in the model's place. For all other tasks the model
        itself is asked: the harness reads its probabilities.

        Raises:
            ConfigError: The task gives a row no score from 0 to 1.
        """
        from lm_eval.evaluator import evaluate
        from lm_eval.models.huggingface import HFLM

        reader = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=BATCH_ROWS)
        if self.name in VERSIONS:  # answered as a task's rows are, and not by the harness
            from deal_core.evaluation.generation import answer_inputs

            task = self.served_task(tokenizer)
            answers = answer or partial(answer_inputs, model, tokenizer)
            reader.generate_until = lambda requests: [
                given.text for given in answers(task, [request.doc["prompt"] for request in requests], on_progress)
            ]
        results = evaluate(lm=reader, task_dict=_load(self.name, _folder()), limit=MAX_ROWS, bootstrap_iters=0)
        scores = [self._score(row) for rows in results["samples"].values() for row in _of_one_filter(rows)]
        if on_progress is not None and self.name not in VERSIONS:
            on_progress(len(scores))
        return tuple(scores)

    def served_task(self, tokenizer: PreTrainedTokenizerBase) -> ServedTask:
        """Return how a model is asked a suite of this project: by its own chat template, if it has one."""
        is_chat = bool(tokenizer.chat_template)
        schema = TaskSchema(
            name=self.name,
            format="completion",
            prompt="chat" if is_chat else "plain",
            template=None if is_chat else "{text}\nAnswer:",
        )
        return ServedTask(schema=schema, max_prompt_tokens=MAX_PROMPT_TOKENS, max_new_tokens=MAX_NEW_TOKENS[self.name])

    def _score(self, row: dict[str, Any]) -> float:
        value = row[row["metrics"][0]]
        if not isinstance(value, int | float) or not 0 <= value <= 1:
            raise ConfigError(
                f"evaluate.general has {self.name}, whose metric {row['metrics'][0]} gives a row no score from 0 to 1; "
                "leave the task out."
            )
        return float(value)


def read_rows(name: str) -> list[dict[str, Any]]:
    """Return the rows of a suite of this project."""
    return [json.loads(line) for line in (ROWS_FOLDER / f"{name}.jsonl").read_bytes().splitlines()]


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
            "pip install '.[harness]'",
            code="harness-missing",
        )
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of every default
    try:
        loaded: dict[str, Any] = _own(name) if name in VERSIONS else _manager(folder).load([name.removeprefix(HARNESS)])
    except Exception as error:  # a task is YAML and code, and its rows may be on a Hub
        raise ConfigError(
            f"evaluate.general has {name}, which lm-evaluation-harness cannot load ({type(error).__name__}: {error}); "
            f"correct the name, see that its rows are on this machine, or set {FOLDER_VARIABLE} to a folder of tasks.",
            code="harness-task",
        ) from error
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
    return loaded


def _own(name: str) -> dict[str, Any]:
    """A suite of this project as a task of the harness, with the rows of its file."""
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    class LocalTask(ConfigurableTask):  # type: ignore[misc]
        """A task whose rows are at hand."""

        def download(self, *_: Any, **__: Any) -> None:
            # a column has one type, so checks of many forms are JSON in it
            rows = [{**row, "checks": json.dumps(row["checks"])} for row in read_rows(name)]
            self.dataset = {"test": Dataset.from_list(rows)}

    config = {
        "task": name,
        "test_split": "test",
        "doc_to_text": "prompt",
        "doc_to_target": "answer",
        "output_type": "generate_until",
        "generation_kwargs": {"max_gen_toks": MAX_NEW_TOKENS[name], "until": []},
        "process_results": lambda row, answers: {"passes": passes(answers[0], json.loads(row["checks"]))},
        "metric_list": [{"metric": "passes", "aggregation": "mean", "higher_is_better": True}],
    }
    return {"tasks": {name: LocalTask(config=config)}, "groups": {}}
