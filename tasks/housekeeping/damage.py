"""Look for damage among what a lineage needs to serve and to learn on.

That is its versions, promotions and runs, and its datasets.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial

from deal_core.errors import DealError
from infra.promotions import PromotionLog
from infra.run_journal import RunJournal
from infra.store import keys
from infra.store.base import ObjectNotFoundError, ObjectStore
from infra.store.stored import read_folder
from infra.versions import Versions
from tasks.lineage.datasets import read_manifest
from tasks.lineage.frozen_rows import require_unaltered
from tasks.lineage.record import LineageRecord
from tasks.lineage.tombstones import forgotten_tests

MAX_SHOWN = 5
"""Damaged files of a lineage that are named; more are counted."""
_READERS = 16
"""Files that are read at the same time: most of the time is that of the store's answers."""


def find_damage(store: ObjectStore, lineage: str, record: LineageRecord | None) -> list[str]:
    """Return a message for each damaged file of the first ones, with what to do, and the number of the others.

    Every version, promotion, journal of a run and manifest of the lineage is parsed. The test rows that judge the
    champion, those in its `record`, are compared with their digests.
    """
    parsers: dict[str, Callable[[str, bytes], object]] = {
        keys.version_folder(lineage): Versions(store).parse,
        keys.promotion_folder(lineage): PromotionLog(store).parse,
        keys.run_folder(lineage): RunJournal(store).parse,
    }
    checks: list[Callable[[], object]] = [
        partial(parse, *file) for folder, parse in parsers.items() for file in read_folder(store, folder).items()
    ]

    def check_manifest(dataset_uri: str) -> None:
        with suppress(ObjectNotFoundError):  # it was forgotten since it was listed
            read_manifest(store, dataset_uri)

    for info in store.list(keys.DATASETS):
        file = keys.parse_dataset_file(info.key)
        if file is not None and (file.lineage, file.name) == (lineage, keys.MANIFEST_FILE):
            checks.append(partial(check_manifest, info.key.removesuffix(f"/{keys.MANIFEST_FILE}")))

    def check_tests(task: str, dataset_uri: str) -> None:
        if forgotten_tests(store, task, [dataset_uri]) is None:
            require_unaltered(store, dataset_uri)

    if record is not None:
        tests = {uri: task.schema.name for task in record.tasks for uri in task.grown().test_uris}
        tests |= {uri: piece.of for piece in record.slices for uri in piece.test_uris}
        checks += [partial(check_tests, name, uri) for uri, name in tests.items()]
    # a damaged manifest is one damage, also if the test rows need it
    with ThreadPoolExecutor(_READERS) as readers:
        damaged = list(dict.fromkeys(filter(None, readers.map(_failure, checks))))
    num_more = len(damaged) - MAX_SHOWN
    return [*damaged[:MAX_SHOWN], *([f"{num_more} more files of the lineage are damaged."] if num_more > 0 else [])]


def _failure(check: Callable[[], object]) -> str | None:
    try:
        check()
    except DealError as error:
        return str(error)
    return None
