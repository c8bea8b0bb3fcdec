"""A lineage's champion in this process: one base model, and the adapter of whichever version the alias names.

A thread looks at the alias. When the alias moves, the thread fetches the new version's files, reads them, and swaps the
adapter. What serves goes on where that fails, and while MLflow is away.
"""

from __future__ import annotations

import gc
import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from mlflow.models import Model
from mlflow.pyfunc import FLAVOR_NAME, PyFuncModel

from deal_core.errors import DealError, RegistryError
from deal_core.evaluation.answerer import Answerer, load_answerer, load_base_of
from deal_core.evaluation.answering import read_served
from infra.served_model import ServedModel
from infra.serving.served_folder import LOADER
from infra.settings import HomeSettings, ServingSettings
from infra.store.base import temporary_folder
from infra.tracking.registry import VersionInfo, open_registry, require_through_gate

POLL_SECONDS = 0.5
"""Between two looks at the alias."""
MAX_POLL_SECONDS = 10.0
"""Between two looks while MLflow is away: the pause doubles up to this."""
PAUSE_SECONDS = 60.0
"""A version that did not load is tried again after this."""

LOG = logging.getLogger("deal.serving")

Say = Callable[[str], None]


class ServingError(DealError):
    """A version cannot be served."""


class NoChampionError(RegistryError):
    """The registry knows no champion of the lineage; only the caller can tell why."""


class Champion:
    """The model that answers for a lineage, kept in step with the alias by `follow`."""

    def __init__(self, lineage: str, say: Say) -> None:
        self.lineage = lineage
        self._print = say
        self._answerer: Answerer | None = None
        self._meta: Model | None = None
        self._champion: str | None = None
        self._starting: str | None = None
        self._problem: str | None = None
        self._failed: tuple[str, float] | None = None
        """The version that did not load, and when it was tried."""

    def state(self) -> dict[str, Any]:
        """What GET /version says."""
        return {
            "lineage": self.lineage,
            "version": self.version,
            "champion": self._champion,
            "starting": self._starting,
            "problem": self._problem,
        }

    @property
    def version(self) -> str | None:
        """Number of the version that answers; None: it is being loaded."""
        return None if self._answerer is None else self._answerer.version

    def model(self, is_given_up: Callable[[], bool]) -> PyFuncModel:
        """What answers one request, as MLflow's servers ask it: tables are checked against the model's signature.

        Args:
            is_given_up: whether the client has gone.
        """
        assert self._answerer is not None and self._meta is not None, "requests are taken once the champion is loaded"
        return PyFuncModel(model_meta=self._meta, model_impl=ServedModel(self._answerer, is_given_up))

    def begin(self) -> None:
        """Load the champion.

        Raises:
            NoChampionError: there is no champion.
            RegistryError: the champion may not serve, or the registry does not answer.
            ServingError: the champion does not load.
        """
        self._registry = open_registry()
        champion = self._registry.champion(self.lineage)
        if champion is None:
            raise NoChampionError(f"Lineage '{self.lineage}' has no champion.")
        require_through_gate(champion)
        self._champion = champion.version
        self._try(champion.version)
        if self._answerer is None:
            raise ServingError(self._problem or "")

    def follow(self, stopped: threading.Event) -> None:
        """Keep in step with the alias until stopped; a call of MLflow that hangs is not interrupted."""
        pause = POLL_SECONDS
        while not stopped.wait(pause):
            try:
                self._keep_up_with(self._registry.champion(self.lineage))
            except Exception as error:  # the thread must not end
                if not isinstance(error, RegistryError):
                    LOG.exception("Following the alias failed")
                problem = str(error) if isinstance(error, RegistryError) else f"{type(error).__name__}: {error}."
                self._note(f"{problem} What serves goes on.")
                pause = min(2 * pause, MAX_POLL_SECONDS)
            else:
                pause = POLL_SECONDS

    def stop(self) -> None:
        """Give up what is computed."""
        if self._answerer is not None:
            self._answerer.stop()

    def _keep_up_with(self, champion: VersionInfo | None) -> None:
        if champion is None:
            self._note(f"{self.lineage} has no champion any more; what serves goes on.")
            return
        try:
            require_through_gate(champion)
        except RegistryError as error:
            self._note(f"{error} What serves goes on.")
            return
        if champion.version != self._champion:
            self._failed = None
        self._champion = champion.version
        if champion.version == self.version:
            self._problem = None
        elif self._failed is None or time.monotonic() - self._failed[1] > PAUSE_SECONDS:
            self._try(champion.version)

    def _try(self, version: str) -> None:
        """Let a version answer; where that fails, say why."""
        started, self._starting = time.monotonic(), version
        try:
            with temporary_folder() as temporary:
                self._load(version, temporary / "version")
        except Exception as error:  # a full disk, damaged files, too little memory: what answers must go on
            if not isinstance(error, DealError | OSError):
                LOG.exception("Version %s does not load", version)
            self._failed = version, time.monotonic()
            kind = "" if isinstance(error, DealError | OSError) else f"{type(error).__name__}: "
            serving = f"; version {self.version} goes on serving" if self.version else ""
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

    def _say(self, text: str) -> None:
        with suppress(OSError):  # nobody reads the command's output any more
            self._print(text)

    def _note(self, problem: str) -> None:
        if problem != self._problem:
            self._say(problem)
        self._problem = problem


def require_own_loader(folder: Path) -> Model:
    """MLflow's description of a version, if the version is to be loaded by this project's code alone.

    MLflow would import the module that the folder's MLmodel names, and code that lies beside it. Everyone who may
    register models could run code here.

    Raises:
        ServingError: the MLmodel names another loader, or code.
    """
    meta = Model.load(str(folder))
    flavor = meta.flavors.get(FLAVOR_NAME, {})
    loader, code = flavor.get("loader_module"), flavor.get("code")
    if loader != LOADER or code is not None:
        found = f"the loader {loader}" if loader != LOADER else f"code of its own ({code})"
        raise ServingError(
            f"its MLmodel names {found}, and nothing but {LOADER} is run here; this pipeline registers no such "
            "version. Promote another one."
        )
    return meta
