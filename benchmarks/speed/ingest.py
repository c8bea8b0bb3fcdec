"""Ingest of generated rows, against `datasets.load_dataset` and `map` that make the same checks.

    OMP_NUM_THREADS=1 python -m benchmarks.speed.ingest --rows 10000000 --rival-rows 1000000

Rates are compared on the same file of `--rival-rows` rows. The variants take turns, each in a process of its own, so
that other work of the machine falls on both. Both must keep the same rows. With `--rows` ours alone runs once more on a
file of that many rows, for its rate and its peak memory at that size.

The rival is what one would write with datasets: one batched map over the loaded rows that drops and lists the bad ones
and remembers the digests it has seen, then a filter and a Parquet file for each split. It has one process, as ours.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import platform
import random
import re
import statistics
import tempfile
import time
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import typer

from benchmarks.output import RESULTS, Out, alone, peak_bytes, write_result
from deal_core.config import DataConfig
from deal_core.data.dataset import Landing, build_dataset
from deal_core.data.schema import TaskSchema
from deal_core.data.source_files import files_at

FORMATS = {"parquet": "rows.parquet", "jsonl.gz": "rows.jsonl.gz"}
TASK = TaskSchema(name="support", labels=("refund", "delivery", "account", "card lost", "complaint"))
CONFIG = DataConfig(max_text_chars=1000, max_bad_share=0.5)
SHARE_DUPLICATES, SHARE_BAD = 0.02, 0.01
CHUNK_ROWS = 50_000
KEPT = ("num_train", "num_test", "sum_train", "sum_test")
UNDECODABLE = re.compile("[\x00\ud800-\udfff]")
SENTENCES = (
    "the parcel was late again and nobody answered my call about order refund please send it back to this address "
    "before Monday because card payment failed twice when I tried from phone account locked after update thanks"
)
WORDS = SENTENCES.split()


def text_of(number: int) -> str:
    """The text of a good row: 80 to 120 characters or so, each its own; a tenth is not ASCII, some quote a word."""
    state, words = number * 2654435761 + 12345, []
    for _ in range(14 + number % 5):
        state = (state * 1103515245 + 12345) % 2**31
        words.append(WORDS[(state >> 16) % len(WORDS)])
    if number % 10 == 3:
        words[2] = "Zürich café"
    if number % 20 == 7:
        words[5] = f'"{words[5]}"'
    return f"{number:x} {' '.join(words)}"


def make_rows(num_rows: int) -> Iterator[dict[str, str]]:
    """Good rows, and among them some that repeat an earlier one and some that are bad, each kind in its turn."""
    chance = random.Random(0)
    bad = ({"text": " "}, {"text": "too long " * 200}, {"label": "weather"}, {"text": "a NUL \0 within"})
    for number in range(num_rows):
        kind = chance.random()
        origin = chance.randrange(number + 1) if kind < SHARE_DUPLICATES else number
        row = {"text": text_of(origin), "label": TASK.labels[origin % len(TASK.labels)]}
        yield row | bad[number % len(bad)] if kind > 1 - SHARE_BAD else row


def write_rows(path: Path, num_rows: int) -> None:
    """Write the rows as Parquet or as gzip JSON lines, a chunk at a time."""
    schema = pa.schema([("text", pa.string()), ("label", pa.string())])
    rows = make_rows(num_rows)
    if path.suffix == ".gz":
        with gzip.open(path, "wt", encoding="utf-8", compresslevel=6) as lines:
            lines.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        return
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, num_rows, CHUNK_ROWS):
            chunk = [next(rows) for _ in range(min(CHUNK_ROWS, num_rows - start))]
            writer.write_table(pa.Table.from_pylist(chunk, schema))


def row_digest(*parts: str) -> bytes:
    """SHA-256 of a row, or of its text alone, blind to Unicode's form and to the amount of white space."""
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
                    share = int.from_bytes(row_digest(text)[:4], "big") / 2**32  # one text is on one side
                    good["is_test"].append(share < config.test_share)
                    continue
                reason = "duplicate row"
            quarantine.write(json.dumps({"row": number + 1, "reason": reason, "text": text, "label": label}) + "\n")
        return good

    with (folder / "quarantine.jsonl").open("w", encoding="utf-8") as quarantine:
        kind = "parquet" if source.suffix == ".parquet" else "json"
        rows = datasets.load_dataset(kind, data_files=str(source), split="train", cache_dir=str(folder / "cache"))
        checked = rows.map(
            check, batched=True, with_indices=True, remove_columns=rows.column_names, new_fingerprint="checked"
        )
    for split in ("train", "test"):
        part = checked.filter(
            lambda is_test, split=split: [each == (split == "test") for each in is_test],
            batched=True,
            input_columns="is_test",
            new_fingerprint=split,
        )
        part.remove_columns("is_test").to_parquet(folder / f"{split}.parquet")


def run_variant(name: str, source: Path, folder: Path) -> dict[str, Any]:
    """Build the dataset and return what it took in this process. The libraries are imported before the clock starts."""
    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
    started, before = time.perf_counter(), time.process_time()
    if name == "datasets":
        digest = None
        build_with_datasets(source, TASK.labels, folder, CONFIG)
    else:
        digest = build_dataset(Landing(sources=files_at(source), task=TASK, config=CONFIG), folder).sha256
    took = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - before}
    return {**took, "peak_bytes": peak_bytes(), "digest": digest, **what_is_in(folder)}


def what_is_in(folder: Path) -> dict[str, Any]:
    """How many rows each split has, and a digest of their digests, whatever their order."""
    found: dict[str, Any] = {}
    for split in ("train", "test"):
        total = 0
        with pq.ParquetFile(folder / f"{split}.parquet") as file:
            found[f"num_{split}"] = file.metadata.num_rows
            for batch in file.iter_batches(columns=["sha256"], use_threads=False):
                total = (total + sum(int(digest, 16) for digest in batch.column(0).to_pylist())) % 2**256
        found[f"sum_{split}"] = hashlib.sha256(str(total).encode()).hexdigest()[:16]
    return found


def measure(name: str, source: Path, num_rows: int) -> dict[str, Any]:
    """One variant on one file, in an empty folder."""
    with tempfile.TemporaryDirectory(dir=source.parent) as folder:
        found = alone(run_variant, name, source, Path(folder))
    rates = {f"rows_per_{unit}": num_rows / found[f"{unit}s"] for unit in ("second", "cpu_second")}
    return {**found, **rates}


def compare(source: Path, num_rows: int, measurements: int) -> dict[str, Any]:
    """Both variants in turns on one file; medians, and the median of the ratios of those that stood side by side."""
    runs: dict[str, list[dict[str, Any]]] = {"ours": [], "datasets": []}
    for number in range(measurements):
        for name in runs if number % 2 == 0 else reversed(runs):
            runs[name].append(measure(name, source, num_rows))
    kept = [{key: run[key] for key in KEPT} for found in runs.values() for run in found]
    assert all(each == kept[0] for each in kept), f"the variants kept different rows: {kept}"
    pairs = list(zip(runs["ours"], runs["datasets"], strict=True))
    figures = ("rows_per_second", "rows_per_cpu_second", "peak_bytes")
    medians = {
        name: {key: statistics.median(run[key] for run in found) for key in figures} for name, found in runs.items()
    }
    ratios = {key: statistics.median(ours[key] / rival[key] for ours, rival in pairs) for key in figures}
    return {"num_rows": num_rows, "median": medians, "ours_over_datasets": ratios, "measurements": runs}


def main(
    rows: Annotated[int, typer.Option(help="Rows of the file that ours alone is run on; 0: no such run.")] = 10_000_000,
    rival_rows: Annotated[int, typer.Option(help="Rows of the file that both are run on; 0: none.")] = 1_000_000,
    measurements: Annotated[int, typer.Option(help="Measurements of each variant.")] = 3,
    out: Out = RESULTS / "ingest.json",
) -> None:
    """Print and write rows per second and peak memory of both."""
    shares = {"duplicates": SHARE_DUPLICATES, "bad": SHARE_BAD}
    result: dict[str, Any] = {"python": platform.python_version(), "shares": shares, "formats": {}}
    for each, file_name in FORMATS.items():
        found = result["formats"][each] = {}
        with tempfile.TemporaryDirectory(prefix="deal-ingest-") as work:
            source = Path(work) / file_name
            if rival_rows:
                alone(write_rows, source, rival_rows)
                found["both"] = compare(source, rival_rows, measurements)
            if rows:
                alone(write_rows, source, rows)
                found["ours_alone"] = {"num_rows": rows, **measure("ours", source, rows)}
    write_result(out, result)


if __name__ == "__main__":
    typer.run(main)
