"""The rollout of a version in one server: the candidate answers a share of the requests, or copies of them.

The promotion log names the candidate. It shares the base model with the champion. Without a prediction log nothing
could be judged, so there is no rollout then.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from deal_core.errors import ConfigError, DealError
from deal_core.evaluation.answerer import Answered, Answerer, GivenUpError, Sampling
from deal_core.evaluation.answering import InputRow, ServedVersion
from deal_core.judging_config import RolloutKind
from deal_core.safe_text import without_secrets
from infra.serving.engines import Engines
from infra.serving.prediction_log import LOG, PredictionLog
from infra.serving.version_files import fetch_version
from infra.store.base import ObjectStore, temporary_folder
from infra.versions import Version

MAX_COPIES = 256
"""Requests that wait for a shadow. Further ones are not copied."""


@dataclass(frozen=True)
class Trial:
    """A version that is tried on live traffic."""

    version: str
    kind: RolloutKind
    share: float

    def takes(self, key: str) -> bool:
        """Return whether the requests with a key are among the share. Each version draws other keys."""
        drawn = int.from_bytes(hashlib.sha256(f"{self.version} {key}".encode(errors="replace")).digest()[:8], "big")
        return drawn < self.share * 2**64


class Rollout:
    """The candidate of one server. `keep_up` loads and removes it. `note` gets each message for the user."""

    def __init__(
        self,
        store: ObjectStore,
        answerer: Answerer | Engines,
        log: PredictionLog | None,
        note: Callable[[str], None],
    ) -> None:
        self._store, self._answerer, self._log, self._note = store, answerer, log, note
        self.trial: Trial | None = None
        """What is tried now; None: nothing."""
        self.problem: str | None = None
        """Why the version in rollout is not tried."""
        self._failed: tuple[Trial, float] | None = None
        """What did not load, and when (monotonic seconds)."""
        self._copies: set[asyncio.Task[None]] = set()
        """Requests that wait for the shadow, or that it answers."""
        self._shadow = asyncio.Lock()
        """Held while the shadow answers: it gets one request after another."""
        self.num_dropped = 0
        """Requests that were not copied since the server started, because the shadow is slower than they come."""

    @property
    def canary(self) -> str | None:
        """The version that answers a share of the requests; None: none does."""
        return self.trial.version if self.trial is not None and self.trial.kind == "canary" else None

    def state(self) -> dict[str, Any]:
        """Return the entry in the body of GET /version; empty if there is no rollout."""
        if self.trial is None and self.problem is None:
            return {}
        return {"rollout": {**(vars(self.trial) if self.trial else {}), "problem": self.problem}}

    def keep_up(self, candidate: Version | None, champion: str | None) -> None:
        """Load the version in rollout, or remove it. `champion` is the version that answers now."""
        wanted = None
        # a candidate continues the champion; otherwise the champion does not answer yet
        if candidate is not None and candidate.rollout is not None and candidate.parent_version == champion:
            wanted = Trial(candidate.version, candidate.rollout.kind, candidate.rollout.share)
        if wanted is not None and self._log is None:
            self._tell(f"Version {wanted.version} is not tried: its rollout needs DEAL_LOG_PREDICTIONS.")
            return
        if wanted != self.trial and self.trial is not None:
            self.trial = None
            self._answerer.drop_candidate()
        if wanted is None:
            self.problem = None
        elif wanted != self.trial and (
            self._failed is None
            or self._failed[0] != wanted
            or time.monotonic() - self._failed[1] > self._answerer.retry_seconds
        ):
            assert candidate is not None, "it is what is wanted"
            self._try(candidate, wanted)

    def stop(self) -> None:
        """Try nothing any more. Copies that wait are dropped."""
        self.trial = None

    async def ask(
        self,
        rows: Sequence[InputRow],
        served: ServedVersion,
        key: str | None,
        version: str | None,
        sampling: Sampling | None = None,
        ids: Sequence[str] = (),
    ) -> Answered | Callable[[], None]:
        """Let the candidate answer a request of the canary's share.

        If the result is a function, the champion (`served`) has to answer. The function logs the candidate's refusal of
        the request, if there was one. The caller calls it, unless the champion refuses the request too.

        Each row names its task; a task that the champion does not know is not the candidate's to answer. Requests with
        the same `key` go to the same version; without a key, the same requests do. `version` is the version that the
        request names, if it names one. Then the candidate's error is raised, as the champion must not answer instead.
        """
        trial = self.trial
        if (
            trial is None
            or trial.kind != "canary"
            or version not in (None, trial.version)
            or (version is None and not trial.takes(key or digest(rows)))
            or any(served.task(row.task) is None for row in rows)
        ):
            return lambda: None
        begun = time.perf_counter()
        try:
            return await self._ask(trial, rows, sampling=sampling, ids=ids)
        except Exception as error:
            if version is not None or (sampling and sampling.pieces and sampling.pieces.have_come):
                raise
            _report(error, trial)
            if not isinstance(error, ConfigError) or self._log is None:
                return lambda: None
            return partial(self._log.note_failure, rows, served, trial.version, time.perf_counter() - begun)

    def copy(self, rows: Sequence[InputRow], answered: Answered, key: str | None) -> None:
        """Let the shadow answer a copy of a request later. If too many wait, there is no copy."""
        trial = self.trial
        if trial is None or trial.kind != "shadow" or not answered.ids or not trial.takes(key or digest(rows)):
            return
        if len(self._copies) > MAX_COPIES:
            self.num_dropped += 1
            return
        copy = asyncio.create_task(self._answer_copy(trial, rows, answered))
        self._copies.add(copy)
        copy.add_done_callback(self._copies.discard)

    async def _answer_copy(self, trial: Trial, rows: Sequence[InputRow], answered: Answered) -> None:
        async with self._shadow:
            if self.trial != trial:
                return
            try:
                await self._ask(trial, rows, answered)
            except Exception as error:
                _report(error, trial)

    def _try(self, candidate: Version, trial: Trial) -> None:
        problem = try_to_load(
            self._store, candidate, lambda folder: self._answerer.add_candidate(folder, trial.version)
        )
        if problem is not None:
            self._failed = trial, time.monotonic()
            self._tell(f"Version {trial.version} does not load for its rollout: {problem}")
            return
        self._failed = self.problem = None
        self.trial = trial
        share = f"{100 * trial.share:g} % of the requests"
        what = f"answers copies of {share}" if trial.kind == "shadow" else f"answers {share}"
        self._note(f"Version {trial.version} is tried: it {what}.")

    def _tell(self, problem: str) -> None:
        if problem != self.problem:
            self._note(problem)
        self.problem = problem

    async def _ask(
        self,
        trial: Trial,
        rows: Sequence[InputRow],
        returned: Answered | None = None,
        *,
        sampling: Sampling | None = None,
        ids: Sequence[str] = (),
    ) -> Answered:
        """Let the candidate answer, and log the answer or the failure. The refusal of a request is not logged.

        `returned` is the champion's answer if the request is a copy. Then a refusal is a failure.
        """
        assert self._log is not None, "there is no trial without a log"
        begun, is_copy = time.perf_counter(), returned is not None
        served, shadow_of = (self._answerer.served, ()) if returned is None else (returned.served, returned.ids)
        try:
            answered = await self._answerer.reply(rows, by_candidate=True, in_background=is_copy, sampling=sampling)
        except GivenUpError:
            raise
        except Exception as error:
            if is_copy or not isinstance(error, ConfigError):
                self._log.note_failure(rows, served, trial.version, time.perf_counter() - begun, shadow_of)
            raise
        if answered.version != trial.version:  # another candidate has taken its place meanwhile
            raise GivenUpError(f"Version {trial.version} is not tried any more; ask again.")
        return self._log.note(rows, answered, time.perf_counter() - begun, shadow_of, ids=ids)


def try_to_load(store: ObjectStore, version: Version, load: Callable[[Path], None]) -> str | None:
    """Download a version and call `load` with its folder; return why it does not load. What serves must serve on."""
    try:
        with temporary_folder() as temporary:
            folder = temporary / "version"
            fetch_version(store, version, folder, with_proof=True)
            load(folder)
    except Exception as error:  # damaged files, a full disk, too little memory
        reason = without_secrets(" ".join(str(error).split()))
        if isinstance(error, DealError | OSError):
            return reason
        LOG.exception("Version %s does not load", version.version)
        return f"{type(error).__name__}: {reason}"
    return None


def _report(error: Exception, trial: Trial) -> None:
    """Write what broke into the server's log. Requests that were refused or given up are no defect."""
    if not isinstance(error, ConfigError | GivenUpError):
        LOG.error("Version %s failed on a request", trial.version, exc_info=error)


def with_tasks(rows: Sequence[InputRow], served: ServedVersion) -> list[InputRow]:
    """Let every row name its task: a candidate may have learned a newer one."""
    return [InputRow(row.input, served.newest_task if row.task is None else row.task) for row in rows]


def digest(rows: Sequence[InputRow]) -> str:
    """Return what tells a request from others, as a key."""
    return hashlib.sha256(json.dumps([[row.task, row.input] for row in rows]).encode()).hexdigest()
