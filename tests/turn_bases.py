"""Base models whose turns end with another token than their tokenizer's end token, as Gemma-it and Phi-3 have them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = "It barks . Which animal is it ? Option : yes no Answer : no yes again"
WIDTH = 128


@dataclass(frozen=True, kw_only=True)
class Kind:
    """How the turns of a family of models are written."""

    bos: str
    eos: str
    turn_end: str
    more: Sequence[str]
    """Its other special tokens."""
    stops: Sequence[str]
    """The end tokens of its generation config."""
    template: str


KINDS = {
    "gemma": Kind(
        bos="<bos>",
        eos="<eos>",
        turn_end="<end_of_turn>",
        more=("<pad>", "<start_of_turn>"),
        stops=("<eos>", "<end_of_turn>"),
        template=(
            "{{ bos_token }}{% for m in messages %}{{ '<start_of_turn>' + (m['role'] | replace('assistant', 'model')) "
            "+ '\n' + (m['content'] | trim) + '<end_of_turn>\n' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
        ),
    ),
    "phi3": Kind(
        bos="<s>",
        eos="<|endoftext|>",
        turn_end="<|end|>",
        more=("<|user|>", "<|assistant|>"),
        stops=("<|endoftext|>", "<|assistant|>", "<|end|>"),
        template=(
            "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
        ),
    ),
}


def make_tokenizer(kind: Kind) -> PreTrainedTokenizerFast:
    """Return a tokenizer that knows the words of WORDS, each with and without a blank before it."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = [kind.bos, kind.eos, kind.turn_end, *kind.more]
    lines = [WORDS, *WORDS.split()] * 4
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        lines, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=special)
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=kind.bos, eos_token=kind.eos, pad_token=kind.eos
    )
    tokenizer.chat_template = kind.template
    return tokenizer


def build_turn_base(folder: Path, kind: Kind) -> None:
    """Write a model whose next token follows from its last one alone.

    In a chat it answers "yes", ends its turn, and goes on with "again" for ever. After "Answer:" it does the same.
    """
    tokenizer = make_tokenizer(kind)
    (in_chat,), (plain,), (again,) = (
        tokenizer(word, add_special_tokens=False)["input_ids"] for word in ("yes", " yes", " again")
    )
    end = tokenizer.convert_tokens_to_ids(kind.turn_end)
    before_chat = tokenizer("\n", add_special_tokens=False)["input_ids"][-1]
    before_plain = tokenizer("\nAnswer:", add_special_tokens=False)["input_ids"][-1]
    steps = {before_chat: in_chat, before_plain: plain, in_chat: end, plain: end, end: again, again: again}
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        initializer_range=1.0,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.zero_()
        model.lm_head.weight.zero_()
        for token, following in steps.items():
            model.lm_head.weight[following] += model.model.embed_tokens.weight[token]
    stops = [tokenizer.convert_tokens_to_ids(token) for token in kind.stops]
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=stops, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
