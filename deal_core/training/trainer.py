"""A thin subclass of transformers' Trainer: answer-only logits, a strategy's hooks, checkpoints that resume exactly.

Gradient accumulation, gradient checkpointing, clipping and several processes come from Trainer and accelerate. A
training's figures go to the caller.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import broadcast, gather, reduce
from accelerate.utils.memory import should_reduce_batch_size
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from deal_core.config import TrainConfig
from deal_core.data.collate import add_blank_row, answer_logits
from deal_core.data.order import BucketSampler
from deal_core.errors import AdapterStateError, DeviceMemoryError, TrainingDivergedError
from deal_core.regular_file import complete_file, flush_to_disk
from deal_core.strategies.rehearsal import at_answers
from deal_core.strategies.strategy import Strategy
from deal_core.training.objective import Objective
from deal_core.training.validation import VALIDATION_LOSS, Validation, save_tensors

OnLog = Callable[[int, Mapping[str, float]], None]
OnCheckpoint = Callable[[Path], None]
STRATEGY_TENSORS = "strategy.safetensors"
COMPLETE = "COMPLETE"
HISTORY_FILE = "steps.jsonl"
"""The figures of all steps, beside the checkpoints: to write the whole history with each of them would take long."""
NUM_CHECKPOINTS = 2
"""Checkpoints that are kept."""
TOLERANCE = 1e-4
"""Largest allowed difference from rank 0, relative to the parameter's norm; equal steps on equal devices give 0."""
TINY = 1e-12
FUSED_ON = ("cuda",)
"""Devices on which a step of AdamW is one kernel."""
APART_ON = ("cpu",)
"""Devices on which rehearsed rows are read apart from the new ones: there rows of one task share their prefix. Others
read both at once unless the new ones share a prefix: a pass over a few rows takes about as long as one over many."""


def training_arguments(train: TrainConfig, checkpoint_folder: Path, num_steps: int, rate: float) -> TrainingArguments:
    """Translate this project's settings into transformers' TrainingArguments. `rate` is that of the first step."""
    save_steps = train.checkpoint_steps
    args = TrainingArguments(
        output_dir=str(checkpoint_folder),
        per_device_train_batch_size=train.batch_size // train.num_processes,
        gradient_accumulation_steps=train.gradient_accumulation_steps,
        learning_rate=rate,
        lr_scheduler_type=train.schedule,
        warmup_steps=round(train.warmup_share * num_steps),
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
        max_steps=num_steps,
        logging_steps=1,
        save_strategy="steps" if 0 < save_steps < num_steps else "no",
        save_steps=max(save_steps, 1),
        save_total_limit=None,  # `_save_checkpoint` removes old ones
        seed=train.seed,
        gradient_checkpointing=train.gradient_checkpointing,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        logging_nan_inf_filter=False,
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,
    )
    if args.device.type == "cuda":  # a process trains on one device; Trainer would spread the batch over all it sees
        args._n_gpu = 1
    return args


class AdapterTrainer(Trainer):
    """Runs Trainer's loop with a strategy's parameters in the optimiser.

    The order of a step is that of `deal_core.strategies.strategy`. With several processes, each takes its share of
    every batch and of the rehearsal. The gradients of the factors are averaged over the processes; from before_step on,
    all processes do the same. Accelerate's wrapper averages them, or this class does if the base model is sharded.
    """

    loss_is_scaled_for_ga = True  # compute_loss divides by the weight of the whole accumulated batch

    def __init__(
        self,
        *,
        args: TrainingArguments,
        train_dataset: Dataset,
        strategy: Strategy,
        objective: Objective,
        balance_labels: bool = False,
        is_sharded: bool = False,
        validation: Validation | None = None,
        on_log: OnLog | None = None,
        on_checkpoint: OnCheckpoint | None = None,
        **kwargs: Any,
    ) -> None:
        self._lengths = list(train_dataset["length"])
        self._labels = [tuple(ids) for ids in train_dataset["answer_ids"]] if balance_labels else None
        if args.world_size > 1:
            train_dataset = add_blank_row(train_dataset)
        super().__init__(args=args, train_dataset=train_dataset, **kwargs)
        self._is_sharded, self._on_checkpoint = is_sharded, on_checkpoint
        if is_sharded:
            assert self.model is not None
            vars(self.model)["_is_accelerate_prepared"] = True  # else accelerate wraps it once more
        self.strategy = strategy
        self._rehearsal = strategy.rehearsal()
        self._reads_apart = False
        self._objective = objective
        self._validation = validation
        self.remove_callback(PrinterCallback)
        self._steps = _Steps(strategy, on_log, Path(str(self.args.output_dir)) / HISTORY_FILE)
        self.add_callback(self._steps)

    def run(self, checkpoint: Path | None) -> None:
        """Train, from a checkpoint if one is given.

        Raises:
            DeviceMemoryError: A step does not fit into the memory; the checkpoints stay.
            AdapterStateError: The processes did not end with the same parameters.
        """
        if checkpoint is not None and (checkpoint / STRATEGY_TENSORS).is_file():
            self.strategy.restore(load_file(checkpoint / STRATEGY_TENSORS))
        if self._validation is not None:
            until = 0 if checkpoint is None else step_of(checkpoint)
            earlier = [figures for figures in self._steps.read() if figures["step"] <= until]
            losses = [(int(step["step"]), step[VALIDATION_LOSS]) for step in earlier if VALIDATION_LOSS in step]
            self._validation.resume(checkpoint, losses)
        try:
            self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
            raise DeviceMemoryError(
                f"A step of the training does not fit into the memory of {self.args.device}, with "
                f"{self.args.train_batch_size} rows at once; set train.gradient_checkpointing: true, or lower "
                "train.max_prompt_tokens."
            ) from None
        if self.args.world_size > 1:
            require_in_step(self.strategy.parameters())
        # the first process alone has the best step's tensors, and saves the adapter
        if self._validation is not None and self.args.should_save:
            best = self._validation.best_step
            if best not in (None, self.state.global_step):
                self._validation.put_back(self._adapted, self.strategy)

    def _get_train_sampler(self, train_dataset: Any = None) -> BucketSampler:
        """Rows in the order of steps: how a step is divided into micro-batches does not change which rows share it."""
        num_rows, num_processes = len(self._lengths), self.args.world_size
        return BucketSampler(
            self._lengths,
            self.args.train_batch_size * num_processes * self.args.gradient_accumulation_steps,
            self.args.seed,
            labels=self._labels,
            blank=num_rows if num_processes > 1 else None,
        )

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW over the strategy's parameters, which need not be parameters of the model."""
        if self.optimizer is None:
            self.optimizer = torch.optim.AdamW(
                list(self.strategy.parameters()),
                lr=self.args.learning_rate,
                weight_decay=self.args.weight_decay,
                fused=self.args.device.type in FUSED_ON or None,  # None: PyTorch chooses between loops
            )
        return self.optimizer

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The objective's sum over the batch, divided by the weight of the accumulated batch; 0 if nothing counts.

        The loss of rehearsed rows that are read with the batch is added.
        """
        rehearsal, share = self._rehearsal, None
        self._reads_apart = self.args.device.type in APART_ON or "prefix_ids" in inputs
        if rehearsal is not None and not self._reads_apart and self.accelerator.sync_gradients:
            share = rehearsal.share(
                self.state.global_step, rank=self.args.process_index, num_processes=self.args.world_size
            )
        whole = inputs if rehearsal is None or share is None else rehearsal.beside(inputs, share.rows)
        logits, num_own = answer_logits(model, whole), len(inputs["labels"])
        own = {**inputs, "labels": whole["labels"][:num_own]}  # as wide as the logits
        loss = self._objective.loss_sum(logits[:num_own], own) / num_items_in_batch * self.accelerator.num_processes
        self._own_loss: Tensor = loss.detach()
        if rehearsal is not None and share is not None:
            loss = loss + rehearsal.loss_of(share, at_answers(share.rows, logits, whole))
        return loss

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor:
        """The weight of the accumulated batch, over all processes."""
        weight = self._objective.weight(batch_samples).to(device)
        if self.args.world_size > 1:
            weight = self.accelerator.gather(weight).sum()
        return weight.clamp(min=1)  # an empty batch has loss 0

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """One micro-batch. After a step's last micro-batch, the strategy's parameters get their gradients.

        Returns the loss of the new rows alone.
        """
        super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients:
            if self._rehearsal is not None and self._reads_apart:
                rehearsed = self._rehearsal.loss(
                    self.model_wrapped,
                    self.state.global_step,
                    rank=self.args.process_index,
                    num_processes=self.args.world_size,
                )
                if rehearsed is not None:
                    torch.autograd.backward(rehearsed)
            if self._is_sharded:
                assert self.model is not None
                average_gradients(self.model.parameters())
            self.strategy.before_step()
            penalty = self.strategy.penalty()
            if penalty is not None:
                torch.autograd.backward(penalty)
        return self._own_loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Report the figures of a step, with the loss of the rows that are held back if they are due."""
        validation, step = self._validation, self.state.global_step
        if validation is None or "loss" not in logs or not validation.is_due(step):
            super().log(logs, start_time)
            return
        loss = validation.measure(self._adapted, cast(Any, self.data_collator), self._objective)
        validation.losses.append((step, loss))
        if self.args.should_save and validation.best_step == step:
            validation.keep(self._adapted, self.strategy)
        super().log({**logs, VALIDATION_LOSS: loss}, start_time)
        if validation.is_over:
            self.control.should_training_stop = True
            self.control.should_save = False  # from a checkpoint of the last step, one step too many would be taken

    @property
    def _adapted(self) -> PeftModel:
        assert isinstance(self.model, PeftModel)
        return self.model

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        return self.accelerator.clip_grad_norm_(self.strategy.parameters(), self.args.max_grad_norm)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        if grad_norm is not None:
            return grad_norm
        # the norm is reported even if clipping is off
        return self.accelerator.clip_grad_norm_(self.strategy.parameters(), float("inf"))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        steps, self.state.log_history = self.state.log_history, []  # they are in HISTORY_FILE
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.state.log_history = steps
        self.accelerator.wait_for_everyone()  # each process writes its own file
        folder = Path(str(self.args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            self._complete(folder, steps)
        if self._on_checkpoint is not None:
            self._on_checkpoint(folder)

    def _complete(self, folder: Path, steps: Sequence[Mapping[str, float]]) -> None:
        """Add to a checkpoint what this project keeps, and remove old checkpoints."""
        if tensors := self.strategy.checkpoint():
            save_tensors(tensors, folder / STRATEGY_TENSORS)
        self._steps.keep(steps)
        if self._validation is not None:
            self._validation.add_to(folder)
        flush_to_disk(folder)
        (folder / COMPLETE).touch()  # written last: a folder without it does not count
        rotate_checkpoints(str(self.args.output_dir), save_total_limit=NUM_CHECKPOINTS)  # by step: a clock may go back


class _Steps(TrainerCallback):
    """Lets the strategy act after every step, reports the step's figures and keeps them for a resume.

    A step is checked before its checkpoint is written, so no checkpoint holds parameters that are not finite.
    """

    def __init__(self, strategy: Strategy, on_log: OnLog | None, file: Path) -> None:
        self._strategy, self._on_log = strategy, on_log
        self._file, self._num_kept = file, 0

    def keep(self, steps: Sequence[Mapping[str, float]]) -> None:
        """Append the steps that the file does not have."""
        with self._file.open("a", encoding="utf-8") as stream:
            stream.write(_as_lines(steps[self._num_kept :]))
        flush_to_disk(self._file)
        self._num_kept = len(steps)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """After a resume, read the earlier steps and report them again: a killed process may not have reported all."""
        state.log_history = [figures for figures in self.read() if figures["step"] <= state.global_step]
        self._num_kept = len(state.log_history)
        if args.should_save and args.save_strategy != "no":
            with complete_file(self._file) as part:
                part.write_text(_as_lines(state.log_history), encoding="utf-8")
        for figures in state.log_history:
            self._report(int(figures["step"]), figures)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Let the strategy update the adapter."""
        self._strategy.after_step()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        """Report a step.

        Raises:
            TrainingDivergedError: Its loss or the norm of its gradient is not finite.
        """
        for name in ("loss", "grad_norm"):
            value = float((logs or {}).get(name, 0.0))
            if not math.isfinite(value):
                shutil.rmtree(self._file.parent, ignore_errors=True)  # an earlier step may have diverged already
                raise TrainingDivergedError(
                    f"The {name.replace('_', ' ')} of step {state.global_step} is {value}: the training diverged. "
                    f"Lower train.learning_rate (it is {args.learning_rate:g}), or look for odd rows."
                )
        self._report(state.global_step, logs or {})

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Keep no checkpoint of the last step: from there, Trainer would take one step too many."""
        if state.global_step >= state.max_steps:
            control.should_save = False

    def _report(self, step: int, figures: Mapping[str, float]) -> None:
        if self._on_log is not None and "loss" in figures:
            names = ("loss", "grad_norm", VALIDATION_LOSS)
            values = {name: float(figures[name]) for name in names if name in figures}
            self._on_log(step, {name: value for name, value in values.items() if math.isfinite(value)})

    def read(self) -> Iterator[dict[str, float]]:
        """The figures of the steps in the file."""
        lines = self._file.read_text(encoding="utf-8").splitlines() if self._file.is_file() else []
        with suppress(ValueError):  # a kill may have cut the last line, which is of a step after the checkpoint
            yield from map(json.loads, lines)


def _as_lines(steps: Sequence[Mapping[str, float]]) -> str:
    return "".join(json.dumps(figures) + "\n" for figures in steps)


def step_of(checkpoint: Path) -> int:
    """Return the step after which a checkpoint was written, from the name of its folder."""
    return int(checkpoint.name.rsplit("-", 1)[1])


def find_checkpoint(folder: Path) -> Path | None:
    """Return the newest complete checkpoint; remove incomplete ones that a killed process left."""
    checkpoints = {}
    for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        if (path / COMPLETE).is_file():
            checkpoints[step_of(path)] = path
        else:
            shutil.rmtree(path)
    return checkpoints[max(checkpoints)] if checkpoints else None


@torch.no_grad()
def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Average the gradients of the trainable parameters over the processes. Every process must call this function."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
    means = reduce(torch.cat([gradient.flatten() for gradient in gradients]), "mean")
    for parameter, mean in zip(trained, means.split([p.numel() for p in trained]), strict=True):
        parameter.grad = mean.view_as(parameter)


@torch.no_grad()
def require_in_step(parameters: Iterable[nn.Parameter]) -> None:
    """Compare every rank's parameters with rank 0's. Every rank must call this function.

    Raises:
        AdapterStateError: The parameters of a rank differ; raised on all ranks.
    """
    differences = []
    for parameter in parameters:
        first: Tensor = broadcast(parameter.detach().clone())
        differences.append((parameter - first).norm() / (first.norm() + TINY))
    largest_N = gather(torch.stack(differences).max().reshape(1))
    if bool((largest_N > TOLERANCE).any()):
        rank = int(largest_N.argmax())
        raise AdapterStateError(
            f"After the training rank {rank} holds other parameters than rank 0 (relative difference "
            f"{float(largest_N[rank]):.1e}), so the adapter is not saved; train with train.num_processes 1."
        )
