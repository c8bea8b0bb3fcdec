"""A version's folder as MLflow serves it: the PEFT files at its root, and MLflow's own files beside them."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlflow.pyfunc
import pandas as pd
from mlflow.models import Model, ModelSignature
from mlflow.types import ColSpec, DataType, Schema

from deal_core.adapter.files import PEFT_FILES
from infra.store.base import temporary_folder

LOADER = "infra.served_model"
PROJECT = "deal-pipeline"
MLFLOW_FILES = ("MLmodel", "conda.yaml", "python_env.yaml", "requirements.txt", "input_example.json",
                "serving_input_example.json")  # fmt: skip
REQUIREMENTS = ("accelerate", "mlflow", "pandas", "peft", "safetensors", "torch", "transformers")
"""What answering takes. This project is not among them: it is on no public index, where anybody could take its name."""
SIGNATURE = ModelSignature(
    inputs=Schema([ColSpec(DataType.string, "input"), ColSpec(DataType.string, "task", required=False)]),
    outputs=Schema([ColSpec(DataType.string, name) for name in ("output", "task", "version", "lineage")]),
)


def write_served_folder(
    adapter: Path,
    target: Path,
    *,
    card: str,
    served: Mapping[str, Any],
    served_file: str,
    example: Sequence[Mapping[str, str]],
    run_id: str,
) -> None:
    """Write what is logged of a version; the adapter's folder stays as it is.

    The state of the method is left out: it is needed to continue the version, which goes by the object store.

    Args:
        adapter: a plain PEFT folder.
        target: an empty or missing folder.
        card: the model card, which becomes README.md.
        served: what the loader needs, which becomes `served_file`.
        served_file: its name.
        example: rows of input and task.
        run_id: the MLflow run that the version comes from.
    """
    target.mkdir(parents=True, exist_ok=True)
    for name in PEFT_FILES:
        shutil.copyfile(adapter / name, target / name)
    (target / "README.md").write_text(card, encoding="utf-8")
    text = json.dumps(served, ensure_ascii=False, indent=2, allow_nan=False) + "\n"
    (target / served_file).write_text(text, encoding="utf-8")
    project = importlib.metadata.version(PROJECT)
    with temporary_folder() as temporary:
        folder = temporary / "model"
        mlflow.pyfunc.save_model(
            str(folder), loader_module=LOADER, mlflow_model=Model(run_id=run_id), signature=SIGNATURE,
            input_example=pd.DataFrame(list(example)), pip_requirements=requirements(),
            metadata={PROJECT: project, "base_model": served["base_name"], "base_sha256": served["base_sha256"]},
        )  # fmt: skip
        for name in MLFLOW_FILES:  # by name: MLflow also copies the files of a uv project that it is started in
            shutil.copyfile(folder / name, target / name)


def requirements() -> list[str]:
    """The libraries that answer here, pinned; a local build (torch's +cpu) is found on no index, so it is cut off."""
    return [f"{name}=={importlib.metadata.version(name).split('+')[0]}" for name in REQUIREMENTS]
