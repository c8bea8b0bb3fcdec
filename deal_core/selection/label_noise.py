"""Find rows whose label is probably wrong, by a classifier that did not see their labels.

A linear classifier on features of the frozen base model is fitted to four fifths of the rows and gives the labels'
probabilities for the last fifth, five times. So every row is judged without its own label (cross-fitting, as in
confident learning, arXiv 1911.00068). A model that was fine-tuned on the rows would repeat their wrong labels, and the
parent does not know a new task's labels.

Shapes: N rows, D features (the width of the base model), L labels, B rows of a batch, T tokens of the longest prompt.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from datasets import Dataset
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from deal_core.base_model.language_model import LanguageModel, device_of
from deal_core.base_model.load import BaseModel
from deal_core.config import TrainConfig
from deal_core.data.collate import pad_batch
from deal_core.data.prompts import encode_prompt
from deal_core.data.schema import TaskSchema
from deal_core.evaluation.batches import in_batches
from deal_core.evaluation.generation import OnCount, OnProgress, counting
from deal_core.evaluation.likelihood import CHUNK_ROWS

NUM_FOLDS = 5
"""Parts of the cross-fitting. Labels with fewer rows are not checked."""
MAX_SHARE = 0.1
"""Largest share of a suspected label, see `SuspectedLabel`."""
INVERSE_PENALTY = 6.0
"""C·D of the logistic regression. There are often more features than rows, so the penalty is strong."""
MIN_SKILL = 1 / 6
"""Least skill of the classifier: (agreement - m) / (1 - m), m the share of the commonest label. With less, the features
do not tell the labels apart, and a disagreement says nothing about a label."""


@dataclass(frozen=True, kw_only=True)
class SuspectedLabel:
    """A row whose label is probably wrong."""

    row: int
    label: str
    likelier: str
    """The likeliest other label."""
    share: float
    """p(label) / (p(label) + p(likelier)), at most MAX_SHARE."""


@dataclass(frozen=True, kw_only=True)
class LabelCheck:
    """The result of the check."""

    suspects: tuple[SuspectedLabel, ...] = ()
    """The rows whose label is probably wrong, the least likely label first; empty below MIN_SKILL."""
    num_checked: int = 0
    """Rows that were checked: those of labels with at least NUM_FOLDS rows."""
    agreement: float = 0.0
    """Share of these rows whose label is the classifier's likeliest."""
    skill: float = 0.0
    """See MIN_SKILL."""

    def describe(self) -> str:
        """Say in one sentence what was found."""
        if self.num_checked == 0:
            return f"no label was checked: fewer than two labels have {NUM_FOLDS} rows"
        agrees = f"a classifier on the base model's features agrees with {self.agreement:.0%}"
        if self.skill < MIN_SKILL:
            return (
                f"no label could be checked: {agrees} of {self.num_checked:,} labels, which is too little to doubt one"
            )
        return f"{len(self.suspects):,} of {self.num_checked:,} labels that were checked are probably wrong ({agrees})"


@torch.inference_mode()
def features(
    model: LanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    task: TaskSchema,
    inputs: Sequence[str],
    *,
    max_prompt_tokens: int,
    on_progress: OnProgress | None = None,
) -> Tensor:
    """Return the last layer's hidden state at the end of every prompt; for T5, the mean over the encoder's states.

    The result has shape (N, D), fp32, on the CPU.
    """
    model.eval()
    device, pad = device_of(model), int(tokenizer.pad_token_id or 0)
    is_seq2seq = bool(model.config.is_encoder_decoder)
    body = model.get_encoder() if is_seq2seq else model.base_model
    prompts = [encode_prompt(tokenizer, task, text, max_prompt_tokens) for text in inputs]

    def read(batch: list[int]) -> list[Tensor]:
        ids, mask = pad_batch([prompts[i] for i in batch], pad, side="right")
        states_BTD = body(input_ids=ids.to(device), attention_mask=mask.to(device)).last_hidden_state.float().cpu()
        own = [states_TD[:length] for states_TD, length in zip(states_BTD, mask.sum(1).tolist(), strict=True)]
        return [own_TD.mean(0) if is_seq2seq else own_TD[-1].clone() for own_TD in own]

    feature_of: list[Tensor] = [torch.empty(0)] * len(prompts)
    for batch, features_of_batch in in_batches(model, [len(prompt) for prompt in prompts], read):
        for i, feature_D in zip(batch, features_of_batch, strict=True):
            feature_of[i] = feature_D
        if on_progress is not None:
            on_progress(len(batch))
    return torch.stack(feature_of)


def check_labels(
    base: BaseModel,
    task: TaskSchema,
    rows: Dataset,
    train: TrainConfig,
    on_progress: OnCount = lambda done, total: None,
) -> LabelCheck:
    """Look for rows whose label is probably wrong. The base model, without an adapter, reads every row once.

    `train` has the limit of prompts, and the seed of the cross-fitting. `on_progress` is called with the number of rows
    that were read, and the number of all.
    """
    count = counting(on_progress, len(rows))
    chunks = [
        features(
            base.model,
            base.tokenizer,
            task,
            rows[start : start + CHUNK_ROWS]["input"],
            max_prompt_tokens=train.max_prompt_tokens,
            on_progress=count,
        )
        for start in range(0, len(rows), CHUNK_ROWS)
    ]
    return suspected_labels(torch.cat(chunks), list(rows["output"]), seed=train.seed)


def suspected_labels(features_ND: Tensor, labels: Sequence[str], *, seed: int) -> LabelCheck:
    """Look for rows whose label has at most the share MAX_SHARE; `seed` decides the parts of the cross-fitting."""
    counts = Counter(labels)
    checked = np.array([row for row, label in enumerate(labels) if counts[label] >= NUM_FOLDS], dtype=np.int64)
    label_N = np.array([labels[row] for row in checked])
    names = sorted(set(label_N.tolist()))
    if len(names) < 2:
        return LabelCheck()
    # balanced: otherwise every row of a rare label would be suspected
    classifier = LogisticRegression(C=INVERSE_PENALTY / features_ND.shape[1], max_iter=1000, class_weight="balanced")
    head = make_pipeline(StandardScaler(), classifier)
    parts = StratifiedKFold(NUM_FOLDS, shuffle=True, random_state=seed % 2**32)
    array_ND = features_ND.double().numpy()[checked]
    probabilities_NL = cross_val_predict(head, array_ND, label_N, cv=parts, method="predict_proba")
    places = np.arange(len(checked))
    own = np.searchsorted(names, label_N)
    own_N = probabilities_NL[places, own]
    probabilities_NL[places, own] = -1
    other_N = probabilities_NL.max(1)
    share_N = own_N / (own_N + other_N)
    likelier = probabilities_NL.argmax(1)
    agreement, majority = float((own_N > other_N).mean()), max(Counter(label_N.tolist()).values()) / len(label_N)
    skill = (agreement - majority) / (1 - majority)
    suspected = np.flatnonzero(share_N <= MAX_SHARE) if skill >= MIN_SKILL else np.array([], dtype=np.int64)
    suspects = tuple(
        SuspectedLabel(row=int(checked[i]), label=str(label_N[i]), likelier=names[likelier[i]], share=float(share_N[i]))
        for i in suspected[np.argsort(share_N[suspected], kind="stable")]
    )
    return LabelCheck(suspects=suspects, num_checked=len(checked), agreement=agreement, skill=skill)
