"""Which artifacts of an MLflow run hold texts of rows, or are made of them."""

from __future__ import annotations

from collections.abc import Iterable

RUN_ARTIFACTS = ("report.json", "report.html")
"""At the top of a run: examples gained and lost, and rows in quarantine. Whoever logs rows elsewhere adds the name, or
that of the folder."""


def artifacts_with_rows(paths: Iterable[str]) -> tuple[str, ...]:
    """Those of a run's artifacts that must go when rows that it saw are forgotten.

    Example:
        >>> artifacts_with_rows(["evaluation.json", "report.html", "figures/loss.png"])
        ('report.html',)
    """
    return tuple(path for path in paths if path.split("/")[0] in RUN_ARTIFACTS)
