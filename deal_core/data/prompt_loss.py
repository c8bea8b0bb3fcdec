"""The prompt loss weight: training also on the part of the prompts that varies from row to row.

L = (Σ_answers CE + w·Σ_texts CE) / (N_answers + w·N_texts), over the tokens of an accumulated batch. With w = 0 this is
the loss of the answers alone; with w = 1 it is instruction modelling (arXiv 2405.14394) without the tokens that all
prompts of a task share. Those, such as the instruction, would be learned by heart.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import Dataset

Tokens = list[int]


def add_text_spans(encoded: Dataset) -> Dataset:
    """Add the columns text_start and text_end: which tokens of a prompt are neither its task's first nor last ones.

    Args:
        encoded: Rows of one task, with a column prompt_ids.
    """
    prompts = encoded["prompt_ids"]
    # what the least and the greatest of some lists begin with, all of them begin with
    start = _num_shared(min(prompts), max(prompts))
    end = _num_shared(min(map(_reversed, prompts)), max(map(_reversed, prompts)))
    lengths = [len(prompt) for prompt in prompts]
    end = min(end, min(lengths) - start)
    first = max(start, 1)  # nothing predicts a prompt's first token
    return encoded.add_column("text_start", [first] * len(lengths)).add_column(
        "text_end", [max(length - end, first) for length in lengths]
    )


def without_text(row: dict[str, object]) -> dict[str, object]:
    """The row, if it has a text span, with an empty one."""
    return row | ({"text_end": row["text_start"]} if "text_start" in row else {})


def share_of_texts(encoded: Dataset, weight: float) -> float:
    """The texts' share of the loss's weight, w·N_texts / (N_answers + w·N_texts)."""
    num_texts: int = sum(encoded["text_end"]) - sum(encoded["text_start"])
    num_answers: int = sum(map(len, encoded["answer_ids"]))
    return weight * num_texts / (num_answers + weight * num_texts)


def _reversed(tokens: Tokens) -> Tokens:
    return tokens[::-1]


def _num_shared(first: Tokens, second: Tokens) -> int:
    pairs = zip(first, second, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))
