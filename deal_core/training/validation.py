"""Validation: rows that are held back from a training decide which of its steps is kept, and when it ends early.

Twice an epoch, and after the last step, the model reads these rows. The tensors of the best step so far are in a file
beside the checkpoints, and each checkpoint has a copy: a resumed training ends as one that was not interrupted.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from deal_core.base_model.language_model import device_of
from deal_core.base_model.sharding import in_step
from deal_core.data.collate import answer_logits
from deal_core.evaluation.batches import in_batches, rows_with_logits
from deal_core.regular_file import complete_file
from deal_core.strategies.strategy import Strategy
from deal_core.training.objective import Objective

PER_EPOCH = 2
"""Validations in an epoch."""
PATIENCE = 3
"""The training ends after as many validations that are no better than an earlier one."""
VALIDATION_LOSS = "validation_loss"
BEST_FILE = "best.safetensors"
_FACTOR, _STRATEGY = "factor.", "strategy."
_LOGIT_COPIES = 3 * 4
"""Bytes for each logit."""


class Validation:
    """The rows that are held back, and what they say of the steps so far.

    Args:
        rows: Tokenised rows, as the training has them.
        num_steps: Steps of the whole training.
        steps_of_epoch: Steps of an epoch.
        folder: Folder of the checkpoints.
    """

    def __init__(self, rows: Dataset, *, num_steps: int, steps_of_epoch: int, folder: Path) -> None:
        self._rows = rows
        self._num_steps = num_steps
        self._every = max(1, math.ceil(steps_of_epoch / PER_EPOCH))
        self._file = folder / BEST_FILE
        self.losses: list[tuple[int, float]] = []
        """(step, mean loss per token that counts) of each validation."""

    @property
    def num_rows(self) -> int:
        """Rows that are held back."""
        return len(self._rows)

    @property
    def best_step(self) -> int | None:
        """The step with the smallest loss, the first one of equal ones; None: no loss was finite."""
        finite = self.finite_losses
        return min(finite, key=lambda point: (point[1], point[0]))[0] if finite else None

    @property
    def finite_losses(self) -> tuple[tuple[int, float], ...]:
        """The validations whose loss is a finite number."""
        return tuple((step, loss) for step, loss in self.losses if math.isfinite(loss))

    @property
    def is_over(self) -> bool:
        """Whether the training has not become better for PATIENCE validations."""
        best = self.best_step
        return best is not None and sum(step > best for step, _ in self.losses) >= PATIENCE

    def is_due(self, step: int) -> bool:
        """Whether the rows are read after a step, counted from 1."""
        return step % self._every == 0 or step == self._num_steps

    @torch.no_grad()
    def measure(
        self,
        model: PeftModel,
        collate: Callable[[Sequence[Mapping[str, Any]]], Mapping[str, Tensor]],
        objective: Objective,
    ) -> float:
        """Return the mean loss of the rows per token that counts. Processes divide the rows; all get the same loss."""
        state = PartialState()
        own = self._rows.select(range(state.process_index, len(self._rows), state.num_processes))
        sums = torch.zeros(2, dtype=torch.float64)  # the loss, and its weight

        def read(batch: list[int]) -> Tensor:
            inputs = {name: value.to(device_of(model)) for name, value in collate([own[i] for i in batch]).items()}
            loss = objective.loss_sum(answer_logits(model, inputs), inputs)
            return torch.stack([loss, objective.weight([inputs])]).double().cpu()

        model.eval()
        longest_answer = max(map(len, own["answer_ids"]), default=1)
        max_rows = rows_with_logits(model, max(1, longest_answer), num_bytes=_LOGIT_COPIES)
        with in_step(model):
            for _, of_batch in in_batches(model, list(own["length"]), read, max_rows=max_rows):
                sums += of_batch
        loss, weight = reduce(sums.to(state.device, torch.float32), "sum").tolist()
        return float(loss / weight) if weight else math.nan

    def keep(self, model: PeftModel, strategy: Strategy) -> None:
        """Write the tensors of the current step, in place of those of an earlier one."""
        tensors: dict[str, Tensor] = {f"{_FACTOR}{name}": p for name, p in model.named_parameters() if ".lora_" in name}
        tensors |= {f"{_STRATEGY}{name}": tensor for name, tensor in strategy.checkpoint().items()}
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with complete_file(self._file) as part:
            save_tensors(tensors, part)

    def add_to(self, checkpoint: Path) -> None:
        """Give a checkpoint the tensors of the best step so far."""
        if self._file.is_file():
            shutil.copyfile(self._file, checkpoint / BEST_FILE)

    def resume(self, checkpoint: Path | None, losses: Sequence[tuple[int, float]]) -> None:
        """Go on from a checkpoint, with the validations until then; None: from the beginning."""
        self.losses = list(losses)
        if PartialState().is_main_process:
            self._file.unlink(missing_ok=True)
            if checkpoint is not None and (checkpoint / BEST_FILE).is_file():
                shutil.copyfile(checkpoint / BEST_FILE, self._file)

    def put_back(self, model: PeftModel, strategy: Strategy) -> None:
        """Give the model and the strategy the tensors of the best step."""
        tensors = load_file(self._file)
        strategy.restore({name.removeprefix(_STRATEGY): t for name, t in tensors.items() if name.startswith(_STRATEGY)})
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if f"{_FACTOR}{name}" in tensors:
                    parameter.copy_(tensors[f"{_FACTOR}{name}"])

    def describe(self, num_steps: int) -> str:
        """A note for people; `num_steps` were taken."""
        if self.best_step is None:
            return f"validation: {self.num_rows} rows were held back, and no loss of theirs was finite"
        loss = dict(self.losses)[self.best_step]
        early = f"; the training ended early, at step {num_steps} of {self._num_steps}" * (num_steps < self._num_steps)
        return (
            f"validation: of {num_steps} steps, step {self.best_step} is kept, where the loss of {self.num_rows} rows "
            f"that were held back was smallest ({loss:.3f}){early}"
        )


def save_tensors(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Write tensors that a training still uses; parts of a larger tensor are written as tensors of their own."""
    save_file({name: t.detach().clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}, file)
