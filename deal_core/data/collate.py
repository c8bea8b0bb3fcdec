"""From rows to batches: rows are tokenised once, batches hold rows of similar length, logits are for answers only.

Shapes: B rows of a batch, T tokens of the longest row, K tokens of the longest answer.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from datasets import Dataset, concatenate_datasets
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import Sampler
from transformers import PreTrainedTokenizerBase

from deal_core.data.prompts import cut_prompt, encode_answer
from deal_core.data.schema import TaskSchema

IGNORED = -100
BATCHES_PER_BUCKET = 16


def encode_rows(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    task: TaskSchema,
    *,
    max_prompt_tokens: int,
    max_answer_tokens: int,
) -> Dataset:
    """Tokenise rows of (input, output) into columns prompt_ids, answer_ids, length and is_prompt_cut."""

    def encode(row: Mapping[str, str]) -> dict[str, Any]:
        prompt_ids, is_cut = cut_prompt(tokenizer, task, row["input"], max_prompt_tokens)
        answer_ids = encode_answer(tokenizer, task, row["output"], max_answer_tokens)
        length = len(prompt_ids) + len(answer_ids)
        return {"prompt_ids": prompt_ids, "answer_ids": answer_ids, "length": length, "is_prompt_cut": is_cut}

    return rows.map(encode, remove_columns=rows.column_names)


def add_blank_row(encoded: Dataset) -> Dataset:
    """Append a row with the first row's prompt and no answer, whose loss is zero.

    Processes that share batches need equal numbers of rows; this row fills up the last batch.
    """
    blank = {**encoded[0], "answer_ids": [], "length": 0}
    return concatenate_datasets([encoded, Dataset.from_list([blank], features=encoded.features)])


class AnswerCollator:
    """Pads a batch. For decoder-only models, rows end at the right edge, so one slice holds all answers."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, is_seq2seq: bool) -> None:
        self._pad_id = int(tokenizer.pad_token_id or 0)
        self._is_seq2seq = is_seq2seq

    def __call__(self, rows: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, Tensor]:
        """Return input_ids and attention_mask (B×T) and labels (B×K), the answers' tokens only."""
        answers = [list(row["answer_ids"]) for row in rows]
        labels_of = [answer or [IGNORED] for answer in answers]
        prompts = [list(row["prompt_ids"]) for row in rows]
        if self._is_seq2seq:
            input_ids, mask = pad_batch(prompts, self._pad_id, side="right")
            labels, _ = pad_batch(labels_of, IGNORED, side="right")
            return {"input_ids": input_ids, "attention_mask": mask, "labels": labels}
        input_ids, mask = pad_batch([p + a for p, a in zip(prompts, answers, strict=True)], self._pad_id, side="left")
        labels, _ = pad_batch(labels_of, IGNORED, side="left")
        return {
            "input_ids": input_ids,
            "attention_mask": mask,
            "position_ids": (mask.cumsum(-1) - 1).clamp(min=0),
            "labels": labels,
        }


def answer_logits(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """Logits (B×K×V) for the labels (B×K) of a collated batch, computed only at these positions."""
    if "position_ids" not in inputs:  # an encoder-decoder, whose decoder has only the answer
        return cast(Tensor, model(**inputs).logits)
    features = {name: value for name, value in inputs.items() if name != "labels"}
    # indices instead of a number: a number gives a slice that is not contiguous, and then the output layer on a CPU
    # copies its whole weight once per row
    length, num_answer = inputs["input_ids"].shape[1], inputs["labels"].shape[1]
    positions = torch.arange(length - num_answer - 1, length - 1, device=inputs["labels"].device)
    return cast(Tensor, model(**features, logits_to_keep=positions, use_cache=False).logits)


def answer_loss(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """Cross-entropy of a collated batch's answers, summed over their tokens."""
    logits_BKV = answer_logits(model, inputs)
    return cross_entropy(
        logits_BKV.flatten(0, 1).float(), inputs["labels"].flatten(), ignore_index=IGNORED, reduction="sum"
    )


def pad_batch(sequences: Sequence[Sequence[int]], value: int, *, side: str) -> tuple[Tensor, Tensor]:
    """Pad token lists to one length; return the tokens and the mask of real tokens, both B×T."""
    tokens = torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(s, dtype=torch.long) for s in sequences],
        batch_first=True,
        padding_value=value,
        padding_side=side,
    )
    mask = torch.nn.utils.rnn.pad_sequence(
        [torch.ones(len(s), dtype=torch.long) for s in sequences], batch_first=True, padding_side=side
    )
    return tokens, mask


class BucketSampler(Sampler[int]):
    """Order of rows for an epoch: batches hold rows of similar length, batches come in random order.

    The order depends only on seed and epoch, so a resumed run sees the same order. transformers' LengthGroupedSampler
    draws from the global generator and does not have this property.

    Args:
        lengths: Tokens of every row.
        batch_size: Rows of a batch.
        seed: Decides the order.
        group_by_length: Whether to sort by length.
        labels: Every row's label; every batch then holds the labels in their shares. None: labels do not count.
        blank: The row that fills up the last batch; None: the last batch may be smaller.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int,
        seed: int,
        *,
        group_by_length: bool,
        labels: Sequence[Hashable] | None = None,
        blank: int | None = None,
    ) -> None:
        self._lengths = list(lengths)
        self._batch_size = batch_size
        self._seed = seed
        self._group_by_length = group_by_length
        self._labels = labels
        self._fill = [] if blank is None else [blank] * (-len(self._lengths) % batch_size)
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._lengths) + len(self._fill)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed * 100_003 + self._epoch)
        order = torch.randperm(len(self._lengths), generator=generator).tolist()
        if not self._group_by_length:
            return iter(self._balanced(order, generator) + self._fill)
        bucket = self._batch_size * BATCHES_PER_BUCKET
        batches: list[list[int]] = []
        for start in range(0, len(order), bucket):
            members = sorted(order[start : start + bucket], key=self._lengths.__getitem__)
            members = self._balanced(members, generator)
            batches += [members[i : i + self._batch_size] for i in range(0, len(members), self._batch_size)]
        # a partial batch must come last; elsewhere it would shift the borders of later batches
        partial = [batch for batch in batches if len(batch) < self._batch_size]
        full = [batch for batch in batches if len(batch) == self._batch_size]
        shuffled = [full[i] for i in torch.randperm(len(full), generator=generator).tolist()]
        return iter([row for batch in shuffled + partial for row in batch] + self._fill)

    def _balanced(self, rows: list[int], generator: torch.Generator) -> list[int]:
        """Spread each label's rows evenly over the list; a label's rows keep their order."""
        if self._labels is None:
            return rows
        by_label: dict[Hashable, list[int]] = {}
        for row in rows:
            by_label.setdefault(self._labels[row], []).append(row)
        places = [
            ((number + float(torch.rand((), generator=generator))) / len(members), row)
            for members in by_label.values()
            for number, row in enumerate(members)
        ]
        return [row for _, row in sorted(places)]
