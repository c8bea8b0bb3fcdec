"""The token mask: answer tokens that the parent finds improbable carry no loss (after arXiv 2501.14315).

Token t of an answer is masked if its perplexity 1 / p(t | prompt, answer before t) is above a bound, or if it is among
the share of tokens with the largest one. p is the parent's, or the base model's before a first arrival. The input stays
as it is: the model reads masked tokens, and only the loss leaves them out.

Shapes: T answer tokens of all rows, in the order of the rows.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import torch
from datasets import Dataset
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from deal_core.adapter.files import digests_of, sha256_together
from deal_core.adapter.state import adapter_on, load_method_state
from deal_core.base_model.load import BaseModel
from deal_core.data.collate import LOSS_MASK
from deal_core.data.schema import TaskSchema
from deal_core.errors import ConfigError
from deal_core.evaluation.likelihood import read_answers
from deal_core.method_config import MethodConfig, TokenMaskConfig
from deal_core.regular_file import complete_file
from deal_core.strategies.strategy import SEED_STRIDE
from deal_core.training.train import TrainingSetup

OnProgress = Callable[[int, int], None]
MASK_FILE = "token_mask.safetensors"
"""A caller's name of the mask's file."""
HASHED_ROWS = 1024
"""Rows whose texts are in memory at once while their digest is made."""


@dataclass(frozen=True, kw_only=True)
class MaskedRows:
    """The rows with their mask.

    Attributes:
        rows: The rows with the column LOSS_MASK: for each token of an answer whether it carries loss.
        note: How many tokens were masked, for people.
    """

    rows: Dataset
    note: str


def require_no_labels(method: MethodConfig, task: TaskSchema) -> None:
    """Refuse a mask for a task with labels.

    Raises:
        ConfigError: The mask is on, and the task has labels.
    """
    if method.token_mask.is_on and task.labels:
        raise ConfigError(
            f"token_mask is for answers of several sentences; the labels of task {task.name!r} are what it would "
            "mask. Leave token_mask out; to train on the rows with small losses, set selection.score to loss and "
            "selection.pick to low."
        )


def mask_tokens(
    rows: Dataset,
    setup: TrainingSetup,
    lend_base: Callable[[], BaseModel],
    *,
    parent_folder: Path | None,
    file: Path,
    on_progress: OnProgress = lambda done, total: None,
) -> MaskedRows:
    """Mask answer tokens by `setup.method.token_mask`. A second call with the same arguments reads the first's file.

    Args:
        rows: The rows that are trained on, columns input and output.
        setup: The task, the settings and the seed.
        lend_base: Returns the base model without an adapter. It is called only if rows are read.
        parent_folder: Folder of the parent version's adapter; None for the first task of a lineage.
        file: The mask's file, which must live as long as the run's checkpoints.
        on_progress: Called with the number of rows that the model has read, and the number that it will read.

    Raises:
        ConfigError: The task has labels.
        AdapterStateError: The parent's adapter does not fit the base.
    """
    require_no_labels(setup.method, setup.task)
    key = _key(rows, setup, parent_folder)
    if (known := _read(file, key)) is None:
        known = _make(rows, setup, lend_base, parent_folder, on_progress)
        _write(file, key, *known)
    counts_T, lengths_N, bound = known
    borders = [0, *lengths_N.cumsum(0).tolist()]
    masks = [counts_T[start:end].tolist() for start, end in pairwise(borders)]
    note = _describe(counts_T, bound, setup, has_parent=parent_folder is not None)
    return MaskedRows(rows=rows.add_column(LOSS_MASK, masks), note=note)


def counted_tokens(losses_T: Tensor, is_end_T: Tensor, config: TokenMaskConfig, generator: torch.Generator) -> Tensor:
    """Return which tokens carry loss, bool. Of equal tokens the first are masked.

    Args:
        losses_T: -log p of every token, in nats.
        is_end_T: Whether a token is the end token of an answer.
        config: The settings.
        generator: Draws the tokens of `choose: random`, on the CPU.
    """
    may_be_masked_T = ~is_end_T if config.keep_end else torch.ones_like(is_end_T)
    if config.max_perplexity is not None:
        num_masked = int((may_be_masked_T & (losses_T > math.log(config.max_perplexity))).sum())
    else:
        assert config.share is not None, "the mask is on"
        num_masked = min(math.floor(config.share * len(losses_T)), int(may_be_masked_T.sum()))
    is_random = config.choose == "random"
    score_T = torch.rand(len(losses_T), generator=generator, dtype=torch.float64) if is_random else losses_T
    order_T = score_T.masked_fill(~may_be_masked_T, -math.inf).argsort(descending=True, stable=True)
    counts_T = torch.ones_like(is_end_T)
    counts_T[order_T[:num_masked]] = False
    return counts_T


def _make(
    rows: Dataset,
    setup: TrainingSetup,
    lend_base: Callable[[], BaseModel],
    parent_folder: Path | None,
    on_progress: OnProgress,
) -> tuple[Tensor, Tensor, float]:
    """Return which tokens carry loss, the number of tokens of every row, and the smallest perplexity that is masked."""
    config, base = setup.method.token_mask, lend_base()
    losses_T, lengths_N = _losses(base, rows, setup, parent_folder, on_progress)
    is_end_T = torch.zeros(len(losses_T), dtype=torch.bool)
    is_end_T[lengths_N.cumsum(0) - 1] = True  # every answer has an end token, which comes last
    num_arrivals = 0 if parent_folder is None else load_method_state(parent_folder).num_arrivals
    generator = torch.Generator().manual_seed(setup.train.seed + SEED_STRIDE * num_arrivals)
    counts_T = counted_tokens(losses_T, is_end_T, config, generator)
    return counts_T, lengths_N, float(losses_T[~counts_T].min().exp()) if not counts_T.all() else math.inf


def _losses(
    base: BaseModel, rows: Dataset, setup: TrainingSetup, parent_folder: Path | None, on_progress: OnProgress
) -> tuple[Tensor, Tensor]:
    """The loss of every answer token under the parent, shape (T,), and the number of tokens of every row, (N,)."""
    done, parts, of_rows = 0, [], []

    def progress(num_rows: int) -> None:
        nonlocal done
        done += num_rows
        on_progress(done, len(rows))

    with adapter_on(base.model, parent_folder) as model:
        for read in read_answers(
            model, base.tokenizer, setup.task, rows, max_prompt_tokens=setup.train.max_prompt_tokens,
            max_answer_tokens=setup.train.max_answer_tokens, on_progress=progress,
        ):  # fmt: skip
            is_token_BK = read.is_token.cpu()
            parts.append(read.losses.cpu()[is_token_BK])
            of_rows.append(torch.tensor(read.rows).repeat_interleave(is_token_BK.sum(1)))
    row_T = torch.cat(of_rows)
    return torch.cat(parts)[row_T.argsort(stable=True)], row_T.bincount(minlength=len(rows))


def _describe(counts_T: Tensor, bound: float, setup: TrainingSetup, *, has_parent: bool) -> str:
    config, num_masked = setup.method.token_mask, int((~counts_T).sum())
    found = f"{num_masked:,} of {len(counts_T):,} answer tokens ({num_masked / len(counts_T):.1%}) carry no loss"
    reader = "the parent version" if has_parent else "the base model"
    if config.choose == "random":
        return f"{found}; they were drawn at random"
    if config.max_perplexity is not None:
        return f"{found}: {reader} finds them a perplexity above {config.max_perplexity:g}"
    return f"{found}, those of the largest perplexity for {reader}" + (f", {bound:.2f} and more" if num_masked else "")


def _key(rows: Dataset, setup: TrainingSetup, parent_folder: Path | None) -> str:
    """Digest of all that decides the mask: settings, seed, task, parent and rows."""
    texts = hashlib.sha256()
    for start in range(0, len(rows), HASHED_ROWS):
        chunk = rows[start : start + HASHED_ROWS]
        texts.update(json.dumps([chunk["input"], chunk["output"]]).encode())
    parent = None if parent_folder is None else sha256_together(digests_of(parent_folder))
    deciding = [
        asdict(setup.method.token_mask), setup.train.deciding(), setup.task.sha256, parent, texts.hexdigest(),
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()


def _read(file: Path, key: str) -> tuple[Tensor, Tensor, float] | None:
    """Read a mask; None if there is no file, or if it is another run's."""
    if not file.is_file():
        return None
    with safe_open(file, framework="pt") as opened:
        values = opened.metadata() or {}
        if values.get("key") != key:
            return None
        return opened.get_tensor("counts"), opened.get_tensor("lengths"), float(values["bound"])


def _write(file: Path, key: str, counts_T: Tensor, lengths_N: Tensor, bound: float) -> None:
    with complete_file(file) as part:
        save_file({"counts": counts_T, "lengths": lengths_N}, part, {"key": key, "bound": repr(bound)})
