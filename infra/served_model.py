"""What MLflow loads to serve a version: the `loader_module` of its logged model (no pickle, no code in the artifact).

    mlflow models serve -m models:/LINEAGE@champion --env-manager local

The model takes rows of `input` and, if wanted, `task`, and gives rows of `output`, `task`, `version` and `lineage`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from mlflow.exceptions import MlflowException

from deal_core.errors import ConfigError
from deal_core.evaluation.answerer import UNKNOWN_VERSION, Answerer, load_answerer
from deal_core.evaluation.answering import InputRow, read_served
from infra.settings import HomeSettings, ServingSettings

REGISTERED_FILE = "registered_model_meta"
"""MLflow writes it beside a model that it fetches by the name of a version: the number is not known before."""
SERVED_VERSION = "DEAL_SERVED_VERSION"
VERSION = "version"
"""Where a table of answers names the version that gave them: among its attributes."""


class ServedModel:
    """A version that MLflow asks for predictions."""

    def __init__(self, answerer: Answerer, is_given_up: Callable[[], bool] = lambda: False) -> None:
        self.answerer = answerer
        self._is_given_up = is_given_up

    def predict(self, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """Answer a table of rows.

        Args:
            model_input: columns `input` and, if wanted, `task`; a row without a task gets the newest.
            params: there are none; MLflow passes the argument.

        Raises:
            MlflowException: a row cannot be asked; a server answers 400 then.
        """
        inputs = model_input["input"].tolist()
        tasks = model_input["task"].tolist() if "task" in model_input else [None] * len(inputs)
        try:
            if any(not isinstance(text, str) for text in inputs):
                raise ConfigError(f"Row {_first_missing(inputs)} has no text as its input; give the text to answer.")
            named = [task if isinstance(task, str) else None for task in tasks]  # a missing one comes as NaN
            rows = [InputRow(text, task) for text, task in zip(inputs, named, strict=True)]
            found = self.answerer.ask(rows, self._is_given_up)
        except ConfigError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from error
        table = pd.DataFrame({
            "output": found.answers,
            "task": [row.task or found.served.newest_task for row in rows],
            "version": found.version,
            "lineage": found.served.lineage,
        })  # fmt: skip
        table.attrs[VERSION] = found.version  # a table without rows names it too
        return table


def _load_pyfunc(data_path: str) -> ServedModel:
    """MLflow's entry point: load the version whose folder this is."""
    folder = Path(data_path)
    settings = ServingSettings()
    version = _version_of(folder, read_served(folder).lineage)
    return ServedModel(load_answerer(
        folder, HomeSettings().cache_dir, settings.base_model, precision=settings.serving_precision, version=version
    ))  # fmt: skip


def _version_of(folder: Path, lineage: str) -> str:
    """The version's number: as who starts the server says, else as MLflow noted when it fetched the folder."""
    if number := os.environ.get(SERVED_VERSION):
        return number
    path = folder / REGISTERED_FILE
    if not path.is_file():
        return UNKNOWN_VERSION
    noted = yaml.safe_load(path.read_text(encoding="utf-8"))
    name, number = str(noted["model_name"]), str(noted["model_version"])
    return number if name == lineage else f"{name}/{number}"  # a copy under another name counts for itself


def _first_missing(inputs: list[Any]) -> int:
    return next(number for number, text in enumerate(inputs, 1) if not isinstance(text, str))
