"""A lineage's champion in this process: one base model, and the adapter of the version with the alias champion.

A thread watches the alias. When the alias moves, the thread downloads the new version and swaps the adapter. If this
fails, or MLflow does not answer, the loaded version continues to serve.
"""

from __future__ import annotations

import gc
import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from mlflow.models import Model
from mlflow.pyfunc import PyFuncModel

from deal_core.errors import ConfigError, DealError, RegistryError, StoreError
from deal_core.evaluation.answerer import Answered, Answerer, GivenUpError, load_answerer, load_base_of
from deal_core.evaluation.answering import InputRow, ServedVersion, read_served
from infra.served_model import ServedModel, ServingError, require_own_loader
from infra.serving.prediction_log import LOG, PredictionLog
from infra.serving.rollout import Rollout, with_tasks
from infra.settings import HomeSettings, ServingSettings
from infra.store.base import temporary_folder
from infra.tracking.facts import VersionInfo, require_through_gate
from infra.tracking.registry import open_registry

POLL_SECONDS = 0.5
"""Pause between two reads of the alias."""
MAX_POLL_SECONDS = 10.0
"""Longest pause while MLflow does not answer; the pause doubles from read to read."""
PAUSE_SECONDS = 60.0
"""Pause before a version that did not load is tried again."""

Say = Callable[[str], None]


class NoChampionError(RegistryError):
    """The lineage has no champion. The caller adds the reason."""


class Champion:
    """The model that answers for a lineage. `follow` loads the version that the alias names."""

    def __init__(
        self, lineage: str, say: Say, log: PredictionLog | None = None, settle: Callable[[], object] | None = None
    ) -> None:
        self.lineage = lineage
        self.log = log
        self._settle = settle
        """Called before a version is loaded that the alias newly names; it may set the alias back."""
        self._print = say
        self._answerer: Answerer | None = None
        self._meta: Model | None = None
        self._champion: str | None = None
        self._starting: str | None = None
        self._problem: str | None = None
        self._failed: tuple[str, float] | None = None
        """The version that did not load, and the time of the attempt."""
        self.rollout: Rollout | None = None
        """The version that is tried next to the champion; None: no version was loaded yet."""

    def state(self) -> dict[str, Any]:
        """Return the body of GET /version."""
        return {
            "lineage": self.lineage,
            "version": self.version,
            "champion": self._champion,
            "starting": self._starting,
            "problem": self._problem,
            **(self.rollout.state() if self.rollout else {}),
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
    def canary(self) -> str | None:
        """Number of the version that answers a share of the requests; None: none does."""
        return None if self.rollout is None else self.rollout.canary

    def ask(
        self,
        rows: Sequence[InputRow],
        is_given_up: Callable[[], bool],
        key: str | None = None,
        version: str | None = None,
    ) -> Answered:
        """Answer rows, all with one version, and log the answers; errors are those of `Answerer.ask`.

        In a canary's rollout, requests with the same `key` go to the same version. `version` is the version that the
        request names, if it names one. The champion may move while it computes: an answer of another version than the
        named one is not logged, and the caller must not return it.
        """
        assert self._answerer is not None and self.rollout is not None, "requests come after the champion was loaded"
        begun, served = time.perf_counter(), self.served
        named = with_tasks(rows, served)
        tried = self.rollout.ask(named, served, is_given_up, key, version)
        if isinstance(tried, Answered):
            return tried._replace(served=served)
        try:
            answered = self._answerer.ask(rows, is_given_up)
        except (ConfigError, GivenUpError):  # what both versions refuse counts for neither
            raise
        except Exception:
            self.rollout.count(tried)
            if self.log is not None and self.rollout.trial is not None:  # a rollout compares failures too
                self.log.note_failure(rows, served, self._answerer.version, time.perf_counter() - begun)
            raise
        self.rollout.count(tried)
        if self.log is None or version not in (None, answered.version):
            return answered
        answered = self.log.note(rows, answered, time.perf_counter() - begun)
        self.rollout.copy(named, answered, key)
        return answered

    def model(self, is_given_up: Callable[[], bool], key: str | None = None) -> PyFuncModel:
        """Return the model for one request. Like MLflow's servers, it checks tables against the model's signature.

        The arguments are those of `ask`.
        """
        assert self._meta is not None, "requests come after the champion was loaded"
        model = ServedModel(lambda rows: self.ask(rows, is_given_up, key))
        return PyFuncModel(model_meta=self._meta, model_impl=model)

    def begin(self) -> None:
        """Load the champion.

        Raises:
            NoChampionError: There is no champion.
            RegistryError: The champion may not serve, or the registry does not answer.
            ServingError: The champion does not load.
        """
        self._registry = open_registry()
        is_settled = True
        try:
            self._let_settle(self._registry.champion(self.lineage))
        except StoreError:  # a server can start while the store is away
            is_settled = False
        champion = self._registry.champion(self.lineage)
        if champion is None:
            raise NoChampionError(f"Lineage '{self.lineage}' has no champion.")
        require_through_gate(champion)
        self._champion = champion.version if is_settled else None  # else `follow` settles it
        self._try(champion.version)
        if self._answerer is None:
            raise ServingError(self._problem or "")
        self.rollout = Rollout(self._registry, self.lineage, self._answerer, self.log, self._say)

    def follow(self, stopped: threading.Event) -> None:
        """Load each new champion until `stopped` is set. A call to MLflow that hangs is not interrupted."""
        pause = POLL_SECONDS
        while not stopped.wait(pause):
            try:
                self._keep_up_with(self._let_settle(self._registry.champion(self.lineage)))
                if self.rollout is not None:
                    self.rollout.keep_up(self._registry.with_alias(self.lineage, "rollout"), self.version)
            except Exception as error:  # the thread must not end
                if not isinstance(error, RegistryError):
                    LOG.exception("Following the alias failed")
                problem = str(error) if isinstance(error, RegistryError) else f"{type(error).__name__}: {error}."
                self._note(f"{problem} The loaded version continues to serve.")
                pause = min(2 * pause, MAX_POLL_SECONDS)
            else:
                pause = POLL_SECONDS

    def drain(self) -> None:
        """Begin to end: give up requests that are still being prepared; answer those that wait for the model."""
        if self._answerer is not None:
            self._answerer.drain()

    def stop(self) -> None:
        """Stop the running computations."""
        if self._answerer is not None:
            self._answerer.stop()
        if self.rollout is not None:
            self.rollout.stop()

    def _let_settle(self, champion: VersionInfo | None) -> VersionInfo | None:
        """Return the champion, or, if the alias has moved, the champion after `settle`."""
        if self._settle is None or champion is None or champion.version == self._champion:
            return champion
        self._settle()
        return self._registry.champion(self.lineage)

    def _keep_up_with(self, champion: VersionInfo | None) -> None:
        if champion is None:
            self._note(f"{self.lineage} has no champion any more; the loaded version continues to serve.")
            return
        try:
            require_through_gate(champion)
        except RegistryError as error:
            self._note(f"{error} The loaded version continues to serve.")
            return
        if champion.version != self._champion:
            self._failed = None
        self._champion = champion.version
        if champion.version == self.version:
            self._problem = None
        elif self._failed is None or time.monotonic() - self._failed[1] > PAUSE_SECONDS:
            self._try(champion.version)

    def _try(self, version: str) -> None:
        """Load a version; if this fails, report the reason."""
        started, self._starting = time.monotonic(), version
        try:
            with temporary_folder() as temporary:
                self._load(version, temporary / "version")
        except Exception as error:  # a full disk, damaged files, too little memory: the loaded version must serve on
            kind = ""
            if not isinstance(error, DealError | OSError):
                kind = f"{type(error).__name__}: "
                LOG.exception("Version %s does not load", version)
            self._failed = version, time.monotonic()
            serving = f"; version {self.version} continues to serve" if self.version else ""
            self._note(f"Version {version} does not load: {kind}{' '.join(str(error).split()).rstrip('.')}{serving}.")
        else:
            self._failed = self._problem = None
            self._say(f"Version {version} serves (ready in {time.monotonic() - started:.1f} s).")
        finally:
            self._starting = None

    def _load(self, version: str, folder: Path) -> None:
        self._registry.download(self.lineage, version, folder)
        meta = require_own_loader(folder)
        settings, cache = ServingSettings(), HomeSettings().cache_dir
        if self._answerer is None:
            self._answerer = load_answerer(
                folder, cache, settings.base_model, precision=settings.serving_precision, version=version
            )
        elif (served := read_served(folder)).base_sha256 == self._answerer.base_sha256:
            self._answerer.swap(folder, version)
        else:
            base = load_base_of(served, cache, settings.base_model, precision=settings.serving_precision)
            self._answerer.swap(folder, version, base)
            gc.collect()
            torch.cuda.empty_cache()
        self._meta = meta

    def _say(self, text: str, level: int = logging.INFO) -> None:
        LOG.log(level, text)
        with suppress(OSError):  # the reader of the command's output has ended
            self._print(text)

    def _note(self, problem: str) -> None:
        if problem != self._problem:
            self._say(problem, logging.WARNING)
        self._problem = problem
