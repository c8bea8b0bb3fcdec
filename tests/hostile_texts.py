"""Families of hostile CSV and JSON lines files, plain and packed."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import json
import lzma
import tarfile
import zipfile
from collections.abc import Callable, Iterator

from tests.hostile import Case

NUM_GOOD = 40
ROWS = [{"text": f"The parcel number {number} is late", "label": ("late", "lost")[number % 2]} for number in range(40)]
CSV_LINES = [f"{row['text']},{row['label']}" for row in ROWS]
JSON_LINES = [json.dumps(row) for row in ROWS]
CSV = ("text,label\n" + "\n".join(CSV_LINES) + "\n").encode()
JSONL = ("\n".join(JSON_LINES) + "\n").encode()
TEXTS = {"csv": CSV, "jsonl": JSONL}
ASCII_BASED = ("latin-1", "cp1252", "koi8-r", "gb18030", "shift_jis", "euc-jp", "big5")
OTHERS = ("utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-7", "cp037", "iso2022_jp", "utf-8-sig")


def among(lines: list[str], bad: bytes, place: int, head: str = "") -> bytes:
    """Good lines with something else among them."""
    encoded = [line.encode() for line in lines]
    return b"\n".join([*([head.encode()] if head else []), *encoded[:place], bad, *encoded[place:]]) + b"\n"


def encodings() -> Iterator[Case]:
    for kind, good in TEXTS.items():
        for name in OTHERS:
            content = good.decode().encode(name)
            yield Case(f"{kind} in {name}", f"a.{kind}", content, NUM_GOOD * (name == "utf-8-sig"))
        for name in ASCII_BASED:
            word = "日本".encode(name) if name in ("gb18030", "shift_jis", "euc-jp", "big5") else "Ж".encode("koi8-r")
            row = b"%b,late\n" % word if kind == "csv" else b'{"text": "%b", "label": "late"}\n' % word
            yield Case(f"{kind} with a row in {name}", f"a.{kind}", good + row, NUM_GOOD)
        marks = (codecs.BOM_UTF8 * 2, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE, b"+/v8-", b"\xff")
        for mark in marks:
            yield Case(f"{kind} after {mark!r}", f"a.{kind}", mark + good)
        yield Case(f"{kind} with a mark in each line", f"a.{kind}", good.replace(b"\n", b"\n" + codecs.BOM_UTF8))


def nuls() -> Iterator[Case]:
    for kind, good in TEXTS.items():
        head = good.split(b"\n", 1)[0]
        yield Case(f"{kind} of NULs", f"a.{kind}", bytes(100_000))
        yield Case(f"{kind} that ends in NULs", f"a.{kind}", good + bytes(4096), NUM_GOOD)
        yield Case(f"{kind} that begins with a NUL", f"a.{kind}", b"\0" + good)
        yield Case(f"{kind} with NULs for blanks", f"a.{kind}", good.replace(b" ", b"\0"))
        yield Case(f"{kind} with NULs for line ends", f"a.{kind}", good.replace(b"\n", b"\0"))
        yield Case(f"{kind} with a NUL in its first line", f"a.{kind}", good.replace(head, head[:3] + b"\0" + head[3:]))


def line_ends() -> Iterator[Case]:
    for kind, good in TEXTS.items():
        for end in ("\r", "\r\n", "\n\r", "\x0b", "\x0c", "\x1e", "\x85", "\u2028", "\n\n\n", "\r\r\n"):
            kept = NUM_GOOD if end in ("\r\n", "\n\n\n") or (kind == "csv" and end == "\r") else 0
            yield Case(f"{kind} with {end!r}", f"a.{kind}", good.decode().replace("\n", end).encode(), kept)
        lines = good.decode().splitlines()
        mixed = "".join(line + ("\n", "\r\n")[number % 2] for number, line in enumerate(lines))
        yield Case(f"{kind} with mixed line ends", f"a.{kind}", mixed.encode(), NUM_GOOD)
        yield Case(f"{kind} without a last line end", f"a.{kind}", good.rstrip(b"\n"), NUM_GOOD)


BAD_CSV = {
    "an open quote": b'"never closed,late',
    "a quote in a quoted cell": b'"closed "early", they say",late',
    "a quote after a cell": b'a","x',
    "one quote": b'"',
    "three quotes": b'"""',
    "a quote and a comma": b'",',
    "a blank and a quote": b' "open',
    "too many cells": b"a,b,c,d",
    "one cell": b"alone",
    "commas": b"," * 5000,
    "quotes": b'"' * 4999,
    "no text": b",late",
    "no label": b"text,",
    "blanks": b"  ,  ",
    "a control": b"\x1b[31m,late",
    "no UTF-8": b"\xff\xfe,late",
    "a surrogate": b"\xed\xa0\x80,late",
    "a formula": b"=cmd|' /C calc'!A0,late,",
    "an overlong form": b"\xc0\xaf,late",
    "a long cell": b"x" * 30_000 + b",late",
    "a huge cell": b"x" * 5_000_000,
    "a cell of lines": b'"' + b"line\n" * 9000 + b'",late',
    "carriage returns": b"a\rb\rc",
    "direction": "\u202e,x,".encode(),
    "a label of lines": b'words,"late\nlost"',
    "a label of NULs": b"words,\0\0",
    "a backslash": b'a\\",b\\"',
}
BAD_JSON = {
    "half an object": b'{"text": "cut o',
    "an array": b'["text", "label"]',
    "a text": b'"text"',
    "a number": b"17",
    "null": b"null",
    "single quotes": b"{'text': 'a', 'label': 'late'}",
    "a comma too many": b'{"text": "a",}',
    "a comment": b'// {"text": "a"}',
    "a key twice": b'{"text": "a", "text": "b", "label": "late"}',
    "two objects": b'{"text": "a"}{"label": "late"}',
    "NaN": b'{"text": NaN, "label": "late"}',
    "infinity": b'{"text": 1e999, "label": Infinity, "label2": -1e999}',
    "an integer": b'{"text": %b}' % (b"9" * 5000),
    "a long fraction": b'{"text": 0.%b, "label": null}' % (b"9" * 50_000),
    "lists": b"[" * 100_000,
    "closed lists": b'{"text": %b%b, "label": "late"}' % (b"[" * 50_000, b"]" * 50_000),
    "objects": b'{"a":' * 50_000,
    "a lone surrogate": b'{"text": "\\ud800", "label": "late"}',
    "a surrogate as label": b'{"text": "words", "label": "\\udfff"}',
    "an escape": b'{"text": "\\x41", "label": "late"}',
    "a raw tab": b'{"text": "a\tb", "label": "late"}',
    "NUL": b'{"text": "a\\u0000b", "label": "late"}',
    "no UTF-8": b'{"text": "\xff", "label": "late"}',
    "a list as text": b'{"text": ["a"], "label": "late"}',
    "an object as label": b'{"text": "a", "label": {"late": 1}}',
    "true": b'{"text": true, "label": []}',
    "no text": b'{"label": "late"}',
    "no label": b'{"text": "words"}',
    "empty": b'{"text": "", "label": ""}',
    "no key": b'{"": "", " ": ""}',
    "a surrogate as key": b'{"\\ud800": 1}',
    "long": b'{"text": "%b"}' % (b"x" * 30_000),
    "a huge text": b'{"text": "%b", "label": "late"}' % (b"x" * 5_000_000),
    "1e5": b'{"text": 1e400000000, "label": ""}',
    "many keys": json.dumps({f"key {number}": number for number in range(20_000)}).encode(),
    "a huge exponent": b'{"text": 1e308, "label": "late", "x": 1E-999999999}',
    "binary": bytes(range(1, 9)) * 99,
}


def bad_lines() -> Iterator[Case]:
    for name, line in BAD_CSV.items():
        for place in (0, 21, 40):
            yield Case(f"csv, {name} at {place}", "a.csv", among(CSV_LINES, line, place, "text,label"), NUM_GOOD)
    for name, line in BAD_JSON.items():
        for place in (0, 40):
            yield Case(f"jsonl, {name} at {place}", "a.jsonl", among(JSON_LINES, line, place), NUM_GOOD)


def headers() -> Iterator[Case]:
    rows = "\n".join(CSV_LINES)
    quoted = '"text","label"'
    for head in (
        quoted,
        "",
        "\n\n",
        '"',
        '"text',
        "text",
        "text,text,label",
        "text,label,label",
        "TEXT,Text,label",
        ",",
        ",,,,",
        "text,label,",
        "text;label",
        "text\tlabel",
        "text,label\x00",
        "\x1b[2Jtext,label",
        "body,message,label,category",
        "prompt,completion,text,label",
        "late,lost",
        "text,label," * 5000,
    ):
        content = f"{head}\n{rows}\n".encode()
        yield Case(f"csv headed {head[:30]!r} ({len(head)})", "a.csv", content, NUM_GOOD * (head == quoted))
    yield Case("csv of a header", "a.csv", b"text,label\n")
    yield Case("csv of a header without an end", "a.csv", b"text,label")
    yield Case("csv of 100,000 columns", "a.csv", b",".join(b"c%d" % number for number in range(100_000)) + b"\n")
    for name, content in {
        "an array": json.dumps(ROWS).encode(),
        "an indented array": json.dumps(ROWS, indent=1).encode(),
        "one object": json.dumps({"rows": ROWS}).encode(),
        "an indented object": json.dumps(ROWS[0], indent=1).encode(),
        "no line ends": "".join(JSON_LINES).encode(),
        "separators of records": "\x1e".join(JSON_LINES).encode(),
        "nothing": b"",
        "blanks": b" \n" * 5000,
        "null": b"null",
        "columns": b'{"text": ["a"], "label": ["b"]}',
    }.items():
        yield Case(f"json of {name}", "a.json", content)


def much() -> Iterator[Case]:
    quotes = b'a","x\n' * 85_000
    yield Case("csv, 500 kB of quotes after cells", "a.csv", CSV + quotes)
    yield Case("csv, lines of a quote", "a.csv", b"text,label\n" + b'"x\n' * 40_000)
    yield Case("csv, quotes with an end", "a.csv", CSV + quotes[:60_000] + b'"x"y\n')
    long = b"a line of some more words, and of more than one cell, as there are" * 10 + b"\n"
    yield Case("csv, one cell of 6 MB of lines", "a.csv", CSV + b'"' + long * 9000, NUM_GOOD)
    yield Case("csv, one row of 10 MB", "a.csv", b"text,label\n" + b"x" * 10_000_000 + b",late\n")
    yield Case("jsonl, one row of 10 MB", "a.jsonl", b'{"text": "' + b"x" * 10_000_000 + b'", "label": "late"}\n')
    yield Case("jsonl, 30,000 rows of nothing", "a.jsonl", b"{}\n" * 30_000)
    labels = "".join(f"a text of number {number},label {number}\n" for number in range(2000))
    yield Case("csv, 2,000 labels", "a.csv", f"text,label\n{labels}".encode())
    yield Case(
        "csv, labels of 10,000 characters",
        "a.csv",
        b"text,label\n"
        + b"".join(
            b"a text of number %d,%b\n" % (number, b"x" * 10_000 + b"%d" % (number % 3)) for number in range(40)
        ),
        NUM_GOOD,
    )
    yield Case("csv, one text in all rows", "a.csv", b"text,label\n" + b"same,late\n" * 20_000)
    for value in ("train", "TEST ", "validation", "", "\0", '"open'):
        lines = "".join(f"{line},{('train', value)[number % 2]}\n" for number, line in enumerate(CSV_LINES))
        yield Case(f"csv, a split {value!r}", "a.csv", f"text,label,split\n{lines}".encode())


def _zip(content: bytes) -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        archive.writestr("a.csv", content)
    return target.getvalue()


def _tar(content: bytes) -> bytes:
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w:gz") as archive:
        entry = tarfile.TarInfo("a.csv")
        entry.size = len(content)
        archive.addfile(entry, io.BytesIO(content))
    return target.getvalue()


def _bomb(block: bytes, num_blocks: int, head: bytes = b"") -> bytes:
    return gzip.compress(head) + gzip.compress(block, 9) * num_blocks


def packed() -> Iterator[Case]:
    whole = gzip.compress(CSV)
    changes: dict[str, Callable[[bytes], bytes]] = {
        "its header": lambda data: data[:10],
        "its magic alone": lambda data: data[:2],
        "without its end": lambda data: data[:-8],
        "half of it": lambda data: data[: len(data) // 2],
        "another checksum": lambda data: data[:-5] + b"\0" + data[-4:],
        "rubbish after it": lambda data: data + b"rubbish",
        "NULs after it": lambda data: data + bytes(999),
        "a flag too many": lambda data: data[:3] + b"\xff" + data[4:],
        "an unknown method": lambda data: data[:2] + b"\x07" + data[3:],
        "packed twice": gzip.compress,
    }
    for name, change in changes.items():
        yield Case(f"gzip, {name}", "a.csv.gz", change(whole), NUM_GOOD * (name == "NULs after it"))
    yield Case("gzip of many members", "a.csv.gz", b"".join(gzip.compress(bytes([each])) for each in CSV), NUM_GOOD)
    for name, pack in {"bzip2": bz2.compress, "xz": lzma.compress, "zip": _zip, "tar": _tar}.items():
        for file in ("a.csv.gz", "a.csv", "a.jsonl"):
            yield Case(f"{name} called {file}", file, pack(CSV))
    for name, block, head in (
        ("zeros", bytes(2**20), b""),
        ("empty lines", b"\n" * 2**20, CSV),
        ("lines of a letter", b"a\n" * 2**19, CSV),
        ("rows", b"words,late\n" * 2**17, CSV),
        ("one line", b"x" * 2**20, CSV),
        ("commas", b"," * 2**20, CSV),
        ("quotes", b'"\n' * 2**19, CSV),
        ("objects", b"{}\n" * 2**18, JSONL),
        ("open lists", b"[" * 2**20, JSONL),
    ):
        kind = "jsonl" if head is JSONL else "csv"
        yield Case(f"bomb of {name}", f"a.{kind}.gz", _bomb(block, 300, head))


NAMES = (
    "a b.csv",
    "-rf.csv",
    "--json.csv",
    ".csv",
    "..csv",
    "a.CSV",
    "a.tar.csv",
    "é.csv",
    "e\u0301.csv",
    "🚚.csv",
    "a\nb.csv",
    "\x1b[31mred.csv",
    "\u202evsc.csv",
    "a'\"b.csv",
    "%s{text}.csv",
    "$HOME.csv",
    "a;rm -rf x.csv",
    "a\\b.csv",
    "*.csv",
    "con.csv",
    "a" * 250 + ".csv",
    "[red]x[bold].csv",
    "spec.csv",
)
WRONG_NAMES = (
    "a",
    "a.",
    "a.exe",
    "a.csv.zip",
    "a.gz",
    ".gz",
    "a.parquet",
    "a.json",
    "a.parquet.gz",
    "a.csv~",
    "a.tsv",
    "a.xlsx",
    "a.pkl",
    "a.py",
)


def names() -> Iterator[Case]:
    for name in NAMES:
        yield Case(f"the name {name[:40]!a}", name, CSV, 0 if name in (".csv", "..csv") else NUM_GOOD)
    for name in WRONG_NAMES:
        yield Case(f"the wrong name {name!r}", name, CSV)
    yield Case("no file", "none.csv", None)


FAMILIES = (encodings, nuls, line_ends, bad_lines, headers, much, packed, names)
