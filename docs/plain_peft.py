"""Load a version with torch, transformers and peft alone: python docs/plain_peft.py BASE ADAPTER PRECISION PROMPT."""

import sys

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base, adapter, precision, prompt = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(base)
model = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, precision))
model = PeftModel.from_pretrained(model, adapter).eval()
begins = bool(tokenizer.bos_token) and prompt.startswith(tokenizer.bos_token)  # a chat template wrote it
with torch.no_grad():
    logits = model(**tokenizer(prompt, return_tensors="pt", add_special_tokens=not begins)).logits[0, -1].float()
for value, token in zip(*(part.tolist() for part in logits.topk(5)), strict=True):
    print(f"{value:.4f}\t{tokenizer.decode([token])!r}")
