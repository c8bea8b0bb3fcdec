"""The checks of ingest as one writes them with datasets: the rival of `benchmarks.ingest`."""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets

from deal_core.config import DataConfig

UNDECODABLE = re.compile("[\x00\ud800-\udfff]")


def row_digest(*parts: str) -> bytes:
    """SHA-256 of a row or of its text, blind to Unicode's form and to the amount of white space."""
    normal = [" ".join(unicodedata.normalize("NFC", part).split()) for part in parts]
    return hashlib.sha256(json.dumps(normal, ensure_ascii=False).encode()).digest()


def problem_of(text: str | None, label: str | None, labels: dict[str, str], max_chars: int) -> str | None:
    """What is wrong with a row, by its cells."""
    if not text or not text.strip():
        return "empty text"
    if len(text) > max_chars:
        return "over-long text"
    if UNDECODABLE.search(text):
        return "bad encoding"
    if " ".join((label or "").split()).casefold() not in labels:
        return "label outside the task's set"
    return None


def build_with_datasets(source: Path, labels: Sequence[str], folder: Path, config: DataConfig) -> None:
    """Write train.parquet, test.parquet and quarantine.jsonl."""
    datasets.disable_progress_bars()
    label_of_key = {label.casefold(): label for label in labels}
    seen: set[bytes] = set()

    def check(batch: dict[str, list[Any]], numbers: list[int]) -> dict[str, list[Any]]:
        good: dict[str, list[Any]] = {"input": [], "output": [], "sha256": [], "is_test": []}
        for number, text, label in zip(numbers, batch["text"], batch["label"], strict=True):
            reason = problem_of(text, label, label_of_key, config.max_text_chars)
            if reason is None:
                text = text.strip()
                key = " ".join(label.split()).casefold()
                digest = row_digest(text, key)
                if digest not in seen:
                    seen.add(digest)
                    good["input"].append(text)
                    good["output"].append(label_of_key[key])
                    good["sha256"].append(digest.hex())
                    good["is_test"].append(int.from_bytes(row_digest(text)[:4], "big") / 2**32 < config.test_share)
                    continue
                reason = "duplicate row"
            quarantine.write(json.dumps({"row": number + 1, "reason": reason, "text": text, "label": label}) + "\n")
        return good

    with (folder / "quarantine.jsonl").open("w", encoding="utf-8") as quarantine:
        kind = "parquet" if source.suffix == ".parquet" else "json"
        rows = datasets.load_dataset(kind, data_files=str(source), split="train", cache_dir=str(folder / "cache"))
        checked = rows.map(check, batched=True, with_indices=True, remove_columns=rows.column_names,
                           new_fingerprint="checked")  # fmt: skip
    for split in ("train", "test"):
        part = checked.filter(lambda is_test, split=split: [each == (split == "test") for each in is_test],
                              batched=True, input_columns="is_test", new_fingerprint=split)  # fmt: skip
        part.remove_columns("is_test").to_parquet(folder / f"{split}.parquet")
