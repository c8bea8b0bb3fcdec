"""Load a version with torch, transformers and peft alone: python docs/plain_peft.py BASE ADAPTER PROMPT."""

import sys

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base, adapter, prompt = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(base)
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype="auto"), adapter).eval()
with torch.no_grad():
    logits = model(**tokenizer(prompt, return_tensors="pt")).logits[0, -1].float()
for value, token in zip(*(part.tolist() for part in logits.topk(5)), strict=True):
    print(f"{value:8.3f}  {tokenizer.decode([token])!r}")
