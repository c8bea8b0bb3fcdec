"""Small models of the usual architectures: learned twice, judged, asked, and handed over to vLLM and to PEFT alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from infra.settings import EngineSettings
from infra.store.opening import open_store
from tasks.predict import predict
from tasks.serving.publish import publish
from tests.adapting import BANK, CLINIC, evaluation_of, run, version_of

pytestmark = pytest.mark.usefixtures("prefect_api", "home", "without_mlflow")

PLAIN_PEFT = Path(__file__).parents[3] / "docs" / "plain_peft.py"
TRAIN = {"max_steps": 3, "max_prompt_tokens": 192, "max_answer_tokens": 12, "checkpoint_steps": 0}
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
}
TARGETS = {
    "llama": {"q_proj", "v_proj"},
    "qwen3": {"q_proj", "v_proj"},
    "gemma3_text": {"q_proj", "v_proj"},
    "phi3": {"qkv_proj"},
}


def build(model_type: str, tokenizer_of: Path, folder: Path) -> Path:
    """Write a model of two layers with random weights. As Gemma and Phi do, it stops at a second token too."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_of)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](vocab_size=len(tokenizer), **SIZES, **ids))
    stops = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    model.generation_config = GenerationConfig(**{**ids, "eos_token_id": stops})
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.nightly(minutes=2)
@pytest.mark.parametrize("model_type", TARGETS)
def test_an_architecture_goes_the_whole_way(model_type: str, tiny_base: Path, tmp_path: Path) -> None:
    base = build(model_type, tiny_base, tmp_path / model_type)
    run(base, BANK, train=TRAIN)
    second = run(base, CLINIC, train=TRAIN)
    assert second.status == "promoted" and version_of(second).parent_version == "1"
    assert second.accuracies.keys() == {"bank", "clinic"}
    assert evaluation_of(second)["adapter"]["is_changed"], "the second arrival changed the adapter"

    answer = predict(
        open_store(), "Patient reports chest pain since this morning.", lineage="l", task="clinic", version=None
    )
    published = publish(open_store(), "l", tmp_path / "adapters", EngineSettings())
    config = json.loads((Path(published.folder) / "adapter_config.json").read_text())
    assert {*config["target_modules"]} == TARGETS[model_type] and config["base_model_name_or_path"] == str(base)

    command = [sys.executable, str(PLAIN_PEFT), str(base), published.folder, answer.precision, answer.prompt]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    shown = {token: float(logit) for logit, token in (line.split("\t") for line in done.stdout.splitlines())}
    expected = {repr(token): logit for token, logit in answer.first_token_logits.items()}
    assert max(shown.values()) == pytest.approx(max(expected.values()), abs=0.05), "PEFT alone gives the same"
    both = shown.keys() & expected.keys()
    assert both and {token: shown[token] for token in both} == pytest.approx({t: expected[t] for t in both}, abs=0.05)
