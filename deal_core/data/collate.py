"""From rows to batches and losses: rows are tokenised once, and logits are computed only where a loss needs them.

The loss of a batch is L = Σ_answers CE / N_answers, over the answers' tokens of an accumulated batch.

Shapes: B rows of a batch, P tokens of a prefix that all rows share, T tokens of the longest row without the prefix,
K tokens of the longest answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import partial
from itertools import accumulate, chain, takewhile
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate import PartialState
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerBase
from transformers.cache_utils import Cache, DynamicLayer

from deal_core.base_model.cpu_attention import MODEL_TYPES
from deal_core.base_model.sharding import is_sharded
from deal_core.config import FLASH_ATTENTION
from deal_core.data.prompts import cut_prompt, encode_answer
from deal_core.data.schema import TaskSchema
from deal_core.limits import require

if TYPE_CHECKING:
    from datasets import Dataset

    from deal_core.base_model.language_model import LanguageModel

IGNORED = -100
REJECTED_IDS = "rejected_ids"
"""Column of encoded rows: the tokens of the worse answer."""
REFERENCE_MARGINS = "reference_margins"
"""Column of encoded rows, and part of a batch (B): log p(better) − log p(worse) of the parent version, in nats."""
ANSWER_POSITIONS = "answer_positions"
"""Part of a batch without padding (B×K): the places in it whose logits belong to the labels."""
NOT_READ = ("labels", "prefix_ids", ANSWER_POSITIONS, REFERENCE_MARGINS)
"""Parts of a batch that the model is not called with; an encoder-decoder's decoder reads the labels."""
MIN_PREFIX = 8
"""Smallest number of common first tokens for which a shared prefix is computed once on a CPU."""
MIN_PREFIX_ON = {"cpu": MIN_PREFIX}
LONG_PREFIX = 128
"""The same on an accelerator, where one more pass over a few tokens would cost more than it saves."""


def encode_rows(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    task: TaskSchema,
    *,
    max_prompt_tokens: int,
    max_answer_tokens: int,
) -> Dataset:
    """Tokenise rows of (input, output) into columns prompt_ids, answer_ids, length and is_prompt_cut."""
    limits = {"max_prompt_tokens": max_prompt_tokens, "max_answer_tokens": max_answer_tokens}
    how = {"tokenizer": tokenizer, "task": task, **limits}
    return rows.map(encode_row, fn_kwargs=how, remove_columns=rows.column_names)


def encode_row(
    row: Mapping[str, str],
    tokenizer: PreTrainedTokenizerBase,
    task: TaskSchema,
    *,
    max_prompt_tokens: int,
    max_answer_tokens: int,
) -> dict[str, Any]:
    """Tokenise one row of (input, output) into prompt_ids, answer_ids, length and is_prompt_cut."""
    prompt_ids, is_cut = cut_prompt(tokenizer, task, row["input"], max_prompt_tokens)
    answer_ids = encode_answer(tokenizer, task, row["output"], max_answer_tokens)
    length = len(prompt_ids) + len(answer_ids)
    return {"prompt_ids": prompt_ids, "answer_ids": answer_ids, "length": length, "is_prompt_cut": is_cut}


def add_blank_row(encoded: Dataset) -> Dataset:
    """Append a row with the first row's prompt and no answer, whose loss is zero.

    Processes that share batches need equal numbers of rows; this row fills up the last batch.
    """
    from datasets import Dataset, concatenate_datasets  # here, because answering needs none of it

    blank = {**encoded[0], "answer_ids": [], "length": 0}
    blank |= {REJECTED_IDS: []} if REJECTED_IDS in blank else {}
    return concatenate_datasets([encoded, Dataset.from_list([blank], features=encoded.features)])


def common_prefix(prompts: Sequence[Sequence[int]], at_least: int = MIN_PREFIX) -> int:
    """Return the number of first tokens that all prompts share and that are worth computing once; 0 if they are few.

    The last token of a prompt is never counted: its logits are the first token of the answer.
    """
    if len(prompts) < 2:
        return 0
    listed = [list(prompt) for prompt in prompts]  # what the least and the greatest share, all between them share too
    same = takewhile(lambda pair: pair[0] == pair[1], zip(min(listed), max(listed), strict=False))
    shared = min(sum(1 for _ in same), min(map(len, prompts)) - 1)
    return shared if shared >= at_least else 0


def read_cache(model: nn.Module, input_ids: Tensor) -> Cache | None:
    """Read tokens (1×P) and return their keys and values; None if the model has no cache.

    With several processes the model is wrapped: it can be called, and it has no attributes of a language model.
    """
    return cast(Cache | None, getattr(model(input_ids=input_ids, use_cache=True, logits_to_keep=1), "cache", None))


def can_be_continued(cache: Cache | None) -> bool:
    """Whether texts that begin with padding can be read after a prefix with this cache.

    A sliding window would count the padding, and a recurrent state would read it.
    """
    return cache is not None and all(type(layer) is DynamicLayer for layer in cache.layers)


def counts_padding(model: LanguageModel) -> bool:
    """Whether the model counts positions by places in its cache, so that padding after a prefix changes its answers.

    MPT does (ALiBi).
    """
    return bool(model.config.model_type == "mpt")


@dataclass(frozen=True)
class AnswerCollator:
    """Pads a batch. For decoder-only models, rows end at the right edge, so one slice holds all answers."""

    tokenizer: PreTrainedTokenizerBase
    """Source of the padding token."""
    _: KW_ONLY
    is_seq2seq: bool
    shares_prefix: bool = False
    """Whether the first tokens that all prompts of a batch share are given once, as `prefix_ids`. The other tensors
    then hold only what follows, but the mask counts the prefix."""
    min_prefix: int = MIN_PREFIX
    """Smallest number of such tokens."""
    is_padding_free: bool = False
    """Whether the rows stand behind one another in one line (1×ΣT). Each row's positions begin at 0, and the model does
    not attend from a row to another one."""

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return input_ids (B×T), attention_mask (B×T, or B×(P+T)) and labels (B×K), the answers' tokens only."""
        answers = [list(row["answer_ids"]) for row in rows]
        labels_of = [answer or [IGNORED] for answer in answers]
        prompts = [list(row["prompt_ids"]) for row in rows]
        pad_id = int(self.tokenizer.pad_token_id or 0)
        if self.is_seq2seq:
            input_ids, mask = pad_batch(prompts, pad_id, side="right")
            labels, _ = pad_batch(labels_of, IGNORED, side="right")
            return {"input_ids": input_ids, "attention_mask": mask, "labels": labels}
        labels, _ = pad_batch(labels_of, IGNORED, side="left")
        if self.is_padding_free:
            return {**_in_one_line(prompts, answers), "labels": labels}
        shared = common_prefix(prompts, self.min_prefix) if self.shares_prefix else 0
        tails = [p[shared:] + a for p, a in zip(prompts, answers, strict=True)]
        input_ids, mask = pad_batch(tails, pad_id, side="left")
        mask = torch.cat([mask.new_ones(len(prompts), shared), mask], dim=1)
        batch = {
            "input_ids": input_ids,
            "attention_mask": mask,
            "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)[:, shared:],
            "labels": labels,
        }
        return batch | ({"prefix_ids": torch.tensor([prompts[0][:shared]])} if shared else {})

    def joined(self, one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Put two collated batches without a shared prefix together: the rows of `one`, then those of `other`."""
        filling = {"input_ids": int(self.tokenizer.pad_token_id or 0), "labels": IGNORED}
        both = {name: (one[name], other[name]) for name in other}
        if self.is_padding_free:
            (first, second), length = both.pop(ANSWER_POSITIONS), one["input_ids"].shape[1]
            lines = {name: torch.cat(both.pop(name), dim=1) for name in ("input_ids", "position_ids")}
            both[ANSWER_POSITIONS] = (first, second + length)
        else:
            lines = {}
        side = "right" if self.is_seq2seq else "left"
        return lines | {name: _in_one_batch(parts, filling.get(name, 0), side) for name, parts in both.items()}


def _in_one_line(prompts: Sequence[list[int]], answers: Sequence[list[int]]) -> dict[str, Tensor]:
    """Return all rows behind one another, and the places of the logits of their answers, padded on the left."""
    lengths = [len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True)]
    ends = list(accumulate(lengths))
    places = [list(range(end - len(answer) - 1, end - 1)) for end, answer in zip(ends, answers, strict=True)]
    return {
        "input_ids": torch.tensor([[*chain.from_iterable(chain.from_iterable(zip(prompts, answers, strict=True)))]]),
        "position_ids": torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0),
        ANSWER_POSITIONS: pad_batch([places_K or [0] for places_K in places], 0, side="left")[0],
    }


def answer_collator(
    model: LanguageModel, tokenizer: PreTrainedTokenizerBase, *, reads_whole_rows: bool, padding_free: bool = False
) -> AnswerCollator:
    """Return the collator that makes a batch of rows for this model.

    A prefix that rows share is computed once: on a CPU from MIN_PREFIX tokens on, on an accelerator from LONG_PREFIX.
    With `reads_whole_rows` it is not: if activations are recomputed, there is no cache to share. The processes of a
    sharded model share no prefix either, nor do several accelerators: they must read equally often.

    Raises:
        ConfigError: The model cannot read rows without padding.
    """
    is_seq2seq, device = bool(model.config.is_encoder_decoder), next(model.parameters()).device
    if padding_free:
        require(
            model.config.model_type in MODEL_TYPES,
            f"train.padding_free is not known to work with a base model of type {model.config.model_type!r}; set it to "
            f"false, or take a model of type {', '.join(MODEL_TYPES)}.",
        )
        return AnswerCollator(tokenizer, is_seq2seq=False, is_padding_free=True)
    reads_whole = is_seq2seq or reads_whole_rows or counts_padding(model) or is_sharded(model)
    if device.type not in MIN_PREFIX_ON:
        reads_whole = (
            reads_whole or model.config._attn_implementation == FLASH_ATTENTION or PartialState().num_processes > 1
        )
    shares_prefix = not reads_whole
    if shares_prefix:
        with torch.no_grad():  # the model reads one token
            cache = read_cache(model, torch.zeros(1, 1, dtype=torch.long, device=device))
        shares_prefix = can_be_continued(cache)
    min_prefix = MIN_PREFIX_ON.get(device.type, LONG_PREFIX)
    return AnswerCollator(tokenizer, is_seq2seq=is_seq2seq, shares_prefix=shares_prefix, min_prefix=min_prefix)


def answer_logits(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """Logits (B×K×V) for the labels (B×K) of a collated batch, computed only at these positions.

    A shared prefix is computed once. Its gradients are the sum over the rows, so the result is that of whole rows.
    """
    features: dict[str, Any] = {name: value for name, value in inputs.items() if name not in NOT_READ}
    if "position_ids" not in inputs:  # an encoder-decoder, whose decoder has only the answer
        return cast(Tensor, model(**features, labels=inputs["labels"]).logits)
    # indices instead of a number: a number gives a slice that is not contiguous, and then the output layer on a CPU
    # copies its whole weight once per row
    if ANSWER_POSITIONS in inputs:
        kept_BK = inputs[ANSWER_POSITIONS]
        logits_1NV = model(**features, logits_to_keep=kept_BK.flatten(), use_cache=False).logits
        return cast(Tensor, logits_1NV.squeeze(0).unflatten(0, kept_BK.shape))
    (num_rows, length), num_tokens = inputs["input_ids"].shape, inputs["labels"].shape[1]
    positions = torch.arange(length - num_tokens - 1, length - 1, device=inputs["labels"].device)
    if "prefix_ids" not in inputs:
        return cast(Tensor, model(**features, logits_to_keep=positions, use_cache=False).logits)
    cache = read_cache(model, inputs["prefix_ids"])
    assert cache is not None, "the collator gives a prefix only to a model with a cache"
    cache.batch_repeat_interleave(num_rows)
    return cast(Tensor, model(**features, cache=cache, logits_to_keep=positions, use_cache=True).logits)


def answer_loss(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """Cross-entropy of a collated batch's answers, summed over their tokens."""
    return summed_loss(answer_logits(model, inputs), inputs["labels"])


def summed_loss(logits_BKV: Tensor, labels_BK: Tensor) -> Tensor:
    """Cross-entropy of labels, summed over their tokens; IGNORED ones do not count."""
    return cross_entropy(logits_BKV.flatten(0, 1).float(), labels_BK.flatten(), ignore_index=IGNORED, reduction="sum")


def _in_one_batch(parts: Sequence[Tensor], value: int, side: str) -> Tensor:
    """Matrices of several widths above one another, each padded on one side."""
    width = max(part.shape[1] for part in parts)
    missing = [width - part.shape[1] for part in parts]
    padded = [
        torch.nn.functional.pad(part, (0, number) if side == "right" else (number, 0), value=value)
        for part, number in zip(parts, missing, strict=True)
    ]
    return torch.cat(padded)


def pad_batch(sequences: Sequence[Sequence[int]], value: int, *, side: str) -> tuple[Tensor, Tensor]:
    """Pad token lists to one length; return the tokens and the mask of real tokens, both B×T."""
    rows = [torch.tensor(tokens, dtype=torch.long) for tokens in sequences]
    pad = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True, padding_side=side)
    return pad(rows, padding_value=value), pad([torch.ones_like(row) for row in rows])
