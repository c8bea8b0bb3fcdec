"""Families of hostile Parquet files and chats."""

from __future__ import annotations

import datetime
import decimal
import gzip
import io
import json
import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.hostile import Case
from tests.hostile_texts import NUM_GOOD, ROWS

ABORTS = Path(__file__).parent / "data" / "abort.parquet"
"""A file of 60 rows; of a column the footer names two types, and Arrow ends the process at its statistics."""
TEXT = [row["text"] for row in ROWS]
LABEL = [row["label"] for row in ROWS]


def written(columns: dict[str, Any] | pa.Table, **options: Any) -> bytes:
    target = io.BytesIO()
    table = columns if isinstance(columns, pa.Table) else pa.table(columns)
    pq.write_table(table, target, **{"compression": "zstd", **options})
    return target.getvalue()


def repeated(value: str, places: list[int], *others: str) -> pa.DictionaryArray:
    return pa.DictionaryArray.from_arrays(pa.array(places, pa.int32()), pa.array([value, *others]))


def _moments(kind: pa.DataType, number: int = 2**62) -> pa.Array:
    return pa.array([number, 0, None, -number] * 10, pa.int64()).view(kind)


def _nested(depth: int) -> pa.Array:
    values = pa.array(["deep"] * 40)
    for _ in range(depth):
        values = pa.ListArray.from_arrays(pa.array(range(41), pa.int32()), values)
    return values


def odd_columns() -> dict[str, pa.Array]:
    texts = pa.array([text.encode() for text in TEXT])
    numbers = pa.array(range(40))
    return {
        **{str(kind): numbers.cast(kind) for kind in (pa.int8(), pa.uint64(), pa.float32(), pa.float64())},
        "halves": pa.array(range(40), pa.float32()).cast(pa.float16()),
        "no numbers": pa.array([float("nan"), float("inf"), -0.0, 1e308] * 10),
        "bools": pa.array([True, None] * 20),
        "moments": _moments(pa.timestamp("us")),
        "nanoseconds": _moments(pa.timestamp("ns")),
        "seconds": _moments(pa.timestamp("ms"), 10**14),
        "Mars": _moments(pa.timestamp("us", "Mars/Base"), 10**15),
        "an empty zone": _moments(pa.timestamp("us", "+99:99"), 10**15),
        "times": _moments(pa.time64("us"), 5),
        "far times": _moments(pa.time64("ns"), 2**62),
        "durations": _moments(pa.duration("s"), 2**62),
        "days": pa.array([2**30, -(2**30)] * 20, pa.int32()).view(pa.date32()),
        "decimals": pa.array([decimal.Decimal("9" * 76)] * 40, pa.decimal256(76, 0)),
        "fractions": pa.array([decimal.Decimal("0." + "3" * 30)] * 40, pa.decimal128(38, 30)),
        "bytes": texts,
        "large bytes": texts.cast(pa.large_binary()),
        "views": pa.array(TEXT, pa.string_view()),
        "fixed bytes": pa.array([b"abcd"] * 40, pa.binary(4)),
        "no UTF-8": pa.array([b"\xff\xfe"] * 40).view(pa.string()),
        "surrogates": pa.array([b"\xed\xa0\x80"] * 40).view(pa.string()),
        "NULs": pa.array(["a\0b"] * 40),
        "lists": pa.array([["a"], [], None, [None]] * 10),
        "large lists": pa.array([["a"]] * 40, pa.large_list(pa.string())),
        "fixed lists": pa.array([["a", "b"]] * 40, pa.list_(pa.string(), 2)),
        "structs": pa.array([{"a": None}] * 40),
        "maps": pa.array([[("a", 1), ("a", 2)]] * 40, pa.map_(pa.string(), pa.int32())),
        "nulls": pa.nulls(40),
        "a dictionary": pa.array(TEXT).dictionary_encode(),
        "a dictionary of numbers": numbers.dictionary_encode(),
        "uuids": pa.array([bytes(16)] * 40, pa.uuid()),
        "json": pa.array(['{"a": 1}'] * 40, pa.json_()),
        "lists 60 deep": _nested(60),
        "dates": pa.array([datetime.date(1, 1, 1)] * 40),
    }


def types() -> Iterator[Case]:
    for name, column in odd_columns().items():
        try:
            beside = written({"text": TEXT, "label": LABEL, "other": column})
        except pa.ArrowException:
            continue  # this version of Arrow does not write it
        yield Case(f"parquet, {name} in another column", "a.parquet", beside, NUM_GOOD)
        # all rows bad in that column, so that each is listed whole
        yield Case(
            f"parquet, {name} beside bad rows",
            "a.parquet",
            written({"text": [*TEXT[:-9], *[""] * 9], "label": LABEL, "other": column}),
            NUM_GOOD - 9,
        )
        yield Case(f"parquet, {name} as text", "a.parquet", written({"text": column, "label": LABEL}))
        yield Case(f"parquet, {name} as label", "a.parquet", written({"text": TEXT, "label": column}))
        yield Case(f"parquet, {name} as messages", "a.parquet", written({"messages": column}))


def shapes() -> Iterator[Case]:
    good = {"text": TEXT, "label": LABEL}
    for name, table in {
        "no rows": pa.table(good).slice(0, 0),
        "no columns": pa.table({}),
        "one row": pa.table(good).slice(0, 1),
        "two texts": pa.Table.from_arrays([pa.array(TEXT)] * 2 + [pa.array(LABEL)], ["text", "text", "label"]),
        "no names": pa.Table.from_arrays([pa.array(TEXT), pa.array(LABEL)], ["", ""]),
        "odd names": pa.Table.from_arrays([pa.array(TEXT), pa.array(LABEL)], ["\x1b[31m", "a\0b"]),
    }.items():
        yield Case(f"parquet of {name}", "a.parquet", written(table))
    wide = {**good, **{f"column {number}": pa.nulls(40, pa.int8()) for number in range(500)}}
    yield Case("parquet of 502 columns", "a.parquet", written(wide), NUM_GOOD)
    yield Case("parquet of a row a group", "a.parquet", written(good, row_group_size=1), NUM_GOOD)
    yield Case("parquet of tiny pages", "a.parquet", written(good, data_page_size=1, write_batch_size=1), NUM_GOOD)
    for codec in ("snappy", "gzip", "brotli", "lz4", "none"):
        for version in ("1.0", "2.0"):
            content = written(good, compression=codec, data_page_version=version)
            yield Case(f"parquet, {codec}, pages {version}", "a.parquet", content, NUM_GOOD)
    for encoding in ("PLAIN", "DELTA_BYTE_ARRAY", "DELTA_LENGTH_BYTE_ARRAY"):
        content = written(good, use_dictionary=False, column_encoding={"text": encoding, "label": encoding})
        yield Case(f"parquet, {encoding}", "a.parquet", content, NUM_GOOD)
    yield Case("parquet in gzip", "a.parquet.gz", gzip.compress(written(good)), NUM_GOOD)


def damages() -> Iterator[Case]:
    whole = written({"text": TEXT, "label": LABEL})
    for part in range(1, 16):
        yield Case(f"parquet, {part} of 16 parts", "a.parquet", whole[: len(whole) * part // 16])
    for seed in range(40):
        chance = random.Random(seed)
        damaged = bytearray(whole)
        for _ in range(1 + seed % 5):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        yield Case(f"parquet, damage {seed}", "a.parquet", bytes(damaged))
    for name, end in {"none": b"", "negative": b"\xff" * 4, "huge": b"\xff\xff\xff\x7f", "zero": bytes(4)}.items():
        yield Case(f"parquet with a footer of length {name}", "a.parquet", whole[:-8] + end + b"PAR1")
    yield Case("parquet that is encrypted", "a.parquet", whole[:-4] + b"PARE")
    for name, content in {
        "its magic": b"PAR1",
        "its magic twice": b"PAR1PAR1",
        "nothing": b"",
        "text": b"text,label\n",
        "ORC": b"ORC",
        "Arrow": b"ARROW1\0\0" + bytes(99),
        "SQLite": b"SQLite format 3\0" + bytes(99),
        "NULs": bytes(10_000),
    }.items():
        yield Case(f"parquet of {name}", "a.parquet", content)


def footers() -> Iterator[Case]:
    """Files whose rows are whole and whose footer contradicts itself. Some of them end the process that reads them."""
    yield Case("parquet that ends the process", "abort.parquet", ABORTS.read_bytes())
    yield Case("parquet that ends the process, in gzip", "a.parquet.gz", gzip.compress(ABORTS.read_bytes()))
    whole = written({"text": TEXT, "label": LABEL, "other": odd_columns()["structs"]})
    footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    for seed in range(60):
        chance = random.Random(seed)
        damaged = bytearray(whole)
        place = chance.randrange(footer, len(whole) - 8)
        damaged[place] = damaged[place] ^ (1 << chance.randrange(8)) if seed % 2 else chance.randrange(256)
        yield Case(f"parquet, footer {seed}", "a.parquet", bytes(damaged))


def bombs() -> Iterator[Case]:
    """Small files that unpack to much, each of another kind."""
    good = {"text": TEXT, "label": LABEL}
    long = "x" * 20_000_000
    yield Case(
        "bomb: a dictionary",
        "a.parquet",
        partial(written, {"text": repeated(long, [0] * 1000), "label": ["late"] * 1000}),
    )
    yield Case(
        "bomb: a dictionary of texts of 300 kB",
        "a.parquet",
        partial(written, {"text": repeated("y" * 300_000, [0] * 90_000), "label": repeated("late", [0] * 90_000)}),
    )
    yield Case(
        "bomb: a dictionary as label", "a.parquet", partial(written, {**good, "label": repeated(long, [0] * 40)})
    )
    yield Case(
        "bomb: one row of it",
        "a.parquet",
        partial(written, {"text": repeated(long, [0, *range(1, 41)], *TEXT), "label": ["late", *LABEL]}),
        NUM_GOOD,
    )
    lists = pa.ListArray.from_arrays(pa.array([0, *[1000] * 40], pa.int32()), repeated(long, [0] * 1000))
    yield Case("bomb: a list of a dictionary", "a.parquet", partial(written, {**good, "other": lists}))
    for million in (8, 50):
        nulls = pa.ListArray.from_arrays(
            pa.array([0, *[million * 10**6] * 40], pa.int32()), pa.nulls(million * 10**6, pa.int8())
        )
        content = partial(written, {**good, "other": nulls})
        yield Case(f"bomb: a list of {million} million", "a.parquet", content, (NUM_GOOD - 1) * (million == 8))
    nothing = pa.nulls(50_000_000, pa.int8())
    yield Case(
        "bomb: 50 million nulls",
        "a.parquet",
        partial(written, {"text": nothing, "label": nothing}, row_group_size=10**8),
    )
    nothing = pa.nulls(40_000, pa.string())
    yield Case("bomb: 40,000 nulls", "a.parquet", partial(written, {"text": nothing, "label": nothing}))
    for column, texts in (("text", ["z" * 500_000] * 600), ("other", [["z" * 500_000] * 600] + [None] * 599)):
        others = {"text": "PLAIN", "label": "PLAIN", "other.list.element": "DELTA_BYTE_ARRAY"}
        encodings = {"text": "DELTA_BYTE_ARRAY", "label": "PLAIN"} if column == "text" else others
        table = {"text": ["late"] * 600, "label": ["late"] * 600, column: texts}
        content = partial(written, table, use_dictionary=False, column_encoding=encodings)
        yield Case(f"bomb: differences in {column}", "a.parquet", content)
    for megabytes in (60, 140):
        content = partial(written, {"text": ["x" * megabytes * 10**6], "label": ["late"]}, use_dictionary=False)
        yield Case(f"bomb: a text of {megabytes} MB", "a.parquet", content)
    wide = ["🚚" + "x" * 900_000] * 60
    yield Case(
        "bomb: texts that take four bytes a character",
        "a.parquet",
        partial(written, {"text": wide, "label": ["late"] * 60}),
    )
    many = {f"c{number}": repeated("x" * 900_000, [0] * 300) for number in range(40)}
    yield Case(
        "bomb: many columns of dictionaries",
        "a.parquet",
        partial(written, {"text": ["late"] * 300, "label": ["late"] * 300, **many}),
    )


def _say(role: Any, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


ANSWER = _say("assistant", "Yes.")
BAD_CHATS: dict[str, Any] = {
    "nothing": [],
    "null": None,
    "a text": "hello",
    "a number": 17,
    "an object": {"role": "user"},
    "texts": ["a", "b"],
    "numbers": [1, 2],
    "no answer": [_say("user", "Late?")],
    "answer alone": [ANSWER],
    "two answers": [ANSWER, ANSWER],
    "two systems": [_say("system", "a"), _say("system", "b"), _say("user", "c"), ANSWER],
    "no role": [{"content": "a"}],
    "no content": [{"role": "user"}, ANSWER],
    "null content": [_say("user", None), ANSWER],
    "a list as content": [_say("user", [{"type": "text", "text": "a"}]), ANSWER],
    "blank": [_say("user", " "), ANSWER],
    "an unknown role": [_say("robot", "a"), ANSWER],
    "a role of NULs": [_say("\0", "a"), ANSWER],
    "a surrogate": [_say("user", "\ud800"), ANSWER],
    "NUL": [_say("user", "a\0b"), ANSWER],
    "true": [True, False],
    "a long role": [_say("x" * 100_000, "a"), ANSWER],
    "a long content": [_say("user", "x" * 900_000), ANSWER],
    "many turns": [_say("user", "a"), ANSWER] * 9000 + [_say("user", "end")],
    "JSON of text": json.dumps("a"),
    "JSON cut off": json.dumps([_say("user", "a"), ANSWER])[:-3],
    "deep JSON": "[" * 50_000,
    "NaN": [_say("user", float("nan"))],
    "deep lists": json.loads("[" * 500 + "]" * 500),
    "an integer": "9" * 5000,
    "open objects": '[{"role":' * 20_000,
}


def chats() -> Iterator[Case]:
    good = [{"messages": [_say("user", row["text"]), ANSWER]} for row in ROWS]
    lines = "".join(json.dumps(row) + "\n" for row in good).encode()
    for name, messages in BAD_CHATS.items():
        line = json.dumps({"messages": messages}).encode() + b"\n"
        yield Case(f"chats, {name}", "a.jsonl", lines + line, NUM_GOOD)
    yield Case(
        "chats as texts of JSON",
        "a.csv",
        b"messages\n" + b"".join(b'"%b"\n' % json.dumps(row["messages"]).encode().replace(b'"', b'""') for row in good),
        NUM_GOOD,
    )
    yield Case("chats in parquet", "a.parquet", written(pa.Table.from_pylist(good)), NUM_GOOD)
    contents = [part for text in TEXT for part in (text, "yes")] + ["q", "x" * 5_000_000]
    values = pa.StructArray.from_arrays(
        [
            pa.array(["user", "assistant"] * 41),
            pa.array(contents).dictionary_encode(),
        ],
        ["role", "content"],
    )
    messages = pa.ListArray.from_arrays(pa.array(range(0, 83, 2), pa.int32()), values)
    yield Case("chats in parquet, one of 5 MB", "a.parquet", written({"messages": messages}), NUM_GOOD)


FAMILIES = (footers, types, shapes, damages, bombs, chats)
