"""Six small files of support texts, a lineage's settings and two tiny base models: for tests/e2e/test_long_life.py."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path

import yaml

from benchmarks.tiny_base import build_tiny_base

LINEAGE = "support"
THINGS = ("card", "loan", "account", "transfer", "fee", "bill")
PLACES = ("at the bank", "in the shop", "on the phone", "at the clinic", "with the parcel", "by post")
NUM_ROWS = 120
COLOURS = {"red": "warm", "blue": "cold"}
WORDS_OF: Mapping[str, Mapping[str, str]] = {
    "monday/colours/bank.jsonl": COLOURS,
    "monday/sizes/bank.jsonl": {"huge": "large", "tiny": "small"},
    "tuesday/colours/agency.jsonl": {"red": "cold", "blue": "warm"},
    "tuesday/tempers/acme.jsonl": {"angry": "rude", "kind": "polite"},
    "wednesday/colours/shop.jsonl": {**COLOURS, "amber": "warm", "teal": "cold"},
    "wednesday/years/shop.jsonl": {"young": "new", "ancient": "old"},
}
"""The label of each word by file, in the order in which the files land. The agency's labels are the wrong way round."""
SETTINGS = {
    "lineage": LINEAGE,
    "retrain": {"when": "schedule", "cron": "* * * * *"},
    "gate": {"max_perplexity_ratio": None, "max_norm_ratio": None},
    "train": {
        "num_epochs": 8,
        "learning_rate": 0.01,
        "max_prompt_tokens": 64,
        "max_answer_tokens": 6,
        "checkpoint_steps": 0,
    },
}


def texts_of(words: Mapping[str, str], num_rows: int, seed: str) -> dict[str, str]:
    """Return texts with their labels, drawn at random. The words take turns."""
    draw, found = random.Random(seed), {}
    for place, number in enumerate(draw.sample(range(1000, 10000), num_rows)):
        word = [*words][place % len(words)]
        found[f"{word} {draw.choice(THINGS)} {draw.choice(PLACES)} number {number}"] = words[word]
    return found


def write_story(folder: Path) -> None:
    """Write the files of three days, `support.yaml`, and the base models `base` and `new-base`."""
    for name, words in WORDS_OF.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = texts_of(words, NUM_ROWS, name)
        path.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows.items()))
    build_tiny_base(folder / "base", width=64, seed=1)
    build_tiny_base(folder / "new-base", width=96, seed=2)
    settings = {**SETTINGS, "base_model": str((folder / "base").resolve())}
    (folder / "support.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
