"""From rows to batches: rows are tokenised once, batches hold rows of similar length, logits are for answers only.

Shapes: B rows of a batch, P tokens of a prefix that all rows share, T tokens of the longest row without the prefix,
K tokens of the longest answer.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import Sampler
from transformers import PreTrainedTokenizerBase
from transformers.cache_utils import Cache, DynamicLayer

from deal_core.data.prompt_loss import without_text
from deal_core.data.prompts import cut_prompt, encode_answer
from deal_core.data.schema import TaskSchema

if TYPE_CHECKING:
    from datasets import Dataset

IGNORED = -100
BATCHES_PER_BUCKET = 16
REJECTED_IDS = "rejected_ids"
"""Column of encoded rows: the tokens of the worse answer."""
REFERENCE_MARGINS = "reference_margins"
"""Column of encoded rows, and part of a batch (B): log p(better) − log p(worse) of the parent version, in nats."""
NOT_READ = ("labels", "prefix_ids", "text_labels", "counted_labels", REFERENCE_MARGINS)
"""Parts of a batch that the model is not called with; an encoder-decoder's decoder reads the labels."""
LOSS_MASK = "loss_mask"
"""Column of rows: for each answer token whether it carries loss."""
MIN_PREFIX = 8
"""Smallest number of common first tokens for which a shared prefix is computed once."""


class HasPrompt(Protocol):
    """Something with the tokens of a prompt."""

    @property
    def prompt_ids(self) -> Sequence[int]:
        """The tokens."""


Row = TypeVar("Row", bound=HasPrompt)


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
        return encode_row(
            row, tokenizer, task, max_prompt_tokens=max_prompt_tokens, max_answer_tokens=max_answer_tokens
        )

    return rows.map(encode, remove_columns=rows.column_names)


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

    blank = without_text({**encoded[0], "answer_ids": [], "length": 0})
    blank |= {name: [] for name in (LOSS_MASK, REJECTED_IDS) if name in blank}
    return concatenate_datasets([encoded, Dataset.from_list([blank], features=encoded.features)])


def common_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """Return the number of first tokens that all prompts share and that are worth computing once; 0 if they are few.

    The last token of a prompt is never counted: its logits are the first token of the answer.
    """
    if len(prompts) < 2:
        return 0
    longest = min(map(len, prompts)) - 1
    starts = [list(prompt[:longest]) for prompt in prompts]
    pairs = zip(min(starts), max(starts), strict=True)  # their common prefix is that of all prompts
    shared = next((i for i, (first, last) in enumerate(pairs) if first != last), longest)
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


class AnswerCollator:
    """Pads a batch. For decoder-only models, rows end at the right edge, so one slice holds all answers.

    Args:
        tokenizer: Source of the padding token.
        is_seq2seq: Whether the model is an encoder-decoder.
        shares_prefix: Whether the first tokens that all prompts of a batch share are given once, as `prefix_ids`. The
            other tensors then hold only what follows, but the mask counts the prefix.
        scores_texts: Whether a batch has `text_labels` too; rows then need the columns of `add_text_spans`.
        masks_answers: Whether a batch has `counted_labels` too; rows then need the column LOSS_MASK.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        is_seq2seq: bool,
        shares_prefix: bool = False,
        scores_texts: bool = False,
        masks_answers: bool = False,
    ) -> None:
        self._pad_id = int(tokenizer.pad_token_id or 0)
        self._is_seq2seq = is_seq2seq
        self._shares_prefix = shares_prefix
        self._scores_texts = scores_texts
        self._masks_answers = masks_answers

    def groups(self, rows: Sequence[Row]) -> list[list[Row]]:
        """Split the rows of several tasks into batches that each share a prefix; rows that share none are one batch."""
        if not self._shares_prefix:
            return [list(rows)]
        by_start: dict[tuple[int, ...], list[Row]] = {}
        for row in rows:
            by_start.setdefault(tuple(row.prompt_ids[:MIN_PREFIX]), []).append(row)
        single = [row for group in by_start.values() if len(group) == 1 for row in group]
        return [*(group for group in by_start.values() if len(group) > 1), *([single] if single else [])]

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return input_ids (B×T), attention_mask (B×T, or B×(P+T)) and labels (B×K), the answers' tokens only.

        With scores_texts also text_labels (B×T), the tokens of the texts only. With masks_answers also counted_labels
        (B×K), the labels that carry loss.
        """
        answers = [list(row["answer_ids"]) for row in rows]
        labels_of = [answer or [IGNORED] for answer in answers]
        prompts = [list(row["prompt_ids"]) for row in rows]
        if self._is_seq2seq:
            input_ids, mask = pad_batch(prompts, self._pad_id, side="right")
            labels, _ = pad_batch(labels_of, IGNORED, side="right")
            return {"input_ids": input_ids, "attention_mask": mask, "labels": labels, **self._counted(rows, "right")}
        shared = self._shared(prompts, rows) if self._shares_prefix else 0
        tails = [p[shared:] + a for p, a in zip(prompts, answers, strict=True)]
        input_ids, mask = pad_batch(tails, self._pad_id, side="left")
        mask = torch.cat([mask.new_ones(len(prompts), shared), mask], dim=1)
        labels, _ = pad_batch(labels_of, IGNORED, side="left")
        batch = {
            "input_ids": input_ids,
            "attention_mask": mask,
            "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)[:, shared:],
            "labels": labels,
            **self._counted(rows, "left"),
        }
        if self._scores_texts:
            texts = [_only(row["text_start"] - shared, row["text_end"] - shared, tail)
                     for row, tail in zip(rows, tails, strict=True)]  # fmt: skip
            batch["text_labels"], _ = pad_batch(texts, IGNORED, side="left")
        return batch | ({"prefix_ids": torch.tensor([prompts[0][:shared]])} if shared else {})

    def _counted(self, rows: Sequence[Mapping[str, Any]], side: str) -> dict[str, Tensor]:
        """The labels that carry loss."""
        if not self._masks_answers:
            return {}
        counted = [
            [token if counts else IGNORED for token, counts in zip(row["answer_ids"], row[LOSS_MASK], strict=True)]
            for row in rows
        ]
        return {"counted_labels": pad_batch([each or [IGNORED] for each in counted], IGNORED, side=side)[0]}

    def _shared(self, prompts: Sequence[Sequence[int]], rows: Sequence[Mapping[str, Any]]) -> int:
        """Length of the prefix that is computed once. A scored token's predecessor is never in it."""
        shared = common_prefix(prompts)
        if self._scores_texts:
            shared = min(shared, *(row["text_start"] - 1 for row in rows))
        return shared if shared >= MIN_PREFIX else 0


def _only(start: int, end: int, tokens: Sequence[int]) -> list[int]:
    """The tokens, ignored outside of start to end."""
    return [token if start <= place < end else IGNORED for place, token in enumerate(tokens)]


def answer_collator(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    *,
    is_recomputed: bool,
    scores_texts: bool = False,
    masks_answers: bool = False,
) -> AnswerCollator:
    """Return the collator that pads rows to a batch for this model.

    On a CPU, a prefix that rows share is computed once. An accelerator reads whole rows: one more pass over a few
    tokens would cost more than it saves.

    Args:
        model: The base model, with or without an adapter.
        tokenizer: Source of the padding token.
        is_recomputed: Whether activations are recomputed, so that no cache is between prefix and texts.
        scores_texts: See AnswerCollator.
        masks_answers: See AnswerCollator.
    """
    is_seq2seq = bool(model.config.is_encoder_decoder)  # type: ignore[union-attr]
    can_share = not is_seq2seq and not is_recomputed and next(model.parameters()).device.type == "cpu"
    return AnswerCollator(
        tokenizer, is_seq2seq=is_seq2seq, shares_prefix=can_share and can_share_prefix(model),
        scores_texts=scores_texts, masks_answers=masks_answers,
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
    """Cross-entropy of a collated batch's answers, summed over the tokens that carry loss; 0 if none does."""
    return _summed_loss(answer_logits(model, inputs), counted_labels(inputs))


def counted_labels(inputs: Mapping[str, Tensor]) -> Tensor:
    """The labels (B×K) of a collated batch that carry loss; the others are IGNORED."""
    return inputs["counted_labels"] if "counted_labels" in inputs else inputs["labels"]


def answer_and_text_loss(model: nn.Module, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Cross-entropies of a collated batch's answers and of its texts, each summed over its tokens."""
    length, num_answer = inputs["input_ids"].shape[1], inputs["labels"].shape[1]
    columns = inputs["text_labels"].ne(IGNORED).any(0).nonzero()
    first = int(columns[0]) if len(columns) else length
    num_scored = max(length - first, num_answer)
    logits_BSV = _logits_of_last(model, inputs, num_scored)
    return (
        _summed_loss(logits_BSV[:, num_scored - num_answer :], counted_labels(inputs)),
        _summed_loss(logits_BSV, inputs["text_labels"][:, length - num_scored :]),
    )


def _summed_loss(logits_BKV: Tensor, labels_BK: Tensor) -> Tensor:
    return cross_entropy(
        logits_BKV.flatten(0, 1).float(), labels_BK.flatten(), ignore_index=IGNORED, reduction="sum"
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
        labels = [self._labels[row] for row in rows]
        return [rows[i] for i in spread(labels, lambda: float(torch.rand((), generator=generator)))]


def spread(labels: Sequence[Hashable], draw: Callable[[], float]) -> list[int]:
    """Return the places of a list in an order in which every part has the labels in their shares.

    The places of one label keep their order. `draw` gives random numbers of [0, 1).
    """
    by_label: dict[Hashable, list[int]] = {}
    for place, label in enumerate(labels):
        by_label.setdefault(label, []).append(place)
    ranked = sorted(
        ((number + draw()) / len(places), place) for places in by_label.values() for number, place in enumerate(places)
    )
    return [place for _, place in ranked]
