"""The reports of versions in the store, and the pages that are made from them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deal_core.errors import ConfigError, RegistryError
from deal_core.evaluation.report import EvaluationReport
from deal_core.monitoring.report import LiveLook
from deal_core.regular_file import complete_file
from infra.branches import Branches
from infra.report.page import render_page
from infra.report.run_report import EVALUATION_FILE, LIVE_FILE, REPORT_FILE, RunReport
from infra.store.base import ObjectNotFoundError, ObjectStore
from infra.store.keys import report_key
from infra.store.stored import reading_stored
from infra.versions import Version, Versions
from tasks.lineage.history import find_version


def write_report(store: ObjectStore, version: Version, file: str, values: Any) -> None:
    """Write a part of a version's report: EVALUATION_FILE, REPORT_FILE or LIVE_FILE."""
    text = json.dumps(values, ensure_ascii=False, indent=2, allow_nan=False)
    store.put_bytes(report_key(version.lineage, version.run_key, file), text.encode("utf-8", "replace"))


def read_report(store: ObjectStore, version: Version, file: str) -> Any:
    """Read a part of a version's report.

    Raises:
        ObjectNotFoundError: It has none: its run was not completed, or its arrival was forgotten.
        StoreError: The part is damaged.
    """
    key = report_key(version.lineage, version.run_key, file)
    with reading_stored(store, key, f"the report of version {version.version} of '{version.lineage}'", _REMEDY):
        return json.loads(store.get_bytes(key))


_REMEDY = "Everything but the report works without it."


def read_page(store: ObjectStore, versions: Sequence[Version], number: str) -> tuple[RunReport, str]:
    """Return the report of a version, of those of its lineage, and its page.

    The page has the last look at the version's live traffic.

    Raises:
        RegistryError: It has no report, or another release wrote it.
        StoreError: The report is damaged.
    """
    versions = [version for version in versions if int(version.version) <= int(number)]
    version = versions[-1]
    try:
        report = RunReport.from_json(read_report(store, version, REPORT_FILE))
        evaluation = EvaluationReport.from_json(read_report(store, version, EVALUATION_FILE))
    except ObjectNotFoundError:
        raise RegistryError(
            f"Version {version.version} of '{version.lineage}' has no report: its run was not completed, or its "
            "arrival was forgotten."
        ) from None
    has_live = store.exists(report_key(version.lineage, version.run_key, LIVE_FILE))
    live = LiveLook.from_json(read_report(store, version, LIVE_FILE)) if has_live else None
    branches = Branches(store).all(version.lineage)
    remade = next((known for known in branches if known.judgement and known.judgement.tip == version.version), None)
    return report, render_page(versions, report, evaluation, live, remade)


def save_report(store: ObjectStore, lineage: str, version: str, file: Path) -> Path:
    """Write the page of a version to a file, and return its whole path. A present file is replaced.

    Raises:
        RegistryError: There is no such version, or it has no report.
        ConfigError: The file cannot be written.
    """
    find_version(store, lineage, version)
    _, page = read_page(store, Versions(store).all(lineage), version)
    try:
        with complete_file(file) as part:
            part.write_text(page, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"The page cannot go to {file} ({error.strerror}); give another --out.") from None
    return file.resolve()
