"""Make texts safe to show: without secrets, without characters that control a terminal, and short.

Every DealError masks the secrets in its own text, so a library's message about an address does not leak a password.
"""

from __future__ import annotations

import os
import re
import reprlib
from collections.abc import Collection, Mapping
from typing import Any
from urllib.parse import quote, unquote, urlsplit

MAX_LISTED = 20
"""Most names in a message; further names are only counted."""
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters except tab and line feed, text direction marks, line separators, lone surrogates."""
MASK = "***"
MIN_CHARS = 8
"""A shorter secret is masked only in addresses: elsewhere it could match common words."""
_SECRET_NAME = re.compile(
    r"(?:SECRET|PASSWORD|PASSWD|TOKEN|API_KEY|ACCESS_KEY|ACCESS_KEY_ID|AUTH_STRING|WEBHOOK_URL)$",
    re.IGNORECASE,
)
"""Endings of the names of variables that hold a secret."""
_HUB_PASSWORD = re.compile(r"(hf://(?:datasets|models|spaces)/)(?:[^\s/@:]*:\S*|hf_[^\s/@]+)@")
"""A user with a password, or a token, before the owner of a repository. The @ of a revision is behind a slash."""
_SECRET_PARAMETER = re.compile(
    r"([?&][^=&\s]{0,64}?(?:token|secret|passw|pwd|key|sig|credential|auth)[^=&\s]{0,64}=)[^&\s'\"]+", re.IGNORECASE
)


def printable(text: str) -> str:
    r"""Escape characters that control a terminal or cannot be shown; line ends and tabs stay.

    Example:
        >>> printable("\x1b[31mred")
        '\\x1b[31mred'
    """
    return _UNSAFE.sub(_escaped, text)


def printable_json(text: str) -> str:
    """`printable` for JSON text, with JSON's own escapes, so the parsed value stays the same."""
    return _UNSAFE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def shorten(value: object, width: int = 80) -> str:
    """The value on one line, at most `width` characters long, with unprintable characters escaped."""
    if not isinstance(value, str):
        value = brief(value, width)
    line = value[: width + 1]
    if not line.isprintable():
        cut = line.encode("utf-8", "backslashreplace").decode("utf-8")
        line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in cut)
    return line if len(line) <= width else line[: width - 1] + "…"


def brief(value: object, width: int = 80) -> str:
    """`repr`, cut to about `width` characters for values of any size and depth."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = width
    short.maxlevel = 2
    try:
        return short.repr(value)
    except ValueError:  # an integer of more digits than Python writes
        return f"a number of {type(value).__name__} that is too large to show"


def listed(names: Collection[str], *, most: int = MAX_LISTED, width: int = 40) -> str:
    """Join names for a message: long names are cut, and names beyond the first `most` are counted.

    Example:
        >>> listed(["late", "lost", "broken"], most=2)
        'late, lost and 1 more'
    """
    first = [shorten(name, width) for _, name in zip(range(most), names, strict=False)]
    more = len(names) - len(first)
    return ", ".join(first) + (f" and {more} more" if more else "")


def _escaped(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def without_secrets(text: str) -> str:
    """The text with its secrets replaced by ***.

    Secrets are the user and password of an address (a password ends at the last @ before a space), address parameters
    such as token=, and the values of secret environment variables.

    Example:
        >>> without_secrets("Cannot open postgresql://me:secret@host/mlflow")
        'Cannot open postgresql://***@host/mlflow'
    """
    return without_known_secrets(_without_parameters(_without_passwords(text)))


def without_known_secrets(text: str, environment: Mapping[str, str] = os.environ) -> str:
    """The text with the values of the secret variables of `environment` replaced; the rest stays unchanged."""
    for secret in sorted(_known_secrets(environment), key=len, reverse=True):
        text = text.replace(secret, MASK)
    return text


def without_known_secrets_inside(value: Any) -> Any:
    """A JSON-able value with the known secrets in its texts replaced; see `without_known_secrets`."""
    if isinstance(value, str):
        return without_known_secrets(value)
    if isinstance(value, Mapping):
        return {key: without_known_secrets_inside(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_known_secrets_inside(item) for item in value]
    return value


def holds_secret(address: str) -> bool:
    """Whether an address contains a user, a password or a token."""
    return "://" in address and _without_parameters(_without_passwords(address)) != address


def _without_passwords(text: str) -> str:
    if "://" not in text or "@" not in text:
        return text
    text = _HUB_PASSWORD.sub(rf"\1{MASK}@", text)
    return "".join(_hide_password(word) for word in re.split(r"(\s+)", text))


def _hide_password(word: str) -> str:
    """Mask user and password of every address in a word."""
    kept, position, last_at = [], 0, word.rfind("@")
    while (start := word.find("://", position)) >= 0 and start < last_at:
        start += 3
        slash = word.find("/", start)
        end_of_host = len(word) if slash < 0 else slash
        # a password may contain / or @, so it ends at the last @; a user without a password ends before the host
        at = last_at if word.find(":", start, end_of_host) >= 0 else word.rfind("@", start, end_of_host)
        kept.append(word[position:start])
        position = start
        if at >= 0:
            kept.append(MASK)
            position = at
    return "".join(kept) + word[position:]


def _without_parameters(text: str) -> str:
    return _SECRET_PARAMETER.sub(rf"\1{MASK}", text) if "=" in text else text


def _known_secrets(environment: Mapping[str, str]) -> set[str]:
    """The secrets of an environment, each in plain and in URL-encoded form."""
    secrets: set[str] = set()
    for name, value in environment.items():
        if _SECRET_NAME.search(name):
            secrets |= {value, value.strip()}  # a file's last line break is not part of a token
            if name.upper().endswith("AUTH_STRING"):
                secrets.add(value.partition(":")[2])
            path = urlsplit(value).path.strip("/") if "://" in value else ""
            if len(path) >= 2 * MIN_CHARS:  # a webhook's token; a short path holds no token
                secrets.add(path)
        if "://" in value and "@" in value:
            user_and_password = value.partition("://")[2].rpartition("@")[0]
            secrets.add(user_and_password.partition(":")[2])
    spelled = {form for secret in secrets for form in (secret, unquote(secret), quote(secret, safe=""), quote(secret))}
    return {secret for secret in spelled if len(secret) >= MIN_CHARS}
