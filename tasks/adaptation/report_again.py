"""Report: the page of a version, written again from the registry and its MLflow run alone."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from deal_core.errors import ConfigError
from infra.report.formatting import verdict_of
from infra.store.base import complete_file
from infra.tracking.registry import open_registry
from tasks.adaptation.report import read_page
from tasks.lineage.history import find_version


class WrittenReport(BaseModel):
    """A page and what it says first."""

    model_config = ConfigDict(frozen=True)

    lineage: str
    version: str
    verdict: str
    summary: str
    """The verdict in one sentence."""
    reasons: tuple[str, ...]
    file: Path


def save_report(lineage: str, version: str, file: Path) -> WrittenReport:
    """Write the page of a version.

    Args:
        lineage: whose version.
        version: its number.
        file: where the page goes; what is there is replaced.

    Raises:
        RegistryError: there is no such version, or its run keeps nothing to write the page from.
        ConfigError: the file cannot be written.
    """
    report, page = read_page(find_version(open_registry(), lineage, version).tracking_id)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with complete_file(file) as part:
            part.write_text(page, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"The page cannot go to {file} ({error.strerror}); give another --out.") from None
    return WrittenReport(
        lineage=lineage, version=version, verdict=report.verdict, summary=verdict_of(report), reasons=report.reasons,
        file=file.resolve(),
    )  # fmt: skip
