"""Features of texts: the hidden state of a frozen base model at the end of each prompt.

Shapes: N rows, B rows of a batch, T tokens of the longest prompt, D width of the base model.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from deal_core.data.collate import pad_batch
from deal_core.data.prompts import encode_prompt
from deal_core.data.schema import TaskSchema
from deal_core.evaluation.generation import LanguageModel, OnProgress, batches_by_length, device_of


@torch.inference_mode()
def features(
    model: LanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    task: TaskSchema,
    inputs: Sequence[str],
    *,
    max_prompt_tokens: int,
    max_batch_tokens: int,
    on_progress: OnProgress | None = None,
) -> Tensor:
    """Return the last layer's hidden state at the end of every prompt; for T5, the mean over the encoder's states.

    Returns:
        Shape (N, D), fp32, on the CPU.
    """
    model.eval()
    device, pad = device_of(model), int(tokenizer.pad_token_id or 0)
    is_seq2seq = bool(model.config.is_encoder_decoder)
    body = model.get_encoder() if is_seq2seq else model.base_model
    prompts = [encode_prompt(tokenizer, task, text, max_prompt_tokens) for text in inputs]
    found: list[Tensor] = [torch.empty(0)] * len(prompts)
    for batch in batches_by_length([len(prompt) for prompt in prompts], max_batch_tokens, len(prompts)):
        ids, mask = pad_batch([prompts[i] for i in batch], pad, side="right")
        states_BTD = body(input_ids=ids.to(device), attention_mask=mask.to(device)).last_hidden_state.float().cpu()
        last_B = mask.sum(1) - 1
        for row, i in enumerate(batch):
            own_TD = states_BTD[row, : last_B[row] + 1]
            found[i] = own_TD.mean(0) if is_seq2seq else own_TD[-1].clone()
        if on_progress is not None:
            on_progress(len(batch))
    return torch.stack(found)
