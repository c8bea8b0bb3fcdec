"""A version as MLflow serves it: the folder of its logged model, and the `loader_module` that loads the folder.

    mlflow models serve -m models:/LINEAGE@champion --env-manager local

The folder contains no pickle and no code. The model takes rows of `input` and optionally `task`, and returns rows of
`output`, `task`, `version` and `lineage`. In `deal serve` with a prediction log, rows have `id` and `confidence` too.
If an answer is no label of its task, the rows have `problem`, which is null for all other answers.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlflow.pyfunc
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.types import ColSpec, DataType, Schema

from deal_core.adapter.files import PEFT_FILES
from deal_core.errors import ConfigError
from deal_core.evaluation.answerer import UNKNOWN_VERSION, Answered, load_answerer
from deal_core.evaluation.answering import InputRow
from deal_core.safe_text import brief
from infra.settings import HomeSettings, ServingSettings
from infra.store.base import temporary_folder
from infra.tracking.client import installed_version

LOADER = "infra.served_model"
"""This module, as registered models name it."""
PROJECT = "deal-pipeline"
MLFLOW_FILES = (
    "MLmodel",
    "conda.yaml",
    "python_env.yaml",
    "requirements.txt",
    "input_example.json",
    "serving_input_example.json",
)
REQUIREMENTS = ("accelerate", "mlflow", "pandas", "peft", "safetensors", "torch", "transformers")
"""The libraries that serving needs. This project is not listed: it is in no public index, where anyone could register
its name."""
SIGNATURE = ModelSignature(
    inputs=Schema([ColSpec(DataType.string, "input"), ColSpec(DataType.string, "task", required=False)]),
    outputs=Schema([ColSpec(DataType.string, name) for name in ("output", "task", "version", "lineage")]),
)
VERSION = "version"
"""The name of the version's number in a model's metadata."""


class RowsOfTable:
    """Reads the rows of a table as a model that MLflow calls for predictions, so that MLflow has checked the table."""

    def predict(self, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> list[InputRow]:
        """Return the rows of a table with the columns `input` and optionally `task`.

        A row without a task (null) gets the newest. MLflow passes `params`, which are not used. A row that is not valid
        raises MlflowException, for which a server answers 400.
        """
        inputs = model_input["input"].tolist()
        tasks = model_input["task"].tolist() if "task" in model_input else [None] * len(inputs)
        try:
            return [_row(*row, number) for number, row in enumerate(zip(inputs, tasks, strict=True), 1)]
        except ConfigError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from error


class ServedModel:
    """A version that MLflow calls for predictions. `ask` answers rows, all with the same version."""

    def __init__(self, ask: Callable[[Sequence[InputRow]], Answered]) -> None:
        self.ask = ask

    def predict(self, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """Answer a table; errors are those of `RowsOfTable`."""
        rows = RowsOfTable().predict(model_input, params)
        try:
            return table_of(rows, self.ask(rows))
        except ConfigError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from error


def table_of(rows: Sequence[InputRow], answered: Answered) -> pd.DataFrame:
    """Return the answers to rows as a table."""
    asked = [answered.served.task(row.task) for row in rows]
    table = pd.DataFrame(
        {
            "output": answered.answers,
            "task": [row.task or answered.served.newest_task for row in rows],
            "version": answered.version,
            "lineage": answered.served.lineage,
        }
    )
    if answered.ids:
        table["id"], table["confidence"] = list(answered.ids), [sure.confidence for sure in answered.confidences]
    problems = [task and task.problem_of(text) for task, text in zip(asked, answered.answers, strict=True)]
    if any(problems):
        table["problem"] = pd.Series(problems, dtype=object)  # else pandas writes None as NaN
    return table


def _row(text: Any, task: Any, number: int) -> InputRow:
    """Return a row of a table to ask. A missing task is None or NaN."""
    if not isinstance(text, str):
        raise ConfigError(f"Row {number} has no text as its input; give the text to answer.")
    if isinstance(task, str):
        return InputRow(text, task)
    if task is None or task is pd.NA or (isinstance(task, float) and math.isnan(task)):
        return InputRow(text)
    raise ConfigError(f"Row {number} names the task {brief(task)}, which is no text; give the task's name.")


def _load_pyfunc(data_path: str) -> ServedModel:
    """Load the version in a folder. MLflow calls this function."""
    folder = Path(data_path)
    settings = ServingSettings()
    version = str((Model.load(data_path).metadata or {}).get(VERSION, UNKNOWN_VERSION))
    answerer = load_answerer(
        folder, HomeSettings().cache_dir, settings.base_model, precision=settings.serving_precision, version=version
    )
    return ServedModel(answerer.ask)


def write_served_folder(
    adapter: Path,
    target: Path,
    *,
    card: str,
    served: Mapping[str, Any],
    served_file: str,
    example: Sequence[Mapping[str, str]],
    run_id: str,
    version: str,
) -> None:
    """Write the folder of a version's logged model: the files of the plain PEFT folder `adapter`, and MLflow's files.

    The method's state is left out: only training needs it, and training reads it from the object store.

    `card` becomes README.md. `served` has the values for the loader, and becomes the file `served_file`. `example` has
    rows of input and task. `version` is the number in the lineage, which is not MLflow's.
    """
    target.mkdir(parents=True, exist_ok=True)
    for name in PEFT_FILES:
        shutil.copyfile(adapter / name, target / name)
    (target / "README.md").write_text(card, encoding="utf-8")
    text = json.dumps(served, ensure_ascii=False, indent=2, allow_nan=False) + "\n"
    (target / served_file).write_text(text, encoding="utf-8")
    # a local build such as torch's +cpu is in no index, so its suffix is cut off
    pinned = [f"{name}=={installed_version(name).split('+')[0]}" for name in REQUIREMENTS]
    project = importlib.metadata.version(PROJECT)
    with temporary_folder() as temporary:
        folder = temporary / "model"
        mlflow.pyfunc.save_model(
            str(folder),
            loader_module=LOADER,
            mlflow_model=Model(run_id=run_id),
            signature=SIGNATURE,
            input_example=pd.DataFrame(list(example)),
            pip_requirements=pinned,
            metadata={
                PROJECT: project,
                VERSION: version,
                "base_model": served["base_name"],
                "base_sha256": served["base_sha256"],
            },
        )
        for name in MLFLOW_FILES:  # by name, because MLflow also copies the uv files of the working folder
            shutil.copyfile(folder / name, target / name)
