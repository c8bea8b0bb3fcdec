"""Read YAML strictly: no key twice, no tag, anchor or alias, YAML 1.2 numbers, and bounds on size and depth."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from deal_core.errors import ConfigError
from deal_core.regular_file import read_start
from deal_core.safe_text import printable, shorten

MAX_BYTES = 2**18
"""Largest file. Thousands of labels need less."""
MAX_DEPTH = 32
_TOO_DEEP = f"is nested more than {MAX_DEPTH} deep, too deep for settings; check the file."
MAX_DIGITS = 400
"""Most digits of a whole number."""

_PREFIX = "tag:yaml.org,2002:"
_TEXT = _PREFIX + "str"
_WHOLE = re.compile(r"^[-+]?(?:0|[1-9][0-9_]*)$")
_FRACTION = re.compile(
    r"^(?:[-+]?(?:0|[1-9][0-9_]*)(?:\.[0-9]*(?:[eE][-+]?[0-9]+)?|[eE][-+]?[0-9]+)"
    r"|[-+]?\.[0-9]+(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)
_NO_TEXT = re.compile("[\x00\ud800-\udfff]")


class _RefusedError(Exception):
    """Valid YAML that this project does not accept."""


class _Loader(yaml.SafeLoader):
    """Reads numbers as in YAML 1.2: 1e-3 is a number; 010, 0x1F, 1:30 and 2026-11-01 are texts."""

    def fetch_tag(self) -> None:
        """Refuse a tag."""
        raise _RefusedError(f"has a tag in line {self.line + 1}; leave tags out.")

    def fetch_anchor(self) -> None:
        """Refuse an anchor: aliases repeat values, so a small file could hold any number of them."""
        raise _RefusedError(f"has an anchor (&) in line {self.line + 1}; write the value out wherever it is needed.")

    def fetch_alias(self) -> None:
        """Refuse an alias."""
        raise _RefusedError(f"has an alias (*) in line {self.line + 1}; put a text that begins with * in quotes.")


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.removeprefix(_PREFIX) in ("bool", "null")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_PREFIX + "int", _WHOLE, list("-+0123456789"))
_Loader.add_implicit_resolver(_PREFIX + "float", _FRACTION, list("-+.0123456789"))


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file that must be a mapping.

    Raises:
        ConfigError: the file is missing, is not a regular file, or does not hold a mapping.
    """
    try:
        content = read_start(path, MAX_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError(f"There is no file {path}; check the path.") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}.") from None
    except ValueError as error:
        raise ConfigError(f"{str(path)!r} is not the path of a file: {error}.") from None
    return yaml_mapping(content, str(path))


def yaml_mapping(content: bytes, origin: str) -> dict[str, Any]:
    """Parse the mapping that a YAML file holds; an empty file gives an empty mapping.

    Args:
        content: the file's bytes. For a file larger than MAX_BYTES, the first MAX_BYTES + 1 are enough.
        origin: the file, for messages.

    Raises:
        ConfigError: it is not a mapping, has a key twice, or breaks a bound; the message begins with `origin`.
    """
    if len(content) > MAX_BYTES:
        raise ConfigError(f"{origin} is larger than {MAX_BYTES // 2**10} KiB, too large for settings; check the file.")
    try:
        loader = _Loader(content.decode("utf-8"))
        root = loader.get_single_node()
        if root is None:
            return {}
        _check(root)
        loaded = loader.construct_document(root)
    except RecursionError:
        raise ConfigError(f"{origin} {_TOO_DEEP}") from None
    except (ValueError, OverflowError, yaml.YAMLError) as error:
        raise ConfigError(f"{origin} is not valid YAML: {printable(' '.join(str(error).split()))}.") from None
    except _RefusedError as error:
        raise ConfigError(f"{origin} {error}") from None
    if loaded is not None and not isinstance(loaded, dict):
        raise ConfigError(f"{origin} holds {type(loaded).__name__}, not a mapping of keys; see examples/ for a spec.")
    return loaded or {}


def _check(root: yaml.Node) -> None:
    """Check all nodes before any value is constructed."""
    waiting = [(root, 1)]
    while waiting:
        node, depth = waiting.pop()
        if depth > MAX_DEPTH:
            raise _RefusedError(_TOO_DEEP)
        if isinstance(node, yaml.MappingNode):
            _check_keys(node)
            waiting += [(child, depth + 1) for pair in node.value for child in pair]
        elif isinstance(node, yaml.SequenceNode):
            waiting += [(child, depth + 1) for child in node.value]
        elif _NO_TEXT.search(node.value):
            raise _RefusedError(f"holds a NUL or half a surrogate pair{_place(node)}; write a text there.")
        elif node.tag == _PREFIX + "int" and len(node.value) > MAX_DIGITS:
            raise _RefusedError(f"holds a number of {len(node.value)} digits{_place(node)}; write a smaller one.")


def _check_keys(node: yaml.MappingNode) -> None:
    seen: set[str] = set()
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode) or key.tag != _TEXT:
            shown = f" {shorten(key.value)}" if isinstance(key, yaml.ScalarNode) else ""
            raise _RefusedError(f"has a key{shown}{_place(key)} that is not a text; write it in quotes.")
        if key.value in seen:
            raise _RefusedError(f"has the key {shorten(key.value)!r} twice, again{_place(key)}; keep one of them.")
        seen.add(key.value)


def _place(node: yaml.Node) -> str:
    return f" in line {node.start_mark.line + 1}"
