"""YAML: every key once, numbers that look like numbers, and a bound on size and depth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from deal_core.errors import ConfigError
from deal_core.yaml_file import MAX_BYTES, read_yaml, yaml_mapping


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5e-4", 5e-4),
        ("1e-3", 1e-3),
        ("1E5", 1e5),
        ("1.", 1.0),
        (".5", 0.5),
        ("-3", -3),
        ("+3", 3),
        ("0", 0),
        ("1_000", 1000),
        ("true", True),
        ("yes", True),
        ("~", None),
        ("null", None),
        ("010", "010"),
        ("0x1F", "0x1F"),
        ("1:30", "1:30"),
        ("190:20:30.15", "190:20:30.15"),
        ("2026-11-01", "2026-11-01"),
        ("'3'", "3"),
        ("=", "="),
        ("<<", "<<"),
        ("00.5", "00.5"),
    ],
)
def test_a_value_is_what_it_looks_like(text: str, value: Any) -> None:
    found = yaml_mapping(f"a: {text}".encode(), "f")["a"]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3", "has the key 'a' twice, again in line 3; keep one of them"),
        ("a: [{b: 1, b: 1}]", "has the key 'b' twice"),
        ('a: 1\n"a": 2', "has the key 'a' twice"),
        ("1: x", "has a key 1 in line 1 that is not a text; write it in quotes"),
        ("yes: x", "has a key yes in line 1 that is not a text"),
        ("? [a, b]\n: x", "has a key in line 1 that is not a text"),
        ("a: !!python/object/apply:os.system [x]", "has a tag in line 1"),
        ("a: !!int abc", "has a tag in line 1"),
        ("!!omap\n- a: 1", "has a tag in line 1"),
        ('a: "\\0"', "holds a NUL or half a surrogate pair in line 1"),
        ('a: "\\ud800"', "holds a NUL or half a surrogate pair"),
        ('a: "\\UFFFFFFFF"', "is not valid YAML"),
        ("a: " + "9" * 5000, "holds a number of 5000 digits in line 1"),
        ("a: " + "[" * 100_000, "is nested more than 32 deep"),
        ("- " * 100_000, "is nested more than 32 deep"),
        ("a: 1\nb: &a [*a]", "has an anchor (&) in line 2; write the value out"),
        ("a: *b", "has an alias (*) in line 1; put a text that begins with * in quotes"),
        ("a: " + "x" * MAX_BYTES, "is larger than 256 KiB"),
        ("a: \x1b[31m", "is not valid YAML"),
        ("a: 1\n---\na: 2", "is not valid YAML"),
    ],
)
def test_what_has_no_one_meaning_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        yaml_mapping(text.encode(), "f.yaml")
    assert str(caught.value).startswith(f"f.yaml {message}")
    assert len(str(caught.value)) < 500 and "\x1b" not in str(caught.value)


def test_a_large_file_is_not_read_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "large.yaml"
    with path.open("wb") as file:
        file.truncate(2**40)  # sparse: it takes no disk space, but is larger than memory
    with pytest.raises(ConfigError, match="is larger than 256 KiB"):
        read_yaml(path)


def test_a_name_that_can_be_no_file_is_said_to_be_none() -> None:
    with pytest.raises(ConfigError, match="not the path of a file"):
        read_yaml(Path("a\0b"))
    with pytest.raises(ConfigError, match="cannot be read"):
        read_yaml(Path("x" * 5000))
