"""Files of a repository of the Hugging Face Hub, from its cache or over the network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from deal_core.errors import ConfigError


def fetch_snapshot(
    repository: str,
    kind: Literal["model", "dataset"],
    patterns: Sequence[str],
    *,
    revision: str | None = None,
    ignored: Sequence[str] = (),
) -> Path:
    """Return the folder that holds a repository's files.

    Args:
        repository: OWNER/NAME, or NAME.
        kind: Of the repository.
        patterns: Which files.
        revision: Branch, tag or commit; None: its main branch.
        ignored: Which of these not.

    Raises:
        ConfigError: The Hub cannot be reached, or has no such repository; one line says which.
    """
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            repository, repo_type=kind, revision=revision, allow_patterns=list(patterns), ignore_patterns=list(ignored)
        )
    except (OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(f"The {kind} {repository!r} could not be fetched from the Hub ({reason}).") from error
    return Path(folder)
