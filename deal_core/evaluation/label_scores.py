"""Log-probabilities of a task's labels, and offsets that take a preference for some of the labels away.

A model can know a task and still answer one label too often. Its accuracy then falls although nothing was forgotten. An
offset per label takes the preference away: the answer is argmax(log p(label | prompt) + offset). This is Batch
Calibration (arXiv 2309.17249) with the labels' true shares instead of equal ones.

Shapes: N rows, B rows of a batch, L labels, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from scipy.special import softmax
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from deal_core.base_model.language_model import LanguageModel, device_of
from deal_core.data.collate import can_be_continued, pad_batch
from deal_core.data.prompts import encode_answer, encode_prompt
from deal_core.data.schema import TaskSchema
from deal_core.evaluation.batches import in_batches, rows_with_logits
from deal_core.evaluation.generation import Prefix, read_prefix
from deal_core.evaluation.metrics import number_labels, plain_answer

Floats = NDArray[np.float64]
NUM_ROUNDS = 200
"""Most rounds of the fixed point that finds the offsets; it settles within some dozens."""
TOLERANCE = 1e-7
"""The rounds end when no offset changes by more."""
DAMPING = 0.7
"""Share of each round's correction that is applied."""
PRIOR_ROWS = 10
"""Rows that speak for no offset: with as many rows of its own, a task gets half of its offsets."""


def label_log_probs(
    model: LanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    task: TaskSchema,
    inputs: Sequence[str],
    *,
    max_prompt_tokens: int,
) -> Tensor:
    """Return log p(label | prompt) for every row and label of a labelled task.

    The log-probability of a label is the sum over its tokens and the end token. So the labels' probabilities sum to
    less than 1 by what the model would answer outside the options. The result has shape (N, L), fp32, on the CPU; the
    labels are in the schema's order.
    """
    prompts = [encode_prompt(tokenizer, task, text, max_prompt_tokens) for text in inputs]
    labels = [encode_answer(tokenizer, task, label, max_prompt_tokens) for label in task.labels]
    return score_labels(model, tokenizer, prompts, labels)


@torch.inference_mode()
def score_labels(
    model: LanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    labels: Sequence[Sequence[int]],
) -> Tensor:
    """As `label_log_probs`, for prompts and labels that are tokens already."""
    model.eval()
    log_probs_NL = torch.zeros(len(prompts), len(labels))
    prefix = read_prefix(model, prompts)
    pad = int(tokenizer.pad_token_id or 0)

    def score(batch: list[int]) -> Tensor:
        chosen = [prompts[i] for i in batch]
        if model.config.is_encoder_decoder:
            return _score_seq2seq(model, chosen, labels, pad)
        return _score_decoder(model, chosen, labels, pad, prefix)

    max_rows = rows_with_logits(model, max(map(len, labels)), num_bytes=8)
    for batch, log_probs_BL in in_batches(model, [len(prompt) for prompt in prompts], score, max_rows=max_rows):
        log_probs_NL[batch] = log_probs_BL
    return log_probs_NL


def label_scores(
    model: LanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    task: TaskSchema,
    rows: Dataset,
    *,
    max_prompt_tokens: int,
) -> tuple[Floats, NDArray[np.int64]]:
    """Return the labels' log-probabilities (N, L), and the number of each row's right label (N)."""
    numbers = number_labels(task.labels)
    targets_N = np.array([numbers[plain_answer(output)] for output in rows["output"]])
    log_probs_NL = label_log_probs(model, tokenizer, task, list(rows["input"]), max_prompt_tokens=max_prompt_tokens)
    return log_probs_NL.double().numpy(), targets_N


def _score_decoder(
    model: LanguageModel, prompts: Sequence[Sequence[int]], labels: Sequence[Sequence[int]], pad: int, prefix: Prefix
) -> Tensor:
    """Read the prompts once, then every label after them. The cache is cut back to the prompts after each label."""
    device, num_rows = device_of(model), len(prompts)
    input_ids, own_mask = pad_batch([prompt[prefix.length :] for prompt in prompts], pad, side="left")
    mask = torch.cat([torch.ones(num_rows, prefix.length, dtype=torch.long), own_mask], 1).to(device)
    lengths_B1 = mask.sum(1, keepdim=True)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, prefix.length :]
    output = model(
        input_ids=input_ids.to(device),
        attention_mask=mask,
        position_ids=positions,
        cache=prefix.repeated(num_rows),
        use_cache=True,
        logits_to_keep=torch.tensor([-1], device=device),
    )
    cache, first_BV = output.cache, output.logits[:, -1].float().log_softmax(-1)
    can_be_cut = can_be_continued(cache)  # else every label extends a copy
    scores = []
    for label in labels:
        score_B = first_BV[:, label[0]]
        if len(label) > 1:
            ids = torch.tensor([list(label[:-1])], device=device).expand(num_rows, -1)
            logits_BKV = model(
                input_ids=ids,
                attention_mask=torch.cat([mask, torch.ones_like(ids)], 1),
                position_ids=lengths_B1 + torch.arange(ids.shape[1], device=device),
                use_cache=True,
                cache=cache if can_be_cut else copy.deepcopy(cache),
            ).logits
            score_B = score_B + _chosen(logits_BKV, label[1:])
            if can_be_cut:
                cache.crop(-ids.shape[1])
        scores.append(score_B)
    return torch.stack(scores, 1).cpu()


def _score_seq2seq(
    model: LanguageModel, prompts: Sequence[Sequence[int]], labels: Sequence[Sequence[int]], pad: int
) -> Tensor:
    """Encode the prompts once, then decode every label."""
    device = device_of(model)
    input_ids, mask = (part.to(device) for part in pad_batch(prompts, pad, side="right"))
    encoded = model.get_encoder()(input_ids=input_ids, attention_mask=mask)
    scores = []
    for label in labels:
        ids = torch.tensor([[model.config.decoder_start_token_id, *label[:-1]]], device=device)
        logits_BKV = model(
            encoder_outputs=encoded, attention_mask=mask, decoder_input_ids=ids.expand(len(prompts), -1)
        ).logits
        scores.append(_chosen(logits_BKV, label))
    return torch.stack(scores, 1).cpu()


def _chosen(logits_BKV: Tensor, tokens: Sequence[int]) -> Tensor:
    """Sum of the tokens' log-probabilities, one per row."""
    index = torch.tensor(list(tokens), device=logits_BKV.device)[None, :, None].expand(len(logits_BKV), -1, 1)
    return logits_BKV.float().log_softmax(-1).gather(-1, index).sum((1, 2))


def offsets(log_probs_NL: Floats, shares_L: Floats) -> Floats:
    """Return b with mean over rows of softmax(log p + b) = shares; labels with share 0 get no answers."""
    goal_L = np.maximum(shares_L, 1e-6)
    offsets_L: Floats = np.zeros(log_probs_NL.shape[1])
    for _ in range(NUM_ROUNDS):
        mean_L = softmax(log_probs_NL + offsets_L, axis=1).mean(0)
        change_L = DAMPING * (np.log(goal_L) - np.log(np.maximum(mean_L, 1e-12)))
        offsets_L += change_L
        if np.abs(change_L).max() <= TOLERANCE:
            break
    centred_L: Floats = offsets_L - offsets_L.mean()
    return centred_L


def label_offsets(log_probs_NL: Floats, targets_N: NDArray[np.int64]) -> Floats:
    """Return the offsets to learn. Only the shares of the labels `targets_N` count, not whose label is which.

    Few rows give smaller offsets. Every label counts once more than it occurs. A label without rows has offset 0, the
    mean of the others: it may be too new to have test rows.
    """
    num_rows, num_labels = log_probs_NL.shape
    counts_L = np.bincount(targets_N, minlength=num_labels)
    is_there_L = counts_L > 0
    shares_L = (counts_L[is_there_L] + 1) / (num_rows + is_there_L.sum())
    offsets_L: Floats = np.zeros(num_labels)
    offsets_L[is_there_L] = num_rows / (num_rows + PRIOR_ROWS) * offsets(log_probs_NL[:, is_there_L], shares_L)
    return offsets_L


def recentred_accuracy(log_probs_NL: Floats, targets_N: NDArray[np.int64]) -> float:
    """Accuracy if every label is answered as often as it occurs. It does not change if one label is favoured."""
    return float(recentred_hits(log_probs_NL, targets_N).sum() / max(1, len(targets_N)))


def recentred_hits(log_probs_NL: Floats, targets_N: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which rows are answered rightly if every label is answered as often as it occurs.

    The offsets of a row come from the rows of the other half. Without rows there, a row has no offsets.
    """
    scores_NL, halves_N = log_probs_NL.copy(), np.arange(len(targets_N)) % 2
    for half in (0, 1):
        others = halves_N != half
        if others.any():
            counts_L = np.bincount(targets_N[others], minlength=log_probs_NL.shape[1])
            scores_NL[~others] += offsets(log_probs_NL[others], counts_L / counts_L.sum())
    return np.asarray(scores_NL.argmax(1) == targets_N)
