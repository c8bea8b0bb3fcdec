"""Answer rows with one version on one base model, with one queue for all callers; the version can be swapped."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel

from deal_core.adapter import state as adapters
from deal_core.adapter.state import CANDIDATE_NAME, SavedAdapter, activate, load_adapter, read_adapter, swap_adapter
from deal_core.base_model.load import BaseModel, Precision, load_base
from deal_core.errors import ConfigError, DealError
from deal_core.evaluation.answering import InputRow, ServedTask, ServedVersion, read_served
from deal_core.evaluation.generation import Confidence, GivenAnswer, answer_task

UNKNOWN_VERSION = "unknown"
MAX_ROWS = 64
"""Most rows of a batch on an accelerator."""
MAX_ROWS_CPU = 6
"""Most rows of a batch on a CPU. Larger batches save little time there, and all rows wait for the longest answer."""


class GivenUpError(DealError):
    """Rows were not answered, because the caller has gone, the server is stopping, or the candidate was removed."""


class Answered(NamedTuple):
    """Answers to rows, and the version that gave them."""

    answers: list[str]
    served: ServedVersion
    version: str
    """The version's number."""
    confidences: list[Confidence]
    ids: Sequence[str] = ()
    """The ids of the rows in the prediction log; empty: the rows are not logged."""
    is_cut: Sequence[bool] = ()
    """Which answers reached their longest length before their end; empty: not known."""


def load_answerer(
    folder: Path,
    cache_folder: Path,
    base_source: str | None = None,
    *,
    precision: Precision = "auto",
    version: str = UNKNOWN_VERSION,
) -> Answerer:
    """Load a version for answering: its base model, found by name and checked by digest, and the adapter.

    `folder` has the PEFT files and `deal.json`. `base_source` is the base model's place on this machine; None: the
    place that the version names. With `precision` fp32, an answer does not depend on other rows of its batch. Answers
    carry `version`, the version's number.

    Raises:
        AdapterStateError: the folder cannot be served.
        ConfigError: the base model is not found, or is a different one.
    """
    served = read_served(folder)
    return Answerer(served, load_base_of(served, cache_folder, base_source, precision=precision), folder, version)


def load_base_of(
    served: ServedVersion, cache_folder: Path, base_source: str | None = None, *, precision: Precision = "auto"
) -> BaseModel:
    """Load the base model of a version; arguments and errors are those of `load_answerer`."""
    source = base_source or served.base_source
    base = load_base(source, cache_folder, precision=precision)
    if base.sha256 != served.base_sha256:
        raise ConfigError(
            f"The version needs the base model {served.base_name} ({served.base_sha256[:12]}), but {source} is another "
            f"one ({base.sha256[:12]}); set DEAL_BASE_MODEL to where the right one is."
        )
    return base


class Answerer:
    """Answers rows with one version at a time. Threads share its one model: rows that wait are answered as one batch.

    A thread that asks computes the next batch if no other thread computes; it goes on until its own rows are answered.
    A swap comes before every batch. A swap interrupts the batch that is computed; its rows are answered by the new
    version.

    A second version, the candidate, may answer next to it, with an adapter of its own on the same base model. A batch
    has rows for one of the two. Rows in the background wait for all others, which also interrupt their batch.
    """

    def __init__(self, served: ServedVersion, base: BaseModel, folder: Path, version: str = UNKNOWN_VERSION) -> None:
        self.served = served
        """The facts of the version that answers now."""
        self.version = version
        """Number of the version that answers now."""
        self.base_sha256 = base.sha256
        """Digest of the base model that is loaded."""
        self._changed = threading.Condition()
        self._holder: int | None = None
        """The thread that computes with the model or swaps the version."""
        self._num_swaps = 0
        """Swaps that wait or run."""
        self._is_stopped = False
        self._waiting: list[_Request] = []
        self._candidate: tuple[ServedVersion, str] | None = None
        """Facts and number of the candidate."""
        self._is_background = False
        """Whether the batch that is computed is one in the background."""
        self._name: str
        """Name of the first version's adapter on the model."""
        self._put_on(base, load_adapter(base.model, folder))

    def answer(self, rows: Sequence[InputRow]) -> list[str]:
        """One answer per row, in the rows' order; errors are those of `ask`."""
        return self.ask(rows).answers

    def ask(
        self,
        rows: Sequence[InputRow],
        is_given_up: Callable[[], bool] = lambda: False,
        *,
        by_candidate: bool = False,
        in_background: bool = False,
    ) -> Answered:
        """Answer rows, all with the same version: with `by_candidate` the candidate.

        Once `is_given_up` returns True, the caller has gone, and the remaining rows are not answered. Rows
        `in_background` wait for all others.

        Raises:
            ConfigError: a row does not fit the version; then no row is answered.
            GivenUpError: the caller has gone, `stop` was called, or there is no candidate.
        """
        request = _Request(list(rows), is_given_up, by_candidate, in_background)
        with self._changed:
            self._waiting.append(request)
        while not self._is_done(request):
            try:
                self._answer_next()
            finally:
                self._give_back()
        if request.error is not None:
            raise request.error
        assert request.served is not None
        given = request.given
        return Answered(
            [each.text for each in given],
            request.served,
            request.version,
            [each.confidence for each in given],
            is_cut=[each.is_cut for each in given],
        )

    def swap(self, folder: Path, version: str, base: BaseModel | None = None) -> None:
        """Let another version answer from now on. Its files are read first; only then does answering pause.

        `folder` and `version` are those of `load_answerer`. Without `base`, the version uses the loaded base model.

        Raises:
            AdapterStateError: the folder cannot be served, or does not fit the base; the previous version stays.
            ConfigError: the version needs another base model than the given or loaded one.
        """
        base_sha256 = self.base_sha256 if base is None else base.sha256
        served, saved = _read(folder, base_sha256)
        model = None if base is None else load_adapter(base.model, folder)
        with self._alone():
            if base is None or model is None:
                activate(self._model, self._name)
                swap_adapter(self._model, saved)
                self._name = self._model.active_adapter
            else:
                self._put_on(base, model)
                self._candidate = None
            self.served, self.version, self.base_sha256 = served, version, base_sha256
            for request in self._waiting:
                request.begin_again()

    def add_candidate(self, folder: Path, version: str) -> None:
        """Let a second version answer too, in place of an earlier candidate. Its files are read first.

        Raises:
            AdapterStateError: the folder cannot be served, or does not fit the base; then there is no candidate.
            ConfigError: the version needs another base model.
        """
        served, saved = _read(folder, self.base_sha256)
        with self._without_candidate():
            adapters.add_candidate(self._model, saved)
            self._candidate = served, version

    def drop_candidate(self) -> None:
        """Remove the candidate, if there is one. Rows that wait for it are given up."""
        with self._without_candidate():
            adapters.drop_candidate(self._model)

    @contextmanager
    def _without_candidate(self) -> Iterator[None]:
        """Hold the model, with the first version on it. Rows that the candidate has begun begin again."""
        with self._alone():
            self._candidate = None
            activate(self._model, self._name)
            for request in self._waiting:
                if request.by_candidate:
                    request.begin_again()
            yield

    def stop(self) -> None:
        """Answer no more rows. Waiting callers get an error within one step of the model."""
        with self._changed:
            self._is_stopped = True
            self._changed.notify_all()

    def _put_on(self, base: BaseModel, model: PeftModel) -> None:
        self._tokenizer, self._model, self._name = base.tokenizer, model, model.active_adapter
        for blocks in base.model.modules():
            if isinstance(blocks, torch.nn.ModuleList):  # every transformers model holds its layers in one
                for block in blocks:
                    block.register_forward_pre_hook(self._interrupt_for_swap)
        self._max_rows = MAX_ROWS_CPU if next(model.parameters()).device.type == "cpu" else MAX_ROWS

    def _interrupt_for_swap(self, *_: Any) -> None:
        if self._holder != threading.get_ident():
            return
        is_overtaken = self._is_background and any(not request.in_background for request in self._waiting)
        if self._num_swaps or self._is_stopped or is_overtaken:
            raise _InterruptedError

    def _is_free(self) -> bool:
        return self._holder is None and not self._num_swaps

    def _is_done(self, request: _Request) -> bool:
        """Wait until the request is done or the model is free. A free model is then held by this thread."""
        with self._changed:
            self._changed.wait_for(lambda: request.is_done or self._is_free())
            if not request.is_done:
                self._holder = threading.get_ident()
            return request.is_done

    def _give_back(self) -> None:
        with self._changed:
            self._waiting = [request for request in self._waiting if not request.is_done]
            self._holder = None
            self._changed.notify_all()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold the model, ahead of all waiting rows, while no other thread computes."""
        with self._changed:
            self._num_swaps += 1
            self._changed.wait_for(lambda: self._holder is None)
            self._holder = threading.get_ident()
        try:
            yield
        finally:
            with self._changed:
                self._num_swaps -= 1
            self._give_back()

    def _answer_next(self) -> None:
        """Answer a batch of waiting rows. Older requests come first, and requests take turns between batches."""
        with self._changed:
            waiting = sorted(self._waiting, key=lambda request: request.in_background)
        batch: list[_Part] = []
        num_left = self._max_rows
        for request in waiting:
            served = self._candidate if request.by_candidate else (self.served, self.version)
            if self._is_stopped or request.is_given_up() or served is None:
                request.end(GivenUpError("The server is stopping, or the client has gone; ask again."))
            elif num_left > 0 and request.prepare(*served) and (not batch or request.is_like(batch[0].request)):
                batch.append(_Part(request, request.asked[len(request.given) :][:num_left]))
                num_left -= len(batch[-1].rows)
        if not batch:
            return
        self._is_background = batch[0].request.in_background
        name = CANDIDATE_NAME if batch[0].request.by_candidate else self._name
        if self._model.active_adapter != name:
            activate(self._model, name)
        try:
            self._answer_together(batch)
        except _InterruptedError:
            return
        with self._changed:  # requests that were served now go to the end of the queue
            answered = {id(part.request) for part in batch}
            self._waiting.sort(key=lambda request: id(request) in answered)

    def _answer_together(self, batch: Sequence[_Part]) -> None:
        try:
            self._generate(batch)
        except _InterruptedError:
            raise
        except Exception as error:
            if len(batch) > 1:  # a part that cannot be answered must not fail the other parts
                for part in batch:
                    self._answer_together([part])
            else:
                batch[0].request.end(error)

    def _generate(self, batch: Sequence[_Part]) -> None:
        rows = [row for part in batch for row in part.rows]
        found: dict[int, GivenAnswer] = {}
        for task in dict.fromkeys(task for task, _ in rows):
            places = [place for place, (asked, _) in enumerate(rows) if asked == task]
            answers = answer_task(self._model, self._tokenizer, task, [rows[place][1] for place in places])
            found.update(zip(places, answers, strict=True))
        given = iter([found[place] for place in range(len(rows))])
        for part in batch:
            part.request.take(list(islice(given, len(part.rows))))


def _read(folder: Path, base_sha256: str) -> tuple[ServedVersion, SavedAdapter]:
    """Read a version's folder for the base model that is loaded."""
    served = read_served(folder)
    if served.base_sha256 != base_sha256:
        raise ConfigError(
            f"The version needs the base model {served.base_name} ({served.base_sha256[:12]}), but another one is "
            f"loaded ({base_sha256[:12]})."
        )
    return served, read_adapter(folder)


class _InterruptedError(Exception):
    """A batch was interrupted by a waiting swap or by `stop`."""


@dataclass
class _Request:
    """The rows of one caller, with their answers or their error."""

    rows: Sequence[InputRow]
    is_given_up: Callable[[], bool]
    by_candidate: bool = False
    in_background: bool = False
    asked: list[tuple[ServedTask, str]] = field(default_factory=list)
    """The rows in the form that the version `served` is asked; empty before the first batch."""
    given: list[GivenAnswer] = field(default_factory=list)
    """Answers to the first rows."""
    served: ServedVersion | None = None
    version: str = ""
    error: Exception | None = None
    is_done: bool = False

    def is_like(self, other: _Request) -> bool:
        """Return whether both can be in one batch."""
        return (self.by_candidate, self.in_background) == (other.by_candidate, other.in_background)

    def prepare(self, served: ServedVersion, version: str) -> bool:
        """Check that the rows fit the version. False: they do not fit or there are none, and the request is done."""
        if self.served is None:
            self.served, self.version = served, version
            try:
                self.asked = [served.asked(row, number) for number, row in enumerate(self.rows, 1)]
            except Exception as error:  # another client's thread may be the one that runs here
                self.error = error
            self.is_done = self.error is not None or not self.asked
        return not self.is_done

    def take(self, given: Sequence[GivenAnswer]) -> None:
        self.given += given
        self.is_done = len(self.given) == len(self.asked)

    def end(self, error: Exception) -> None:
        self.error, self.is_done = error, True

    def begin_again(self) -> None:
        """Drop the answers so far: another version answers now."""
        if not self.is_done:
            self.asked, self.given, self.served = [], [], None


@dataclass(frozen=True)
class _Part:
    """Rows of a request that go into one batch."""

    request: _Request
    rows: Sequence[tuple[ServedTask, str]]
