"""Unpacked sizes of a Parquet file's pages, read from the page headers without unpacking the pages.

The footer's sizes can be wrong, and they count a dictionary once even if its values are repeated often. Readers follow
the page headers.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

_HEADER_BYTES = 2**13
"""Bytes read first for a page's header. A header with statistics of long texts is longer."""
_MAX_HEADER_BYTES = 2**24
_DATA, _DICTIONARY, _DATA_V2 = 0, 2, 3
_DELTA_BYTE_ARRAY = 7
_TEXT = "BYTE_ARRAY"
_CODECS = {"LZ4": "lz4_raw"}
"""Arrow's name of a codec, if it is not the footer's name in lower case."""
MANY = 2**63


class PageError(Exception):
    """A page's header cannot be read."""


class Page(NamedTuple):
    """One page of a column chunk."""

    place: int
    """Place of the page's content in the file."""
    packed_bytes: int
    unpacked_bytes: int
    num_values: int
    """Number of values, including nulls and empty lists; 0 in a dictionary."""
    is_dictionary: bool
    repeats: bool
    """Whether the encoding can repeat the beginning of earlier values."""


class ChunkPages(NamedTuple):
    """Totals and extremes of the pages of a column chunk."""

    num_values: int
    """Sum of `Page.num_values` over all pages."""
    unpacked_bytes: int
    """Sum over all pages."""
    largest_page: int
    """Bytes of the largest unpacked page."""
    fewest_values: int
    """Fewest values of a data page, except the last data page; MANY if there is no such page."""
    longest_repeated: int
    """Bytes of the longest text that a few bytes of the file may repeat; 0 if there is none."""
    has_delta_texts: bool
    """Whether texts are written as differences from earlier texts."""


def look_at_chunk(file: BinaryIO, chunk: pq.ColumnChunkMetaData, max_page_bytes: int) -> ChunkPages:
    """Read the headers of a column chunk's pages. A dictionary above `max_page_bytes` is not unpacked to be measured.

    Raises:
        PageError: A header cannot be read.
    """
    num_values = unpacked = largest = longest = 0
    fewest = last_values = MANY
    has_delta_texts = False
    for page in _pages(file, chunk):
        num_values += page.num_values
        unpacked += page.unpacked_bytes
        largest = max(largest, page.unpacked_bytes)
        if not page.is_dictionary:
            fewest, last_values = min(fewest, last_values), page.num_values
        if chunk.physical_type != _TEXT:
            continue
        if page.is_dictionary:
            longest = max(longest, _longest_text(file, page, chunk.compression, max_page_bytes))
        elif page.repeats:
            has_delta_texts = True
            longest = max(longest, page.unpacked_bytes)
    return ChunkPages(num_values, unpacked, largest, fewest, longest, has_delta_texts)


def _pages(file: BinaryIO, chunk: pq.ColumnChunkMetaData) -> Iterator[Page]:
    place = chunk.data_page_offset
    if chunk.dictionary_page_offset and 0 < chunk.dictionary_page_offset < place:
        place = chunk.dictionary_page_offset
    end, num_values = place + chunk.total_compressed_size, 0
    while place < end and num_values < chunk.num_values:
        page = _page_at(file, place)
        yield page
        place = page.place + page.packed_bytes
        num_values += page.num_values


def _page_at(file: BinaryIO, place: int) -> Page:
    num_bytes = _HEADER_BYTES
    while True:
        file.seek(place)
        content = file.read(num_bytes)
        stream = io.BytesIO(content)
        try:
            header = _read_struct(stream)
            return _page(header, place + stream.tell())
        except EOFError:
            if len(content) < num_bytes or num_bytes >= _MAX_HEADER_BYTES:
                raise PageError(f"the header of the page at byte {place} has no end") from None
            num_bytes *= 8
        except (KeyError, TypeError, RecursionError):
            raise PageError(f"there is no header of a page at byte {place}") from None


def _page(header: dict[int, Any], place: int) -> Page:
    """The page that a header describes; the field numbers are those of parquet.thrift."""
    kind, unpacked, packed = header[1], header[2], header[3]
    if packed < 0 or unpacked < 0:
        raise KeyError("a page of negative size")
    details = header[{_DATA: 5, _DATA_V2: 8}[kind]] if kind in (_DATA, _DATA_V2) else {}
    encoding = details[{_DATA: 2, _DATA_V2: 4}[kind]] if details else None
    return Page(
        place=place,
        packed_bytes=packed,
        unpacked_bytes=unpacked,
        num_values=max(0, details[1]) if details else 0,
        is_dictionary=kind == _DICTIONARY,
        repeats=encoding == _DELTA_BYTE_ARRAY,
    )


def _longest_text(file: BinaryIO, page: Page, codec: str, max_page_bytes: int) -> int:
    """Bytes of a dictionary's longest text; the size of the whole dictionary if it cannot be unpacked."""
    if page.unpacked_bytes > max_page_bytes:
        return page.unpacked_bytes
    file.seek(page.place)
    content = memoryview(file.read(page.packed_bytes))
    if codec != "UNCOMPRESSED":
        try:
            content = memoryview(pa.Codec(_CODECS.get(codec, codec.lower())).decompress(content, page.unpacked_bytes))
        except (ValueError, OSError, NotImplementedError):
            return page.unpacked_bytes
    longest = place = 0
    while place < len(content):
        length = int.from_bytes(content[place : place + 4], "little")
        if length > longest:
            longest = length
        place += 4 + length
    return min(longest, page.unpacked_bytes)


# --- The part of Thrift's compact protocol that a header needs. No installed library reads it.


def _read_struct(stream: io.BytesIO, depth: int = 0) -> dict[int, Any]:
    """The fields of a struct by number."""
    if depth > 16:
        raise RecursionError
    fields: dict[int, Any] = {}
    number = 0
    while (first := _read_byte(stream)) != 0:
        number = number + (first >> 4) if first >> 4 else _read_signed(stream)
        fields[number] = _read_value(stream, first & 15, depth)
    return fields


def _read_value(stream: io.BytesIO, kind: int, depth: int) -> Any:
    if kind in (1, 2):  # true, false
        return kind == 1
    if kind == 3:
        return _read_byte(stream)
    if kind in (4, 5, 6):  # whole numbers of 16, 32 and 64 bits
        return _read_signed(stream)
    if kind == 7:
        return _read_bytes(stream, 8)
    if kind == 8:
        return _read_bytes(stream, _read_unsigned(stream))
    if kind == 12:
        return _read_struct(stream, depth + 1)
    raise TypeError(f"a header has no field of kind {kind}")


def _read_byte(stream: io.BytesIO) -> int:
    return _read_bytes(stream, 1)[0]


def _read_bytes(stream: io.BytesIO, number: int) -> bytes:
    content = stream.read(number)
    if len(content) < number:
        raise EOFError
    return content


def _read_unsigned(stream: io.BytesIO) -> int:
    value = shift = 0
    while True:
        byte = _read_byte(stream)
        value |= (byte & 127) << shift
        if byte < 128:
            return value
        shift += 7
        if shift > 63:
            raise TypeError("a number has more than 64 bits")


def _read_signed(stream: io.BytesIO) -> int:
    value = _read_unsigned(stream)
    return (value >> 1) ^ -(value & 1)
