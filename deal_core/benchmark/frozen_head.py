"""The bound `frozen_head`: a linear classifier per task on features of the untouched base model.

Nothing of the base model is trained, so nothing can be forgotten. A reviewer's question is what an adapter adds to it.
The classifier is a linear discriminant analysis with Ledoit-Wolf shrinkage, as RanPAC's head without its random
projection (arXiv 2307.02251). It knows a row's task, as the prompt of every strategy does.

Shapes: N rows, B rows of a batch, T tokens of the longest prompt, D width of the base model.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from deal_core.data.collate import pad_batch
from deal_core.data.prompts import encode_prompt
from deal_core.data.schema import TaskSchema
from deal_core.evaluation.generation import LanguageModel, batches_by_length, device_of


def answer_by_head(
    train_ND: Tensor, labels: Sequence[str], test_ND: Tensor, known: Sequence[str]
) -> list[str]:
    """Fit the classifier on the training rows' features, and return its label for every test row.

    Args:
        train_ND: Features of the training rows.
        labels: Their labels.
        test_ND: Features of the test rows.
        known: The task's labels; a label without a training row is never answered.
    """
    if len(set(labels)) < 2:  # the analysis needs two classes
        return [labels[0] if labels else known[0]] * len(test_ND)
    head = make_pipeline(StandardScaler(), LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto"))
    head.fit(_array(train_ND), list(labels))
    return [str(label) for label in head.predict(_array(test_ND))]


@torch.inference_mode()
def features(
    model: LanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    task: TaskSchema,
    inputs: Sequence[str],
    *,
    max_prompt_tokens: int,
    max_batch_tokens: int,
) -> Tensor:
    """Return the last layer's hidden state at the end of every prompt; for T5, the mean over the encoder's states.

    Returns:
        Shape (N, D), fp32, on the CPU.
    """
    model.eval()
    prompts = [encode_prompt(tokenizer, task, text, max_prompt_tokens) for text in inputs]
    device, pad = device_of(model), int(tokenizer.pad_token_id or 0)
    is_seq2seq = bool(model.config.is_encoder_decoder)
    body = model.get_encoder() if is_seq2seq else model.base_model
    found: list[Tensor] = [torch.empty(0)] * len(prompts)
    for batch in batches_by_length([len(prompt) for prompt in prompts], max_batch_tokens, len(prompts)):
        ids, mask = pad_batch([prompts[i] for i in batch], pad, side="right")
        states_BTD = body(input_ids=ids.to(device), attention_mask=mask.to(device)).last_hidden_state.float().cpu()
        last_B = mask.sum(1) - 1
        for row, i in enumerate(batch):
            own_TD = states_BTD[row, : last_B[row] + 1]
            found[i] = own_TD.mean(0) if is_seq2seq else own_TD[-1]
    return torch.stack(found)


def _array(values_ND: Tensor) -> NDArray[np.float64]:
    array: NDArray[np.float64] = values_ND.double().numpy()
    return array
