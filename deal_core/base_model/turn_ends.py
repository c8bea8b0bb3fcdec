"""Where an answer ends: the tokens at which a model's own turn ends, and the one that an answer is trained to end with.

Some models end a turn with another token than their tokenizer's end token, for example Gemma with `<end_of_turn>` and
Phi-3 with `<|end|>`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from jinja2 import TemplateError

from deal_core.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ADVISED_IDS = "advised_stop_ids"
"""Attribute of a tokenizer: the end tokens of its model's generation config, see `advise_stop_ids`."""
PROBE = "Sure."
"""An answer that a chat template is asked to write."""


def advise_stop_ids(tokenizer: PreTrainedTokenizerBase, ids: int | Sequence[int] | None) -> None:
    """Let a tokenizer carry the end tokens of its model's generation config (`eos_token_id`)."""
    setattr(tokenizer, ADVISED_IDS, () if ids is None else (ids,) if isinstance(ids, int) else tuple(ids))


def stop_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids of all tokens at which an answer ends, in ascending order; empty: there is none.

    They are those of the model's generation config, the tokenizer's end token, and the end of a turn in the chat
    template.
    """
    ends, of_turn = _plain_stops(tokenizer), _turn_end(tokenizer, str(tokenizer.chat_template))
    return sorted(ends if of_turn is None else {*ends, of_turn})


def end_id(tokenizer: PreTrainedTokenizerBase, *, in_chat: bool) -> int:
    """Return the id of the token that an answer is trained to end with.

    A chat's answer ends as the chat template ends a turn. Every other answer ends with the tokenizer's end token.

    Raises:
        ConfigError: There is no such token.
    """
    of_turn = _turn_end(tokenizer, str(tokenizer.chat_template)) if in_chat else None
    end = tokenizer.eos_token_id if of_turn is None else of_turn
    if end is None:
        raise ConfigError(
            "The base model's tokenizer has no end token (eos_token); use a base model that has one.", code="no-end"
        )
    return int(end)


def tokens_before_end(ids: Sequence[int], stops: Collection[int]) -> int | None:
    """Return the number of tokens before the first one of `stops`; None: the answer has no end."""
    return next((place for place, token in enumerate(ids) if token in stops), None)


def _plain_stops(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    advised: tuple[int, ...] = getattr(tokenizer, ADVISED_IDS, ())
    return {*advised} | ({int(tokenizer.eos_token_id)} if tokenizer.eos_token_id is not None else set())


@lru_cache(maxsize=16)
def _turn_end(tokenizer: PreTrainedTokenizerBase, template: str) -> int | None:
    """Return the first end token or special token that a tokenizer's template writes behind an answer; None: none.

    A text between the two, such as the blank of Llama 2, is no end. `template` only tells one template of the
    tokenizer from its next one.
    """
    del template
    if not tokenizer.chat_template:
        return None
    chat = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": PROBE}]
    try:
        rendered = str(tokenizer.apply_chat_template(chat, tokenize=False))
    except TemplateError:  # a template that cannot write this chat may still write others
        return None
    _, answer, after = rendered.rpartition(PROBE)
    ends = _plain_stops(tokenizer)
    ends |= {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    ids: list[int] = tokenizer(after, add_special_tokens=False, verbose=False)["input_ids"] if answer else []
    return next((number for number in ids if number in ends), None)
