"""Batches of rows that a model reads: rows of similar length, as many as the device takes.

A CPU is as fast with small batches. An accelerator gets as many tokens as take a share of its memory; if the memory
runs out nevertheless, a batch is divided, and later ones stay as small.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from deal_core.base_model.language_model import LanguageModel, device_of
from deal_core.base_model.sharding import is_sharded

MAX_BATCH_TOKENS = 4096
"""Most tokens of a batch on a CPU, padding included. A longer row is a batch of its own."""
MAX_LOGIT_BYTES = 2**30
"""Most bytes for the logits of a batch. With a vocabulary of 128,000, a hundred answers of 50 tokens would need five
times as many."""
MEMORY_SHARE = 0.25
"""Share of an accelerator's memory that a batch may fill. It is a share of the whole memory: with what happens to be
free, equal devices would have other batches, and close answers would differ by rounding."""
ACTIVE_WIDTHS = 16
"""Numbers of a token that exist at once in a layer, as a multiple of the hidden size."""

Result = TypeVar("Result")


def in_batches(
    model: LanguageModel, lengths: Sequence[int], read: Callable[[list[int]], Result], *, max_rows: int | None = None
) -> Iterator[tuple[list[int], Result]]:
    """Yield batches of row numbers, longest rows first, each with what `read` returns for it.

    Args:
        model: It decides how many tokens a batch has; see `batch_tokens`.
        lengths: Tokens of each row.
        read: Called with the row numbers of a batch, and again with half as many if the device's memory runs out.
        max_rows: Most rows of a batch; None: no limit.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    num_tokens, start = batch_tokens(model), 0
    while start < len(order):
        longest = max(1, lengths[order[start]])
        size = min(max_rows or len(order), max(1, num_tokens // longest), len(order) - start)
        batch = order[start : start + size]
        try:
            result = read(batch)
        except RuntimeError as error:
            # processes that share a model read equally often, so one of them cannot divide a batch alone
            if size == 1 or not should_reduce_batch_size(error) or is_sharded(model):
                raise
            num_tokens = size // 2 * longest
        else:
            yield batch, result
            start += size
            continue
        clear_device_cache()  # here, because the error holds the tensors of what failed


def batch_tokens(model: LanguageModel) -> int:
    """Return how many tokens a batch may have, padding included."""
    device = device_of(model)
    if device.type != "cuda":
        return MAX_BATCH_TOKENS
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None) or 1
    share_of_keys = (getattr(config, "num_key_value_heads", None) or heads) / heads
    widths = 2 * config.num_hidden_layers * share_of_keys + ACTIVE_WIDTHS
    bytes_of_token = next(model.parameters()).element_size() * config.hidden_size * widths
    total = torch.cuda.get_device_properties(device).total_memory
    return max(MAX_BATCH_TOKENS, int(MEMORY_SHARE * total / bytes_of_token))


def rows_with_logits(model: LanguageModel, num_tokens: int, *, num_bytes: int) -> int:
    """How many rows a batch may have whose logits are kept: at least one, and at most MAX_LOGIT_BYTES.

    Args:
        model: For the size of its vocabulary.
        num_tokens: Most tokens of a row that have logits.
        num_bytes: Bytes for each logit, of all copies.
    """
    vocabulary = int(model.config.get_text_config().vocab_size)
    return max(1, MAX_LOGIT_BYTES // (num_bytes * num_tokens * vocabulary))
