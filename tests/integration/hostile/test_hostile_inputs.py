"""Broken and hostile files: each is refused or loses its bad rows, with a reason, within ten seconds."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import random
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from deal_core.config import DataConfig
from deal_core.data.dataset import Landing, build_dataset
from deal_core.data.schema import TaskSchema
from deal_core.data.source_files import files_at
from deal_core.errors import DataValidationError

NUM_GOOD = 40
MAX_SECONDS = 10.0
LABELS = ("late", "lost")
ROWS = [{"text": f"The parcel number {n} is late", "label": LABELS[n % 2]} for n in range(NUM_GOOD)]
Damage = Callable[[bytes, random.Random], bytes]


def csv_file() -> bytes:
    return pd.DataFrame(ROWS).to_csv(index=False).encode()


def jsonl_file() -> bytes:
    return "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def parquet_file() -> bytes:
    buffer = io.BytesIO()
    pd.DataFrame(ROWS).to_parquet(buffer)
    return buffer.getvalue()


FILES: dict[str, Callable[[], bytes]] = {
    "a.csv": csv_file,
    "a.jsonl": jsonl_file,
    "a.parquet": parquet_file,
    "a.csv.gz": lambda: gzip.compress(csv_file()),
    "a.jsonl.gz": lambda: gzip.compress(jsonl_file()),
}


def cut(data: bytes, chance: random.Random) -> bytes:
    return data[: chance.randrange(len(data))]


def flip(data: bytes, chance: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(chance.randint(1, 20)):
        changed[chance.randrange(len(changed))] = chance.randrange(256)
    return bytes(changed)


def insert(data: bytes, chance: random.Random) -> bytes:
    evil = (
        b"\0",
        b"\xff\xfe",
        b'"',
        b"\r",
        b"\n\n\n",
        b"{",
        b"[" * 5000,
        b"\xed\xa0\x80",
        b"1e999",
        b"\x1b[31m",
        b",,,,",
        b'{"text": {"text": ["a"]}, "label": 3}\n',
        b'{"text": "x", "text": "y", "label": "late"}\n',
        b"\xe2\x80\xae",
    )
    for _ in range(chance.randint(1, 4)):
        place = chance.randrange(len(data) + 1)
        data = data[:place] + chance.choice(evil) + data[place:]
    return data


def swap_pieces(data: bytes, chance: random.Random) -> bytes:
    first, second = sorted(chance.randrange(len(data) + 1) for _ in range(2))
    return data[second:] + data[first:second] + data[:first]


def recode(data: bytes, chance: random.Random) -> bytes:
    return data.decode("latin-1").encode(chance.choice(["utf-16", "utf-32", "utf-7", "utf-8-sig", "cp037"]))


DAMAGES: tuple[Damage, ...] = (cut, flip, insert, swap_pieces, recode)


def take(folder: Path, name: str, content: bytes) -> tuple[int, int] | str:
    """Numbers of good and bad rows, or why the file was refused."""
    source = folder / name
    source.write_bytes(content)
    started = time.process_time()
    found: tuple[int, int] | str
    try:
        task, config = TaskSchema(name="t", format="auto"), DataConfig(max_bad_share=1.0)
        made = build_dataset(Landing(sources=files_at(source), task=task, config=config), folder / "out")
        found = made.num_train + made.num_test, made.num_rejected
    except DataValidationError as error:
        found = str(error)
    assert time.process_time() - started < MAX_SECONDS, (name, content[:200])
    if isinstance(found, str):
        assert len(found) > 20 and not {"\0", "\x1b"} & set(found), found
    return found


def damage(seed: int) -> tuple[str, bytes]:
    chance = random.Random(seed)
    name = chance.choice(list(FILES))
    content = FILES[name]()
    for _ in range(chance.randint(1, 3)):
        content = chance.choice(DAMAGES)(content, chance) or b"\0"
    if chance.random() < 0.1:
        name = chance.choice(list(FILES))  # another format than its name says
    return name, content


@pytest.mark.parametrize("block", [0, *(pytest.param(block, marks=pytest.mark.nightly) for block in range(1, 10))])
def test_a_damaged_file_is_refused_or_loses_its_bad_rows(block: int, tmp_path: Path) -> None:
    found = [take(tmp_path, *damage(seed)) for seed in range(block * 50, (block + 1) * 50)]
    refused = sum(isinstance(each, str) for each in found)
    assert 0 < refused < 50, "some are beyond repair, some are not"


LINES = jsonl_file()
SPECIAL: dict[str, tuple[str, bytes | Callable[[], bytes]]] = {
    "empty": ("a.csv", b""),
    "only a header": ("a.csv", b"text,label\n"),
    "empty gzip": ("a.jsonl.gz", gzip.compress(b"")),
    "wrong compression": ("a.csv.gz", bz2.compress(csv_file())),
    "gzip inside gzip": ("a.jsonl.gz", gzip.compress(gzip.compress(LINES))),
    "missing column": ("a.csv", b"text\n" + b"x\n" * 30),
    "double column": ("a.csv", b"text,text,label\n" + b"x,y,late\n" * 30),
    "gzip bomb, one line": ("a.jsonl.gz", lambda: gzip.compress(b"0" * 300_000_000, 1)),
    "gzip bomb, empty lines": ("a.jsonl.gz", lambda: gzip.compress(b"\n" * 400_000, 1)),
    "gzip bomb, empty records": ("a.csv.gz", lambda: gzip.compress(b"text,label\n" + b"\n" * 400_000, 1)),
    "parquet by name": ("a.parquet", b"PAR1" + b"\0" * 1000 + b"PAR1"),
    "no known name": ("a.exe", b"MZ"),
}
KEEPS_THE_GOOD: dict[str, tuple[str, bytes]] = {
    "a cell of 10 MB": ("a.jsonl", LINES + json.dumps({"text": "x" * 10_000_000, "label": "late"}).encode() + b"\n"),
    "deeply nested": ("a.jsonl", LINES + b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b', "label": "late"}\n'),
    "NUL bytes": ("a.jsonl", LINES + b'{"text": "a\\u0000b", "label": "late"}\n\0\0\0\n'),
    "not UTF-8": ("a.csv", csv_file() + b"\xff\xfe broken,late\n"),
    "a number too large": ("a.jsonl", LINES + b'{"text": 1' + b"0" * 5000 + b', "label": "late"}\n'),
    "half a row": ("a.jsonl", LINES + b'{"text": "cut of'),
    "lone surrogate": ("a.jsonl", LINES + b'{"text": "\\ud800", "label": "late"}\n'),
}


@pytest.mark.parametrize("case", SPECIAL)
def test_a_file_that_is_no_use_is_refused_with_a_reason(case: str, tmp_path: Path) -> None:
    name, content = SPECIAL[case]
    assert isinstance(take(tmp_path, name, content() if callable(content) else content), str)


@pytest.mark.parametrize("case", KEEPS_THE_GOOD)
def test_one_bad_row_costs_no_good_one(case: str, tmp_path: Path) -> None:
    name, content = KEEPS_THE_GOOD[case]
    found = take(tmp_path, name, content)
    assert isinstance(found, tuple), found
    assert found[0] == NUM_GOOD and found[1] >= 1
    listed = (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()
    assert len(listed) == found[1] and all(json.loads(line) for line in listed)
