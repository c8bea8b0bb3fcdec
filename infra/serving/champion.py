"""A lineage's champion in this process: one base model, and the adapter of the version that the promotion log names.

A thread watches the promotion log in the store. When the champion moves, the thread downloads the new version and swaps
the adapter. If this fails, or the store does not answer, the loaded version continues to serve.

An `Answerer` computes the answers in this process, or `Engines` lets vLLM servers compute them. This module and
`infra.serving.rollout` call their methods `reply`, `swap`, `add_candidate`, `drop_candidate`, `drain` and `stop`. The
web application knows only `Champion`, and asks it in its event loop.
"""

from __future__ import annotations

import gc
import logging
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from deal_core.errors import ConfigError, DealError, RegistryError, StoreError
from deal_core.evaluation.answerer import Answered, Answerer, GivenUpError, Sampling, load_answerer, load_base_of
from deal_core.evaluation.answering import InputRow, ServedVersion, read_served
from deal_core.safe_text import without_secrets
from infra.promotions import Move, PromotionLog
from infra.serving.engines import Engines
from infra.serving.prediction_log import LOG, PredictionLog
from infra.serving.rollout import Rollout, try_to_load, with_tasks
from infra.serving.tracing import note as note_on_trace
from infra.settings import HomeSettings, ServingSettings
from infra.store.base import ObjectStore
from infra.store.local import FileStore
from infra.versions import Version, Versions

POLL_SECONDS = 0.5
"""Pause between two reads of the promotion log, if the store is a folder."""
REMOTE_POLL_SECONDS = 2.0
"""The same for S3, where each read is two requests that cost money."""
MAX_POLL_SECONDS = 10.0
"""Longest pause while the store does not answer; the pause doubles from read to read."""

Say = Callable[[str], None]


class NoChampionError(RegistryError):
    """The lineage has no champion. The caller adds the reason."""

    code = "no-champion"


class ServingError(DealError):
    """The champion does not load."""

    code = "serving"


class Champion:
    """The model that answers for a lineage. `follow` loads the version that the promotion log names."""

    def __init__(
        self,
        store: ObjectStore,
        lineage: str,
        say: Say,
        log: PredictionLog | None = None,
        engines: Engines | None = None,
    ) -> None:
        self.lineage = lineage
        self.log = log
        self._store = store
        self._print = say
        self._engines = engines
        self._answerer: Answerer | Engines | None = None
        self._move: Move | None = None
        """The newest entry of the promotion log that was followed."""
        self._champion: Version | None = None
        """The champion after that entry; it may not be loaded yet. None: nothing serves."""
        self._candidate: Version | None = None
        """The version that is in rollout after that entry."""
        self._starting: str | None = None
        self._problem: str | None = None
        self._failed_at: float | None = None
        """When the champion did not load (monotonic seconds); None: it did, or it was not tried."""
        self.rollout: Rollout | None = None
        """The version that is tried next to the champion; None: no version was loaded yet."""

    async def __aenter__(self) -> Champion:
        """Look after the engines, if there are any, from before `begin` to the end."""
        if self._engines is not None:
            await self._engines.__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._engines is not None:
            await self._engines.__aexit__()

    def state(self) -> dict[str, Any]:
        """Return the body of GET /version."""
        return {
            "lineage": self.lineage,
            "version": self.version,
            "champion": self._champion.version if self._champion else None,
            "starting": self._starting,
            "problem": self._problem,
            **(self.rollout.state() if self.rollout else {}),
            **({"engines": self._engines.state()} if self._engines else {}),
        }

    @property
    def version(self) -> str | None:
        """Number of the version that answers; None: no version is loaded yet."""
        return None if self._answerer is None else self._answerer.version

    @property
    def served(self) -> ServedVersion:
        """The facts of the version that answers."""
        assert self._answerer is not None, "requests come after the champion was loaded"
        return self._answerer.served

    @property
    def streams(self) -> bool:
        """Whether answers come in pieces, and with the client's sampling."""
        return self._engines is not None

    def new_ids(self, number: int) -> list[str]:
        """Return ids for the answers to some rows; empty: there is no log."""
        return [] if self.log is None else [uuid.uuid4().hex for _ in range(number)]

    @property
    def canary(self) -> str | None:
        """Number of the version that answers a share of the requests; None: none does."""
        return None if self.rollout is None else self.rollout.canary

    async def ask(
        self,
        rows: Sequence[InputRow],
        key: str | None = None,
        version: str | None = None,
        sampling: Sampling | None = None,
        ids: Sequence[str] = (),
    ) -> Answered:
        """Answer rows, all with one version, and log the answers; errors are those of `Answerer.submit`.

        `sampling` is for engines, and `ids` are the rows' ids in the log, if the client has got them already.

        In a canary's rollout, requests with the same `key` go to the same version. `version` is the version that the
        request names, if it names one. If the champion moves meanwhile, the answer may be of another version: it is not
        logged then, and the caller must not return it.
        """
        assert self._answerer is not None and self.rollout is not None, "requests come after the champion was loaded"
        if self._champion is None and self._move is not None:  # the log has ended its term, and named no other
            raise GivenUpError(f"No version of '{self.lineage}' serves until its versions are made again; ask again.")
        begun, served = time.perf_counter(), self.served
        named = with_tasks(rows, served)
        note_on_trace(lineage=self.lineage, task=",".join(sorted({str(row.task) for row in named})))
        tried = await self.rollout.ask(named, served, key, version, sampling, ids)
        if isinstance(tried, Answered):
            note_on_trace(version=tried.version)
            return tried._replace(served=served)
        log_refusal = tried
        try:
            answered = await self._answerer.reply(rows, sampling=sampling)
        except (ConfigError, GivenUpError):  # what both versions refuse counts for neither
            raise
        except Exception:
            log_refusal()
            if self.log is not None and self.rollout.trial is not None:  # a rollout compares failures too
                self.log.note_failure(rows, served, self._answerer.version, time.perf_counter() - begun)
            raise
        log_refusal()
        note_on_trace(version=answered.version)
        if self.log is None or version not in (None, answered.version):
            return answered
        answered = self.log.note(rows, answered, time.perf_counter() - begun, ids=ids)
        self.rollout.copy(named, answered, key)
        return answered

    def begin(self) -> None:
        """Load the champion.

        Raises:
            NoChampionError: There is no champion.
            ServingError: The champion does not load.
            StoreError: The store does not answer, or an entry or a version is missing or damaged.
        """
        while True:
            self._read_log()
            if self._champion is None:
                raise NoChampionError(f"Lineage '{self.lineage}' has no champion.")
            self._try(self._champion)
            if self._answerer is not None:
                break
            if self._engines is None or not self._engines.is_away:
                raise ServingError(self._problem or "")
            time.sleep(self._engines.retry_seconds)  # an engine takes minutes to start
        self.rollout = Rollout(self._store, self._answerer, self.log, self._say)

    def follow(self, stopped: threading.Event) -> None:
        """Load each new champion until `stopped` is set. A request to the store that hangs is not interrupted."""
        usual = pause = POLL_SECONDS if isinstance(self._store, FileStore) else REMOTE_POLL_SECONDS
        while not stopped.wait(pause):
            try:
                self._read_log()
                self._keep_up()
            except Exception as error:  # the thread must not end
                if not isinstance(error, DealError):
                    LOG.exception("Following the promotion log failed")
                problem = str(error) if isinstance(error, DealError) else f"{type(error).__name__}: {error}."
                self._note(f"{problem} The loaded version continues to serve.")
                pause = min(2 * pause, MAX_POLL_SECONDS)
            else:
                pause = usual

    def drain(self) -> None:
        """Begin to end: give up requests that are still being prepared; answer those that wait for the model."""
        if self._answerer is not None:
            self._answerer.drain()

    def stop(self) -> None:
        """Stop the running computations."""
        for answerer in (self._answerer, self._engines):
            if answerer is not None:
                answerer.stop()
        if self.rollout is not None:
            self.rollout.stop()

    def _read_log(self) -> None:
        """Read the newest entry of the promotion log, and the versions only if the entry is new."""
        move = PromotionLog(self._store).last(self.lineage)
        if move == self._move:
            return
        if move is None:  # entries are never removed, but a folder may be unmounted
            place = without_secrets(self._store.uri)
            raise StoreError(f"{place} has no promotion log of '{self.lineage}' any more; check the store.")
        named = {alias: version for version in Versions(self._store).all(self.lineage) for alias in version.aliases}
        self._champion, self._candidate = named.get("champion"), named.get("rollout")
        self._move, self._failed_at = move, None

    def _keep_up(self) -> None:
        """Load the champion if it does not answer yet, and then what is tried next to it."""
        assert self._answerer is not None and self.rollout is not None, "`begin` has loaded a champion"
        if self._champion is None:
            self._note("No version is champion: no request is answered until one is.")
            return
        if self._champion.version == self.version:
            self._problem = None
        elif self._failed_at is None or time.monotonic() - self._failed_at > self._answerer.retry_seconds:
            self._try(self._champion)
        self.rollout.keep_up(self._candidate, self.version)

    def _try(self, version: Version) -> None:
        """Load a version; if this fails, report the reason."""
        started, self._starting = time.monotonic(), version.version
        problem = try_to_load(self._store, version, lambda folder: self._load(folder, version.version))
        self._starting = None
        if problem is None:
            self._failed_at = self._problem = None
            self._say(f"Version {version.version} serves (ready in {time.monotonic() - started:.1f} s).")
        else:
            self._failed_at = time.monotonic()
            serving = f"; version {self.version} continues to serve" if self.version else ""
            self._note(f"Version {version.version} does not load: {problem.rstrip('.')}{serving}.")

    def _load(self, folder: Path, number: str) -> None:
        """Let the version in a folder answer. Only a version on another base model loads a model."""
        if self._engines is not None:
            self._engines.swap(folder, number)
            self._answerer = self._engines
            return
        settings, cache = ServingSettings(), HomeSettings().cache_dir
        base_source, precision = settings.base_model, settings.serving_precision
        if not isinstance(self._answerer, Answerer):
            self._answerer = load_answerer(folder, cache, base_source, precision=precision, version=number)
        elif (served := read_served(folder)).held_base == self._answerer.held_base:
            self._answerer.swap(folder, number)
        else:
            self._answerer.swap(folder, number, load_base_of(served, cache, base_source, precision=precision))
            gc.collect()
            torch.cuda.empty_cache()

    def _say(self, text: str, level: int = logging.INFO) -> None:
        LOG.log(level, text)
        with suppress(OSError):  # the reader of the command's output has ended
            self._print(text)

    def _note(self, problem: str) -> None:
        if problem != self._problem:
            self._say(problem, logging.WARNING)
        self._problem = problem
