"""Reports that runs left in the artifact folder of this machine: they outlive the database that knew the runs."""

from __future__ import annotations

import json
from pathlib import Path
from urllib.parse import unquote, urlsplit

from deal_core.errors import RegistryError
from infra.report.run_report import REPORT_FILE, RunReport
from infra.settings import TrackingSettings


def kept_reports(settings: TrackingSettings, lineage: str) -> tuple[RunReport, ...]:
    """The readable reports of a lineage; none where artifacts do not lie in a folder here."""
    parts = urlsplit(settings.artifact_uri)
    if parts.scheme != "file":
        return ()
    found = []
    for path in sorted((Path(unquote(parts.path)) / lineage).glob(f"*/artifacts/{REPORT_FILE}")):
        try:
            report = RunReport.from_json(json.loads(path.read_text(encoding="utf-8")))
        except (RegistryError, ValueError, OSError):
            continue
        if report.lineage == lineage:
            found.append(report)
    return tuple(found)
