"""Where a training's figures go in addition to MLflow: TensorBoard, Weights & Biases, Trackio."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from deal_core.config import ReportTool
from deal_core.errors import ConfigError

if TYPE_CHECKING:
    from transformers import Trainer


@dataclass(frozen=True, kw_only=True)
class Reporting:
    """The names under which the tools of `train.report_to` show a training.

    Attributes:
        project: Trackio's project. Weights & Biases takes its project from WANDB_PROJECT.
        run: Name of the run.
        folder: Folder for TensorBoard's event files.
    """

    project: str
    run: str
    folder: Path


def require_installed(tools: Sequence[ReportTool]) -> None:
    """Check that the tools of `train.report_to` are installed.

    Raises:
        ConfigError: One is not.
    """
    for tool in tools:
        if importlib.util.find_spec(tool) is None:
            raise ConfigError(
                f"train.report_to names {tool}, which is not installed here; pip install {tool}, or leave it out."
            )


@contextmanager
def reported(trainer: Trainer, reporting: Reporting | None) -> Iterator[None]:
    """Let TensorBoard write into the training's folder, and end the run of Weights & Biases with the training.

    Raises:
        ConfigError: Weights & Biases cannot be used, as without an API key.
    """
    from transformers.integrations.integration_utils import TensorBoardCallback

    tools = trainer.args.report_to or ()
    for callback in trainer.callback_handler.callbacks:
        if reporting is not None and isinstance(callback, TensorBoardCallback):
            callback.logging_dir = str(reporting.folder)
    with ExitStack() as stack:
        if tools:  # Trackio prints, and stdout may be JSON
            stack.enter_context(redirect_stdout(sys.stderr))
        if "wandb" in tools:
            stack.enter_context(_run_of_wandb())
        yield


@contextmanager
def _run_of_wandb() -> Iterator[None]:
    import wandb

    try:
        yield
    except wandb.Error as error:
        raise ConfigError(f"train.report_to names wandb, which says: {error}") from error
    finally:
        wandb.finish()  # else the next training of this process would continue the run
