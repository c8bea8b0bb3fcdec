"""Write docs/model.md: what a later arrival takes with some public base models, as `deal check --plan` counts it.

    python -m benchmarks.speed.base_models

Nothing is downloaded: a model is built from the figures of its public config.json, without weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from transformers import LlamaConfig, PretrainedConfig, Qwen2Config

from benchmarks.output import templates
from benchmarks.speed.scaling import BATCH, memory_on_gpu
from deal_core.config import AdapterConfig, TrainConfig
from deal_core.planning.devices import CARDS
from deal_core.planning.memory import BatchShape
from deal_core.planning.meta_model import measure_model

SMOL = {"vocab_size": 49152, "tie_word_embeddings": True}
LLAMA = {"vocab_size": 128256, "num_key_value_heads": 8}
MODELS: dict[str, tuple[str, PretrainedConfig]] = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": (
        "Apache-2.0",
        LlamaConfig(
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            **SMOL,
        ),
    ),
    "HuggingFaceTB/SmolLM2-360M-Instruct": (
        "Apache-2.0",
        LlamaConfig(
            hidden_size=960,
            intermediate_size=2560,
            num_hidden_layers=32,
            num_attention_heads=15,
            num_key_value_heads=5,
            **SMOL,
        ),
    ),
    "Qwen/Qwen2.5-0.5B-Instruct": (
        "Apache-2.0",
        Qwen2Config(
            hidden_size=896,
            intermediate_size=4864,
            num_hidden_layers=24,
            num_attention_heads=14,
            num_key_value_heads=2,
            vocab_size=151936,
            tie_word_embeddings=True,
        ),
    ),
    "meta-llama/Llama-3.2-1B-Instruct": (
        "Llama 3.2",
        LlamaConfig(
            hidden_size=2048,
            intermediate_size=8192,
            num_hidden_layers=16,
            num_attention_heads=32,
            tie_word_embeddings=True,
            **LLAMA,
        ),
    ),
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": (
        "Apache-2.0",
        LlamaConfig(
            hidden_size=2048,
            intermediate_size=8192,
            num_hidden_layers=24,
            num_attention_heads=32,
            num_key_value_heads=32,
            **SMOL,
        ),
    ),
    "Qwen/Qwen2.5-7B-Instruct": (
        "Apache-2.0",
        Qwen2Config(
            hidden_size=3584,
            intermediate_size=18944,
            num_hidden_layers=28,
            num_attention_heads=28,
            num_key_value_heads=4,
            vocab_size=152064,
            tie_word_embeddings=False,
        ),
    ),
    "meta-llama/Llama-3.1-8B-Instruct": (
        "Llama 3.1",
        LlamaConfig(
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            tie_word_embeddings=False,
            **LLAMA,
        ),
    ),
}
"""Name on the Hub → licence, and the figures of its config.json."""
SHORT = BatchShape(num_rows=8, num_tokens=128, num_answer_tokens=8)
"""Rows as those of the examples."""


def describe(name: str, licence: str, config: Any) -> dict[str, Any]:
    """One line of the table: parameters, rate, size of the adapter, and memory in bytes."""
    adapter = AdapterConfig()
    model = measure_model(config, adapter)

    def memory(batch: BatchShape, *, checkpointing: bool = False) -> int:
        return memory_on_gpu(model, batch, rank=adapter.rank, checkpointing=checkpointing).total

    return {
        "name": name,
        "licence": licence,
        "num_parameters": model.num_parameters,
        "rate": TrainConfig().rate(model.num_parameters),
        "adapter_bytes": 4 * sum(model.num_factor_numbers(adapter.rank)),
        "short": memory(SHORT),
        "long": memory(BATCH),
        "checkpointing": memory(BATCH, checkpointing=True),
    }


def main(page: Annotated[Path, typer.Option(help="Page to write.")] = Path("docs/model.md")) -> None:
    """Fill the page."""
    lines = [describe(name, licence, config) for name, (licence, config) in MODELS.items()]
    cards: dict[str, list[str]] = {}  # memory → the GPUs that have it
    for name, card in sorted(CARDS.items(), key=lambda named: named[1].gigabytes):
        cards.setdefault(" or ".join(map(str, card.gigabytes)), []).append(name if card.has_bf16 else f"{name} (fp32)")
    page.write_text(templates().get_template("model.md.j2").render(lines=lines, long=BATCH, short=SHORT, cards=cards))
    typer.echo(f"{page} written")


if __name__ == "__main__":
    typer.run(main)
