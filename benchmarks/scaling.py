"""Write docs/scaling.md: DEAL at 8B and 70B on paper. Nothing is measured, nothing is downloaded.

    python -m benchmarks.scaling

Memory comes from the functions of `deal plan`, time from `benchmarks.roofline`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from transformers import LlamaConfig

from benchmarks.roofline import Hardware, row_flops, step_cost, step_time
from deal_core.config import AdapterConfig, TrainConfig
from deal_core.method_config import MethodConfig
from deal_core.planning.memory import HEADROOM, BatchShape, MethodShape, ModelSize, plan_memory
from deal_core.planning.meta_model import measure_activations, measure_model

H100 = Hardware(
    name="H100 SXM5 80 GB", flops=989.4e12, memory_bandwidth=3.35e12, link_bandwidth=450e9, memory_bytes=80 * 10**9
)
LLAMA = {"vocab_size": 128256, "num_key_value_heads": 8, "tie_word_embeddings": False}
MODELS = {
    "Llama-3.1-8B": LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, **LLAMA
    ),
    "Llama-3.1-70B": LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, **LLAMA
    ),
}
RANK, REHEARSED = 32, 4
UTILISATIONS = (0.2, 0.4)
BATCH = BatchShape(num_rows=8, num_tokens=562, num_answer_tokens=50)
"""The defaults: 512 tokens of prompt and 50 of answer at most, eight rows. Rows of real data are shorter."""


def setups() -> list[tuple[int, bool, bool]]:
    """Devices, sharded, checkpointing."""
    return [(1, False, False), (1, False, True), (8, False, False), (8, False, True), (8, True, False), (8, True, True)]


def describe(name: str, config: Any) -> dict[str, Any]:
    """A model's sizes and its lines of the table."""
    adapter = AdapterConfig(rank=RANK)
    model = measure_model(config, adapter)
    factors = model.num_factor_numbers(RANK)
    return {
        "name": name, "parameters": model.parameters, "num_parameters": model.num_parameters,
        "num_adapter": sum(factors), "modules": len(model.modules),
        "flops_row": row_flops(model, BATCH, rank=RANK, checkpointing=False),
        "flops_row_checkpointing": row_flops(model, BATCH, rank=RANK, checkpointing=True),
        "lines": [line(config, model, *setup) for setup in setups()],
    }  # fmt: skip


def line(config: Any, model: ModelSize, devices: int, sharded: bool, checkpointing: bool) -> dict[str, Any]:
    """One setup: memory of each device, time of a step by what may bound it, rows per second."""
    train = TrainConfig(gradient_checkpointing=checkpointing)
    activations = measure_activations(config, AdapterConfig(rank=RANK), BATCH, "bf16", on_cpu=False)
    memory = plan_memory(
        model, activations, BATCH,
        MethodShape(rank=RANK, strategy="deal", method=MethodConfig(), is_first_task=False),
        train=train,
        precision="bf16",
        on_cpu=False,
    )
    total = memory.total - (memory.weights * (1 - 1 / devices) if sharded else 0)
    cost = step_cost(
        model, BATCH, memory.activations, rank=RANK, precision="bf16", checkpointing=checkpointing, rehearsed=REHEARSED,
        num_devices=devices, is_sharded=sharded,
    )  # fmt: skip
    times = [step_time(cost, H100, utilisation=share) for share in UTILISATIONS]
    return {
        "devices": devices, "sharded": sharded, "checkpointing": checkpointing, "memory": memory, "total": total,
        "fits": total <= HEADROOM * H100.memory_bytes, "cost": cost, "times": times,
        "rows_per_second": [devices * BATCH.num_rows / each.seconds for each in times],
    }  # fmt: skip


def main(page: Annotated[Path, typer.Option(help="Page to write.")] = Path("docs/scaling.md")) -> None:
    """Fill the page."""
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True, autoescape=False,
    )  # fmt: skip
    models = [describe(name, config) for name, config in MODELS.items()]
    page.write_text(
        templates.get_template("scaling.md.j2").render(
            models=models, hardware=H100, batch=BATCH, rank=RANK, rehearsed=REHEARSED, utilisations=UTILISATIONS,
            headroom=HEADROOM,
        )
    )
    typer.echo(f"{page} written")


if __name__ == "__main__":
    typer.run(main)
