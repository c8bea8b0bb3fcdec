"""From rows to batches and losses: rows are tokenised once, and logits are computed only where a loss needs them.

The loss of a batch is L = (Σ_answers CE + w·Σ_texts CE) / (N_answers + w·N_texts), over the tokens of an accumulated
batch; w is the prompt loss weight. With w = 0 this is the loss of the answers alone; with w = 1 it is instruction
modelling (arXiv 2405.14394) without the tokens that all prompts of a task share. Those, such as the instruction, would
be learned by heart.

Shapes: B rows of a batch, P tokens of a prefix that all rows share, T tokens of the longest row without the prefix,
K tokens of the longest answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerBase
from transformers.cache_utils import Cache, DynamicLayer

from deal_core.data.prompts import cut_prompt, encode_answer
from deal_core.data.schema import TaskSchema

if TYPE_CHECKING:
    from datasets import Dataset

IGNORED = -100
REJECTED_IDS = "rejected_ids"
"""Column of encoded rows: the tokens of the worse answer."""
REFERENCE_MARGINS = "reference_margins"
"""Column of encoded rows, and part of a batch (B): log p(better) − log p(worse) of the parent version, in nats."""
NOT_READ = ("labels", "prefix_ids", "text_labels", REFERENCE_MARGINS)
"""Parts of a batch that the model is not called with; an encoder-decoder's decoder reads the labels."""
MIN_PREFIX = 8
"""Smallest number of common first tokens for which a shared prefix is computed once."""


class HasPrompt(Protocol):
    """Something with the tokens of a prompt."""

    @property
    def prompt_ids(self) -> Sequence[int]:
        """The tokens."""


Row = TypeVar("Row", bound=HasPrompt)


def encode_rows(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, task: TaskSchema, *, max_prompt_tokens: int,
    max_answer_tokens: int,
) -> Dataset:
    """Tokenise rows of (input, output) into columns prompt_ids, answer_ids, length and is_prompt_cut."""
    limits = {"max_prompt_tokens": max_prompt_tokens, "max_answer_tokens": max_answer_tokens}
    how = {"tokenizer": tokenizer, "task": task, **limits}
    return rows.map(encode_row, fn_kwargs=how, remove_columns=rows.column_names)


def encode_row(
    row: Mapping[str, str], tokenizer: PreTrainedTokenizerBase, task: TaskSchema, *, max_prompt_tokens: int,
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
    blank |= {"text_end": blank["text_start"]} if "text_start" in blank else {}
    blank |= {REJECTED_IDS: []} if REJECTED_IDS in blank else {}
    return concatenate_datasets([encoded, Dataset.from_list([blank], features=encoded.features)])


def add_text_spans(encoded: Dataset) -> Dataset:
    """Add the columns text_start and text_end: which tokens of a prompt are neither its task's first nor last ones.

    `encoded` has rows of one task, with a column prompt_ids.
    """
    prompts = encoded["prompt_ids"]
    lengths = [len(prompt) for prompt in prompts]
    num_first, num_last = _num_shared(prompts), _num_shared([prompt[::-1] for prompt in prompts])
    num_last = min(num_last, min(lengths) - num_first)
    first = max(num_first, 1)  # nothing predicts a prompt's first token
    return encoded.add_column("text_start", [first] * len(lengths)).add_column(
        "text_end", [max(length - num_last, first) for length in lengths]
    )


def share_of_texts(encoded: Dataset, weight: float) -> float:
    """The texts' share of the loss's weight, w·N_texts / (N_answers + w·N_texts)."""
    num_texts: int = sum(encoded["text_end"]) - sum(encoded["text_start"])
    num_answers: int = sum(map(len, encoded["answer_ids"]))
    return weight * num_texts / (num_answers + weight * num_texts)


def _num_shared(prompts: Sequence[Sequence[int]]) -> int:
    """Number of first tokens that all prompts share; those of the least and of the greatest prompt are enough."""
    listed = [list(prompt) for prompt in prompts]
    least, greatest = min(listed), max(listed)
    pairs = zip(least, greatest, strict=False)
    return next((i for i, (one, other) in enumerate(pairs) if one != other), min(len(least), len(greatest)))


def common_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """Return the number of first tokens that all prompts share and that are worth computing once; 0 if they are few.

    The last token of a prompt is never counted: its logits are the first token of the answer.
    """
    if len(prompts) < 2:
        return 0
    shared = min(_num_shared(prompts), min(map(len, prompts)) - 1)
    return shared if shared >= MIN_PREFIX else 0


def read_cache(model: nn.Module, input_ids: Tensor) -> Cache | None:
    """Read tokens (1×P) and return their keys and values; None if the model has no cache."""
    return cast(Cache | None, getattr(model(input_ids=input_ids, use_cache=True, logits_to_keep=1), "cache", None))


def can_be_continued(cache: Cache | None) -> bool:
    """Whether texts that begin with padding can be read after a prefix with this cache.

    A sliding window would count the padding, and a recurrent state would read it.
    """
    return cache is not None and all(type(layer) is DynamicLayer for layer in cache.layers)


@torch.no_grad()
def can_share_prefix(model: nn.Module) -> bool:
    """Whether a decoder-only model can read a prefix once and several texts after it; the model reads one token."""
    token = torch.zeros(1, 1, dtype=torch.long, device=next(model.parameters()).device)
    return can_be_continued(read_cache(model, token))


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
    scores_texts: bool = False
    """Whether a batch has `text_labels` too; rows then need the columns of `add_text_spans`."""

    def groups(self, rows: Sequence[Row]) -> list[list[Row]]:
        """Split the rows of several tasks into batches that each share a prefix; rows that share none are one batch."""
        if not self.shares_prefix:
            return [list(rows)]
        by_start: dict[tuple[int, ...], list[Row]] = {}
        for row in rows:
            by_start.setdefault(tuple(row.prompt_ids[:MIN_PREFIX]), []).append(row)
        single = [row for group in by_start.values() if len(group) == 1 for row in group]
        return [*(group for group in by_start.values() if len(group) > 1), *([single] if single else [])]

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return input_ids (B×T), attention_mask (B×T, or B×(P+T)) and labels (B×K), the answers' tokens only.

        With scores_texts also text_labels (B×T), the tokens of the texts only.
        """
        answers = [list(row["answer_ids"]) for row in rows]
        labels_of = [answer or [IGNORED] for answer in answers]
        prompts = [list(row["prompt_ids"]) for row in rows]
        pad_id = int(self.tokenizer.pad_token_id or 0)
        if self.is_seq2seq:
            input_ids, mask = pad_batch(prompts, pad_id, side="right")
            labels, _ = pad_batch(labels_of, IGNORED, side="right")
            return {"input_ids": input_ids, "attention_mask": mask, "labels": labels}
        shared = self._shared(prompts, rows) if self.shares_prefix else 0
        tails = [p[shared:] + a for p, a in zip(prompts, answers, strict=True)]
        input_ids, mask = pad_batch(tails, pad_id, side="left")
        mask = torch.cat([mask.new_ones(len(prompts), shared), mask], dim=1)
        labels, _ = pad_batch(labels_of, IGNORED, side="left")
        batch = {
            "input_ids": input_ids,
            "attention_mask": mask,
            "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)[:, shared:],
            "labels": labels,
        }
        if self.scores_texts:
            texts = [_only(row["text_start"] - shared, row["text_end"] - shared, tail)
                     for row, tail in zip(rows, tails, strict=True)]  # fmt: skip
            batch["text_labels"], _ = pad_batch(texts, IGNORED, side="left")
        return batch | ({"prefix_ids": torch.tensor([prompts[0][:shared]])} if shared else {})

    def _shared(self, prompts: Sequence[Sequence[int]], rows: Sequence[Mapping[str, Any]]) -> int:
        """Length of the prefix that is computed once. A scored token's predecessor is never in it."""
        shared = common_prefix(prompts)
        if self.scores_texts:
            shared = min(shared, *(row["text_start"] - 1 for row in rows))
        return shared if shared >= MIN_PREFIX else 0


def _only(start: int, end: int, tokens: Sequence[int]) -> list[int]:
    """The tokens, ignored outside of start to end."""
    return [token if start <= place < end else IGNORED for place, token in enumerate(tokens)]


def answer_collator(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, *, is_recomputed: bool, scores_texts: bool = False
) -> AnswerCollator:
    """Return the collator that pads rows to a batch for this model.

    On a CPU, a prefix that rows share is computed once. An accelerator reads whole rows: one more pass over a few
    tokens would cost more than it saves. If activations are recomputed (`is_recomputed`), there is no cache to share.
    """
    is_seq2seq = bool(model.config.is_encoder_decoder)  # type: ignore[union-attr]
    can_share = not is_seq2seq and not is_recomputed and next(model.parameters()).device.type == "cpu"
    return AnswerCollator(
        tokenizer, is_seq2seq=is_seq2seq, shares_prefix=can_share and can_share_prefix(model),
        scores_texts=scores_texts,
    )  # fmt: skip


def answer_logits(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """Logits (B×K×V) for the labels (B×K) of a collated batch, computed only at these positions."""
    return _logits_of_last(model, inputs, inputs["labels"].shape[1])


def _logits_of_last(model: nn.Module, inputs: Mapping[str, Tensor], num_tokens: int) -> Tensor:
    """Logits for the last tokens of every row, or for the labels of an encoder-decoder.

    A shared prefix is computed once. Its gradients are the sum over the rows, so the result is that of whole rows.
    """
    features: dict[str, Any] = {name: value for name, value in inputs.items() if name not in NOT_READ}
    if "position_ids" not in inputs:  # an encoder-decoder, whose decoder has only the answer
        return cast(Tensor, model(**features, labels=inputs["labels"]).logits)
    # indices instead of a number: a number gives a slice that is not contiguous, and then the output layer on a CPU
    # copies its whole weight once per row
    num_rows, length = inputs["input_ids"].shape
    positions = torch.arange(length - num_tokens - 1, length - 1, device=inputs["labels"].device)
    if "prefix_ids" not in inputs:
        return cast(Tensor, model(**features, logits_to_keep=positions, use_cache=False).logits)
    cache = read_cache(model, inputs["prefix_ids"])
    assert cache is not None, "the collator gives a prefix only to a model with a cache"
    cache.batch_repeat_interleave(num_rows)
    return cast(Tensor, model(**features, cache=cache, logits_to_keep=positions, use_cache=True).logits)


def answer_loss(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """Cross-entropy of a collated batch's answers, summed over their tokens."""
    return _summed_loss(answer_logits(model, inputs), inputs["labels"])


def answer_and_text_loss(model: nn.Module, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Cross-entropies of a collated batch's answers and of its texts, each summed over its tokens."""
    length, num_answer = inputs["input_ids"].shape[1], inputs["labels"].shape[1]
    columns = inputs["text_labels"].ne(IGNORED).any(0).nonzero()
    first = int(columns[0]) if len(columns) else length
    num_scored = max(length - first, num_answer)
    logits_BSV = _logits_of_last(model, inputs, num_scored)
    return (
        _summed_loss(logits_BSV[:, num_scored - num_answer :], inputs["labels"]),
        _summed_loss(logits_BSV, inputs["text_labels"][:, length - num_scored :]),
    )


def _summed_loss(logits_BKV: Tensor, labels_BK: Tensor) -> Tensor:
    return cross_entropy(logits_BKV.flatten(0, 1).float(), labels_BK.flatten(), ignore_index=IGNORED, reduction="sum")


def pad_batch(sequences: Sequence[Sequence[int]], value: int, *, side: str) -> tuple[Tensor, Tensor]:
    """Pad token lists to one length; return the tokens and the mask of real tokens, both B×T."""
    rows = [torch.tensor(tokens, dtype=torch.long) for tokens in sequences]
    pad = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True, padding_side=side)
    return pad(rows, padding_value=value), pad([torch.ones_like(row) for row in rows])
