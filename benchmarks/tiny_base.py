"""A base model small enough that a whole adaptation takes seconds: for tests, and for what measures the chain alone."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

NO_LIMITS = {
    "min_gain_points": -100.0,
    "min_gain_over_champion_points": None,
    "max_drop_points": 100.0,
    "max_mean_drop_points": None,
    "max_perplexity_ratio": None,
    "max_norm_ratio": None,
}
"""A gate that a model which knows nothing can pass."""

EXAMPLES = Path(__file__).parents[1] / "tests" / "data" / "examples"
"""Three small domains of labelled texts. They stay as they are, while examples/ follows the demo."""
WORDS_OF = ("bank", "clinic", "parcels")
"""The examples whose words the tokenizer knows. A fixed list: another one would change every model of the tests."""
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_tiny_base(folder: Path, *, width: int = 32, seed: int = 0) -> None:
    """Write a Llama with two layers and random weights; its tokenizer knows the words of WORDS_OF.

    Its four heads are as wide as vLLM demands (32) from a width of 128 on.
    """
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    files = sorted(path for name in WORDS_OF for path in (EXAMPLES / name).glob("*") if path.suffix != ".yaml")
    words.train([str(path) for path in files], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
    )
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
