"""The planned memory of a run, compared with the real tensors of a tiny model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    Gemma3Config,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen3Config,
    T5Config,
)

from benchmarks.speed.scaling import row_flops
from deal_core.adapter.reparametrize import Reparametrization
from deal_core.adapter.stack import LoraStack
from deal_core.adapter.state import attach_adapter
from deal_core.base_model import cpu_attention as attention
from deal_core.base_model.load import find_config
from deal_core.base_model.sources import DEFAULT_BASE, auto_class
from deal_core.config import AdapterConfig, TrainConfig
from deal_core.data.collate import answer_loss
from deal_core.data.schema import TaskSchema
from deal_core.errors import ConfigError
from deal_core.method_config import MethodConfig, RehearsalConfig
from deal_core.planning.memory import (
    MAX_TOKENISED,
    NO_BATCH,
    NUM_LONGEST,
    SCORE_BYTES,
    BatchShape,
    MethodShape,
    ModelSize,
    find_remedies,
    largest_batch,
    longest_of,
    plan_memory,
)
from deal_core.planning.meta_model import measure_model
from deal_core.strategies import strategy_class
from deal_core.strategies.strategy import KeptSize, PlannedArrival
from tests.deal_configs import deal_with

LLAMA = LlamaConfig(
    vocab_size=300,
    hidden_size=64,
    intermediate_size=192,
    num_hidden_layers=5,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=False,
)
ADAPTER = AdapterConfig(rank=8)
FIRST = MethodShape(rank=8, strategy="deal", method=MethodConfig(), is_first_task=True)
BATCH = BatchShape(num_rows=3, num_tokens=24, num_answer_tokens=5)


def real_model(config: LlamaConfig) -> nn.Module:
    model = LlamaForCausalLM(config)
    model.requires_grad_(False)
    return attach_adapter(model, ADAPTER, seed=0)


def real_batch(batch: BatchShape) -> dict[str, torch.Tensor]:
    tokens = torch.randint(0, 300, (batch.num_rows, batch.num_tokens))
    mask = torch.ones_like(tokens)
    mask[0, :4] = 0  # a shorter row, as in any batch
    return {
        "input_ids": tokens,
        "attention_mask": mask,
        "position_ids": (mask.cumsum(-1) - 1).clamp(min=0),
        "labels": tokens[:, -batch.num_answer_tokens :],
    }


def test_parameters_and_adapter_are_those_of_the_real_model() -> None:
    size, model = measure_model(LLAMA, ADAPTER), real_model(LLAMA)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert size.num_parameters == sum(p.numel() for p in model.parameters()) - trained
    assert sum(size.num_factor_numbers(8)) == trained
    assert size.parameters["embeddings"] == size.parameters["output layer"] == 300 * 64
    tied = LlamaConfig(**{**LLAMA.to_dict(), "tie_word_embeddings": True})
    assert measure_model(tied, ADAPTER).num_parameters == size.num_parameters - 300 * 64


SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
}


@pytest.mark.parametrize("on_cpu", [True, False])
@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SIZES),
        Qwen3Config(**SIZES, head_dim=32),
        MixtralConfig(**SIZES, num_local_experts=4),
        GPT2Config(vocab_size=300, n_embd=128, n_layer=3, n_head=8, resid_pdrop=0, attn_pdrop=0, embd_pdrop=0),
        T5Config(
            vocab_size=300, d_model=128, d_kv=16, d_ff=352, num_layers=3, num_heads=8, dropout_rate=0,
            feed_forward_proj="gated-gelu", decoder_start_token_id=0,
        ),
    ],
    ids=lambda value: getattr(value, "model_type", f"on_cpu={value}"),
)  # fmt: skip
def test_activations_are_about_what_autograd_keeps_of_a_real_batch(config: PretrainedConfig, on_cpu: bool) -> None:
    batch = BatchShape(num_rows=3, num_tokens=40, num_answer_tokens=5)
    model = auto_class(config).from_config(config).requires_grad_(False).eval()
    if config.model_type in attention.MODEL_TYPES:
        model.set_attn_implementation(attention.NAME if on_cpu else "sdpa")
    model = attach_adapter(model, ADAPTER, seed=0)
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor  # kept alive, so that no address is used twice
        return tensor

    rows = real_batch(batch)
    if config.is_encoder_decoder:
        rows = {"input_ids": rows["input_ids"][:, :-5], "labels": rows["labels"].contiguous()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        answer_loss(model, rows)
    real = sum(t.untyped_storage().nbytes() for address, t in kept.items() if address not in own)
    planned = measure_model(config, ADAPTER).activation_bytes(batch, 8, "fp32", on_cpu=on_cpu, checkpointing=False)
    assert 0.85 * real < planned < 1.2 * real


def test_activations_grow_with_the_batch_and_shrink_with_checkpointing() -> None:
    size = measure_model(LLAMA, ADAPTER)

    def kept(batch: BatchShape, checkpointing: bool = False) -> int:
        return size.activation_bytes(batch, 8, "fp32", on_cpu=True, checkpointing=checkpointing)

    assert kept(replace(BATCH, num_rows=6)) == 2 * kept(BATCH)
    assert kept(replace(BATCH, num_answer_tokens=10)) == kept(BATCH) + 2 * 3 * 5 * 300 * 4
    ends, boundaries = 2 * 3 * 5 * 300 * 4, 5 * 3 * 24 * 64 * 4
    assert kept(BATCH, checkpointing=True) == boundaries + (kept(BATCH) - ends) / 5 + ends


def test_what_a_model_without_attention_keeps_is_not_guessed() -> None:
    mamba = MambaConfig(vocab_size=300, hidden_size=64, num_hidden_layers=2)
    size = measure_model(mamba, AdapterConfig(target_modules=("in_proj",)))
    assert planned(size, batch=NO_BATCH).activations == 0 < planned(size, batch=NO_BATCH).certain
    with pytest.raises(ConfigError):
        planned(size)


def random_stack(num_out: int, num_in: int) -> LoraStack:
    a = tuple(nn.Parameter(torch.randn(8, num_in)) for _ in range(3))
    b = tuple(nn.Parameter(torch.randn(num_out, 8)) for _ in range(3))
    return LoraStack(("m0", "m1", "m2"), a, b)


@pytest.mark.parametrize("changes", [{}, {"core": "frozen"}, {"mixing": False}])
def test_the_method_keeps_as_many_bytes_as_are_planned(changes: dict[str, str]) -> None:
    stack, deal = random_stack(400, 300), deal_with(**changes)  # type: ignore[arg-type]
    network = Reparametrization([stack], deal, torch.Generator())
    size = replace(measure_model(LLAMA, ADAPTER), modules=((400, 300),) * 3)
    factors = 4 * sum(size.num_factor_numbers(8))
    state = sum(t.numel() * t.element_size() for t in network.state_dict().values())
    trained = sum(4 * p.numel() for p in network.parameters())
    plan = planned(size, is_first_task=False, method=MethodConfig(deal=deal))
    assert plan.adapter == pytest.approx(factors + state, rel=0.02)
    assert plan.optimiser == pytest.approx(factors + 3 * trained, rel=0.02)
    first = planned(size, is_first_task=True, method=MethodConfig(deal=deal))
    assert (first.adapter, first.optimiser) == (factors, 3 * factors)


def planned(size: ModelSize, **changes: object):  # type: ignore[no-untyped-def]
    shape = replace(FIRST, **{name: changes.pop(name) for name in ("method", "is_first_task") if name in changes})  # type: ignore[arg-type]
    given = {"batch": BATCH, "train": TrainConfig(), "precision": "fp32", "on_cpu": True, **changes}
    return plan_memory(size, shape=shape, **given)  # type: ignore[arg-type]


def test_weights_follow_the_precision() -> None:
    size = measure_model(LLAMA, ADAPTER)
    assert planned(size).weights == 4 * size.num_parameters == 2 * planned(size, precision="bf16").weights
    assert planned(size).total == planned(size).certain + planned(size).activations + planned(size).workspace


def test_only_the_linear_layers_are_quantized() -> None:
    size = measure_model(LLAMA, ADAPTER)
    linear = size.parameters["linear layers"]
    rest = 2 * (size.num_parameters - linear)
    for quantize, num_bytes in (("8bit", linear), ("4bit", 4.127 / 8 * linear)):
        train = TrainConfig(quantize=quantize)  # type: ignore[arg-type]
        assert planned(size, precision="bf16", train=train).weights == pytest.approx(num_bytes + rest, abs=1)


def test_of_a_sharded_model_a_device_holds_its_part_two_layers_and_what_is_whole() -> None:
    size = replace(measure_model(LLAMA, ADAPTER), num_layers=32)
    whole = size.parameters["embeddings"] + size.parameters["output layer"]
    layers = size.num_parameters - whole
    for num_shards, held in ((1, layers), (2, layers / 2 + layers / 16), (8, layers / 8 + layers / 16)):
        assert planned(size, num_shards=num_shards).weights == pytest.approx(4 * (whole + held), abs=4)
    assert planned(replace(size, num_layers=2), num_shards=4).weights == 4 * size.num_parameters
    quantized = TrainConfig(quantize="8bit")
    assert planned(size, train=quantized, num_shards=8) == planned(size, train=quantized), "it cannot be sharded"


def test_a_model_with_a_config_for_its_texts_is_measured_by_it() -> None:
    text = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "head_dim": 16}
    both = Gemma3Config(
        text_config={**text, "num_attention_heads": 4, "num_key_value_heads": 2},
        vision_config={"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2},
    )
    adapter = AdapterConfig(target_modules=("q_proj", "v_proj"))
    size = measure_model(both, adapter)
    assert (size.num_layers, size.hidden_size, size.num_heads, size.vocab_size) == (3, 64, 4, 300)
    assert len(size.layers) == 3 and size.layers == measure_model(both.text_config, adapter).layers


def test_experts_that_are_no_linear_layers_are_not_quantized() -> None:
    mixture = MixtralConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
    )
    size = measure_model(mixture, AdapterConfig(target_modules=("q_proj", "v_proj")))
    layer = 2 * 64 * 64 + 2 * 64 * 32  # queries and output, keys and values
    assert size.parameters["linear layers"] == 2 * layer
    assert size.parameters["other matrices"] == 2 * (3 * 4 * 64 * 128 + 4 * 64), "experts and router"


@pytest.mark.parametrize("most", [0, MAX_TOKENISED])
def test_the_longest_row_is_found_among_scripts_with_more_tokens_per_character(base, task, most, monkeypatch) -> None:
    monkeypatch.setattr("deal_core.planning.memory.MAX_TOKENISED", most)
    latin, other = [f"plain words {number}" + " and more" * 50 for number in range(NUM_LONGEST)], ["漢字仮名" * 40]
    train = TrainConfig(max_prompt_tokens=4096)
    lengths = [
        longest_of(
            Dataset.from_dict({"input": texts, "output": ["red"] * len(texts)}), base.tokenizer, task, (), train, 8, {}
        ).num_tokens
        for texts in (latin, other, [*latin, *other])
    ]
    assert lengths[2] == max(lengths[:2]) and len(other[0]) < len(latin[0])
    assert lengths[1] > lengths[0], "of the characters a byte-level tokenizer makes several tokens each"


def test_the_longest_kept_row_counts_and_then_the_new_texts_of_its_task_do_not(base, task, rows) -> None:
    """A task without kept rows is rehearsed on the new texts: under its instruction, with its longest label."""
    old = TaskSchema(name="old", labels=("x", "a label of a good many words"), instruction="Say what it is. " * 9)
    given = (rows(12), base.tokenizer, task, (old,), TrainConfig(max_prompt_tokens=300), 8)

    def longest(kept: dict[str, KeptSize]) -> tuple[int, int]:
        batch = longest_of(*given, kept)
        assert batch.num_rows == 8
        return batch.num_tokens - batch.num_answer_tokens, batch.num_answer_tokens

    asked, short = longest({}), longest({"old": KeptSize(num_rows=3, longest_prompt=5, longest_answer=2)})
    assert asked[0] > short[0] + 20 and asked[1] > short[1]
    long = {"old": KeptSize(num_rows=3, longest_prompt=250, longest_answer=2)}
    assert longest(long) == (250, short[1])
    assert longest({"old": KeptSize(num_rows=3, longest_prompt=5, longest_answer=70)}) == (short[0], 70)


def test_rehearsed_rows_of_a_step_count_where_there_are_any() -> None:
    new, old = (TaskSchema(name=name, labels=("a", "b"), instruction=f"The {name} one?") for name in ("new", "old"))

    def rows_of(strategy: str, *old_tasks: TaskSchema, kept: tuple[str, ...] = (), **rehearsal: Any) -> int:
        sizes = dict.fromkeys(kept, KeptSize(num_rows=5, longest_prompt=9, longest_answer=2))
        arrival = PlannedArrival(task=new, old_tasks=old_tasks, kept=sizes, num_rows=9, num_steps=3)
        method = MethodConfig(rehearsal=RehearsalConfig(**rehearsal))
        return strategy_class(strategy).rehearsed_per_step(method, arrival)

    assert rows_of("deal", old, per_step=9) == rows_of("replay", old, kept=("old",), per_step=9) == 9
    assert rows_of("deal", old, rows=0) == 4, "on the new texts"
    assert (
        rows_of("deal") == rows_of("replay") == rows_of("seq_lora", old, kept=("old",)) == rows_of("replay", old) == 0
    )
    assert rows_of("deal", new) == 0 and rows_of("deal", new, kept=("new",)) == 4, "it returns"
    train = TrainConfig(batch_size=2)
    assert [largest_batch(train, rehearsed_per_step=number, on_cpu=True) for number in (0, 9)] == [2, 9]
    assert [largest_batch(train, rehearsed_per_step=number, on_cpu=False) for number in (0, 9)] == [2, 11]


def test_remedies_say_what_fits_and_keep_the_rows_of_a_step() -> None:
    size = measure_model(LLAMA, ADAPTER)

    def memory_of(train: TrainConfig, precision: str):  # type: ignore[no-untyped-def]
        return plan_memory(
            size,
            replace(BATCH, num_rows=train.batch_size, num_tokens=train.max_prompt_tokens),
            FIRST,
            train=train,
            precision=precision,
            on_cpu=True,
        )

    train = TrainConfig(batch_size=7, gradient_accumulation_steps=2, max_prompt_tokens=512)
    limit = memory_of(replace(train, batch_size=1), "fp32").total
    found = {each.change.split(":")[0]: each for each in find_remedies(memory_of, train, "fp32", limit)}
    assert found["train.gradient_checkpointing"].fits == (
        memory_of(replace(train, gradient_checkpointing=True), "fp32").total <= limit
    )
    assert found["train.batch_size"].change == "train.batch_size: 1 with gradient_accumulation_steps: 14"
    assert found["train.batch_size"].fits and found["all of these together"].fits
    assert not found["weights in bf16, on a device that computes in it"].fits
    quantized = memory_of(replace(train, quantize="4bit"), "fp32").total
    assert found["train.quantize"].total_bytes == quantized < memory_of(train, "fp32").total

    def of_short_rows(changed: TrainConfig, precision: str):  # type: ignore[no-untyped-def]
        return memory_of(replace(changed, max_prompt_tokens=64), precision)

    short = find_remedies(of_short_rows, train, "fp32", 1000)
    assert not any("max_prompt_tokens" in each.change for each in short), "which changes nothing here"
    nothing = find_remedies(memory_of, train, "fp32", 1000)
    assert not any(each.fits for each in nothing)


def test_operations_are_those_that_torch_counts() -> None:
    batch = BatchShape(num_rows=2, num_tokens=16, num_answer_tokens=4)
    model = real_model(LLAMA)
    with FlopCounterMode(display=False) as counter:
        answer_loss(model, real_batch(batch)).backward()
    expected = 2 * row_flops(measure_model(LLAMA, ADAPTER), batch, rank=8, checkpointing=False)
    assert expected == pytest.approx(counter.get_total_flops(), rel=0.1)


def test_a_config_is_found_without_weights(tmp_path: Path, offline_hub: Path) -> None:
    built_in = find_config(DEFAULT_BASE, tmp_path / "cache")
    assert built_in.folder is None and measure_model(built_in.config, ADAPTER).num_parameters == 134_515_008
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(LLAMA.to_dict()))
    local = find_config(str(tmp_path / "model"), tmp_path)
    assert local.folder is None and local.config.hidden_size == 64
    (tmp_path / "model" / "model.safetensors").touch()
    assert find_config(str(tmp_path / "model"), tmp_path).folder == tmp_path / "model"
    with pytest.raises(ConfigError, match="could not be fetched from the Hub"):
        find_config("someone/some-model", tmp_path)
    with pytest.raises(ConfigError, match="There is no base model"):
        find_config("./nowhere/model", tmp_path)


def test_rows_without_padding_are_scored_against_each_other() -> None:
    size = measure_model(LLAMA, ADAPTER)
    short = BatchShape(num_rows=8, num_tokens=64, num_answer_tokens=1)

    def workspace(train: TrainConfig) -> int:
        return plan_memory(size, short, FIRST, train=train, precision="fp32", on_cpu=True).workspace

    padded, in_one_line = workspace(TrainConfig()), workspace(TrainConfig(padding_free=True))
    assert in_one_line == SCORE_BYTES * size.num_heads * (8 * 64) ** 2 > padded
