"""Answers that are sentences, on a real model: work orders, and the same as chats.

Nightly: four adaptations of the built-in base model.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from deal_core.base_model.load import choose_dtype
from deal_core.base_model.sources import DEFAULT_BASE, resolve_base
from deal_core.evaluation.metrics import rouge_l
from infra.settings import HomeSettings
from tests.e2e.command import deal

ROOT = Path(__file__).parents[2]
REPAIRS = ROOT / "examples" / "repairs"
REJECTED = 3

pytestmark = [pytest.mark.e2e, pytest.mark.base_model, pytest.mark.nightly(minutes=6)]


def rows(split: str) -> list[dict[str, str]]:
    lines = (REPAIRS / "messages.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if row["split"] == split]


@pytest.fixture(params=["completion", "chat"])
def spec(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    """The example's spec; as chats, the same messages with the instruction as the system's."""
    found: dict[str, Any] = yaml.safe_load((REPAIRS / "spec.yaml").read_text(encoding="utf-8"))
    if request.param == "completion":
        found["task"]["data"] = str(REPAIRS / "messages.jsonl")
        return found
    path = tmp_path / "chats.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for split in ("train", "test"):
            for row in rows(split):
                pairs = (("user", row["message"]), ("assistant", row["work_order"]))
                said = [{"role": role, "content": text} for role, text in pairs]
                file.write(json.dumps({"messages": said, "split": split}) + "\n")
    found["task"] |= {"data": str(path), "format": "chat"}
    del found["task"]["columns"]
    return found


def adapt(folder: Path, spec: dict[str, Any], *, expect: int = 0) -> Any:
    path = folder / "spec.yaml"
    path.write_text(yaml.safe_dump(spec), encoding="utf-8")
    return deal(folder / "home", "adapt", str(path), "--force", expect=expect)


def test_sentences_are_learned_judged_rejected_and_answered(spec: dict[str, Any], tmp_path: Path) -> None:
    home = tmp_path / "home"
    learned = adapt(tmp_path, spec)
    assert learned["status"] == "promoted" and learned["metrics"] == {"repairs": "rouge_l"}
    assert learned["accuracies"]["repairs"] > 0.3

    worse = {**spec, "train": {**spec["train"], "learning_rate": 0.02, "schedule": "constant", "num_epochs": 1}}
    rejected = adapt(tmp_path, worse, expect=REJECTED)
    assert any(reason.startswith("repairs: ROUGE-L") and "champion's" in reason for reason in rejected["reasons"])

    is_chat = spec["task"].get("format") == "chat"
    for asked in rows("test")[:4]:  # the small model gives some messages an empty answer
        text = json.dumps([{"role": "user", "content": asked["message"]}]) if is_chat else asked["message"]
        answer = deal(home, "predict", text, "--lineage", "demo")
        if answer["answer"]:
            break
    assert answer["version"] == "1" and rouge_l(answer["answer"], asked["work_order"]) > 0.2

    folder = home / "store" / "adapters" / "demo" / learned["run_key"][:16]
    alone = plain_peft(folder, spec["task"]["instruction"], asked["message"], is_chat)
    assert rouge_l(alone, answer["answer"]) > 0.9, "the same words, but for rounding"


def plain_peft(folder: Path, instruction: str, message: str, is_chat: bool) -> str:
    """The version's answer with transformers and PEFT alone."""
    base = resolve_base(DEFAULT_BASE, HomeSettings().cache_dir)
    tokenizer = AutoTokenizer.from_pretrained(base)
    said = [{"role": "system", "content": instruction}, {"role": "user", "content": message}]
    prompt = f"{instruction}\n{message}"
    if is_chat:
        prompt = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=choose_dtype("auto"))
    model = PeftModel.from_pretrained(plain, str(folder)).eval()
    tokens = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    with torch.no_grad():
        found = model.generate(**tokens, max_new_tokens=40, do_sample=False)[0, tokens["input_ids"].shape[1] :]
    return str(tokenizer.decode(found, skip_special_tokens=True)).strip()
