"""Write a small Llama as the GGUF file that llama.cpp's own converter would make of it."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy
import torch
from transformers import LlamaForCausalLM

BLOCK = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def write_gguf(folder: Path, file: Path, *, without: str = "") -> dict[str, torch.Tensor]:
    """Quantise the model in `folder` to Q8_0, and give the weights that a reader of the file should get back.

    Args:
        folder: a transformers folder.
        file: what to write.
        without: GGUF's name of a weight to leave out.
    """
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = model.config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer, folder)
    names = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
    for layer in range(config.num_hidden_layers):
        names |= {f"blk.{layer}.{short}": f"model.layers.{layer}.{long}" for short, long in BLOCK.items()}
    names.pop(without, None)
    weights, expected = model.state_dict(), {}
    for short, long in names.items():
        weight = weights[f"{long}.weight"].numpy()
        heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}.get(short[-1])
        expected[f"{long}.weight"] = _add(writer, f"{short}.weight", weight, heads if "attn_" in short else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


def _add(writer: gguf.GGUFWriter, name: str, weight: numpy.ndarray, num_heads: int | None) -> torch.Tensor:
    if weight.ndim == 1:
        writer.add_tensor(name, weight)
        return torch.from_numpy(weight)
    kind = gguf.GGMLQuantizationType.Q8_0
    blocks = gguf.quants.quantize(_interleave(weight, num_heads), kind)
    writer.add_tensor(name, blocks, raw_dtype=kind)
    return torch.from_numpy(_separate(gguf.quants.dequantize(blocks, kind), num_heads))


def _interleave(weight: numpy.ndarray, num_heads: int | None) -> numpy.ndarray:
    """GGUF keeps the two halves of a head's rotary dimensions interleaved."""
    if num_heads is None:
        return weight
    rows, columns = weight.shape
    return weight.reshape(num_heads, 2, rows // num_heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _separate(weight: numpy.ndarray, num_heads: int | None) -> numpy.ndarray:
    if num_heads is None:
        return weight
    rows, columns = weight.shape
    return weight.reshape(num_heads, rows // num_heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _add_tokenizer(writer: gguf.GGUFWriter, folder: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary, merges = tokenizer["model"]["vocab"], tokenizer["model"]["merges"]
    special = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    tokens = sorted({**vocabulary, **special}, key={**vocabulary, **special}.__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL if token in special else gguf.TokenType.NORMAL for token in tokens])
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_bos_token_id(special["<|im_start|>"])
    writer.add_eos_token_id(special["<|im_end|>"])
    writer.add_pad_token_id(special["<|endoftext|>"])
    writer.add_add_bos_token(False)
    writer.add_chat_template((folder / "chat_template.jinja").read_text(encoding="utf-8"))
