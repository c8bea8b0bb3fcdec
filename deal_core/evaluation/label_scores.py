"""Log-probabilities of a task's labels, whatever the model would answer by itself.

Shapes: N rows, B rows of a batch, T tokens of the longest prompt, L labels, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from deal_core.base_model.language_model import LanguageModel
from deal_core.data.collate import can_be_continued, pad_batch
from deal_core.data.prompts import encode_answer, encode_prompt
from deal_core.data.schema import TaskSchema
from deal_core.evaluation.generation import (
    MAX_LOGIT_BYTES,
    OnProgress,
    Prefix,
    batches_by_length,
    device_of,
    read_prefix,
)
from deal_core.evaluation.metrics import number_labels, plain_answer

Floats = NDArray[np.float64]


@torch.inference_mode()
def label_log_probs(
    model: LanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    task: TaskSchema,
    inputs: Sequence[str],
    *,
    max_prompt_tokens: int,
    on_progress: OnProgress | None = None,
) -> Tensor:
    """Return log p(label | prompt) for every row and label of a labelled task.

    The log-probability of a label is the sum over its tokens and the end token. So the labels' probabilities sum to
    less than 1 by what the model would answer outside the options. The result has shape (N, L), fp32, on the CPU; the
    labels are in the schema's order.
    """
    model.eval()
    prompts = [encode_prompt(tokenizer, task, text, max_prompt_tokens) for text in inputs]
    labels = [encode_answer(tokenizer, task, label, max_prompt_tokens) for label in task.labels]
    found_NL = torch.zeros(len(prompts), len(labels))
    prefix = read_prefix(model, prompts)
    max_rows = MAX_LOGIT_BYTES // (8 * max(map(len, labels)) * model.config.vocab_size)
    for batch in batches_by_length([len(prompt) for prompt in prompts], max(1, max_rows)):
        chosen, pad = [prompts[i] for i in batch], int(tokenizer.pad_token_id or 0)
        if model.config.is_encoder_decoder:
            found_NL[batch] = _score_seq2seq(model, chosen, labels, pad)
        else:
            found_NL[batch] = _score_decoder(model, chosen, labels, pad, prefix)
        if on_progress is not None:
            on_progress(len(batch))
    return found_NL


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
    found = []
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
        found.append(score_B)
    return torch.stack(found, 1).cpu()


def _score_seq2seq(
    model: LanguageModel, prompts: Sequence[Sequence[int]], labels: Sequence[Sequence[int]], pad: int
) -> Tensor:
    """Encode the prompts once, then decode every label."""
    device = device_of(model)
    input_ids, mask = (each.to(device) for each in pad_batch(prompts, pad, side="right"))
    encoded = model.get_encoder()(input_ids=input_ids, attention_mask=mask)
    found = []
    for label in labels:
        ids = torch.tensor([[model.config.decoder_start_token_id, *label[:-1]]], device=device)
        logits_BKV = model(
            encoder_outputs=encoded, attention_mask=mask, decoder_input_ids=ids.expand(len(prompts), -1)
        ).logits
        found.append(_chosen(logits_BKV, label))
    return torch.stack(found, 1).cpu()


def _chosen(logits_BKV: Tensor, tokens: Sequence[int]) -> Tensor:
    """Sum of the tokens' log-probabilities, one per row."""
    index = torch.tensor(list(tokens), device=logits_BKV.device)[None, :, None].expand(len(logits_BKV), -1, 1)
    return logits_BKV.float().log_softmax(-1).gather(-1, index).sum((1, 2))
