"""Answer rows with one version on one base model, with one queue for all callers; the version can be swapped.

One thread computes. A few others prepare prompts meanwhile.

    request → prompts of its next rows → queue → a batch of several requests → answers → prompts of its next rows → …
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from peft import PeftModel

from deal_core.adapter import state as adapters
from deal_core.adapter.state import CANDIDATE_NAME, SavedAdapter, activate, load_adapter, read_adapter, swap_adapter
from deal_core.base_model.language_model import device_of
from deal_core.base_model.load import BaseModel, Precision, load_base
from deal_core.config import Quantize
from deal_core.data.prompts import encode_prompt
from deal_core.errors import ConfigError, DealError
from deal_core.evaluation import generation
from deal_core.evaluation.answering import InputRow, ServedTask, ServedVersion, read_served
from deal_core.evaluation.generation import Confidence, GivenAnswer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

UNKNOWN_VERSION = "unknown"
MAX_ROWS = 64
"""Most rows of a batch on an accelerator."""
MAX_ROWS_CPU = 6
"""Most rows of a batch on a CPU. Larger batches save little time there, and all rows wait for the longest answer."""
NUM_PREPARING = 8
"""Threads that prepare prompts. One long text takes seconds, and the prompts of others must not wait for it."""


class GivenUpError(DealError):
    """Rows were not answered, because the caller has gone, the server is stopping, or the candidate was removed."""

    code = "given-up"


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
    choices: Sequence[Choice] = ()
    """What an engine gave for each row, several answers if several were asked for; empty: the answers are all."""
    usage: Mapping[str, int] = {}
    """Numbers of tokens, by OpenAI's names; empty: not counted."""


class Choice(NamedTuple):
    """An answer of an engine, or the next piece of one."""

    place: int
    """Number of the row, times the answers per row, plus the number of the answer."""
    text: str
    finish_reason: str | None
    """None: the answer goes on. "length": it has reached its longest length."""
    log_probs: Sequence[tuple[str, float, Sequence[tuple[str, float]]]] | None = None
    """For each token its text, its log-probability, and those of the likeliest tokens; None: not asked for."""


@dataclass
class Pieces:
    """The client of an answer that comes in pieces."""

    send: Callable[[Choice, ServedVersion, str], Awaitable[None]]
    """Sends a piece, and the version with its number. The next piece waits until then."""
    have_come: bool = False
    """Whether the client has got one, so that no other engine and no other version can answer instead."""


@dataclass(frozen=True)
class Sampling:
    """What a client wants of an engine besides the rows. The model in this process gives the likeliest answer only."""

    passed_on: Mapping[str, Any] = field(default_factory=dict)
    """temperature, top_p, seed and stop, as the client gave them."""
    max_tokens: int | None = None
    """Longest answer; None: the task's."""
    num_answers: int = 1
    """Answers to each row."""
    num_tops: int | None = None
    """For how many of the likeliest tokens log-probabilities are given; None: for none, not even the answer's own."""
    pieces: Pieces | None = None
    """Takes each piece of an answer as it comes; None: the client wants the whole answer."""


def load_answerer(
    folder: Path,
    cache_folder: Path,
    base_source: str | None = None,
    *,
    precision: Precision = "auto",
    version: str = UNKNOWN_VERSION,
) -> Answerer:
    """Load a version for answering: its base model, found by name and checked by digest, and the adapter.

    The base model is quantized as it was when the version was judged.

    `folder` has the PEFT files and `deal.json`. `base_source` is the base model's place on this machine; None: the
    place that the version names. With `precision` fp32, an answer does not depend on other rows of its batch. Answers
    carry `version`, the version's number.

    Raises:
        AdapterStateError: the folder cannot be served.
        ConfigError: the base model is not found, is a different one, or cannot be quantized on this machine.
    """
    served = read_served(folder)
    return Answerer(served, load_base_of(served, cache_folder, base_source, precision=precision), folder, version)


def load_base_of(
    served: ServedVersion, cache_folder: Path, base_source: str | None = None, *, precision: Precision = "auto"
) -> BaseModel:
    """Load the base model of a version; arguments and errors are those of `load_answerer`."""
    source = base_source or served.base_source
    base = load_base(source, cache_folder, precision=precision, quantize=served.quantize)
    if base.sha256 != served.base_sha256:
        raise ConfigError(
            f"The version needs the base model {served.base_name} ({served.base_sha256[:12]}), but {source} is another "
            f"one ({base.sha256[:12]}); set DEAL_BASE_MODEL to where the right one is."
        )
    return base


class Answerer:
    """Answers rows with one version at a time. Rows that wait are answered together as one batch.

    One thread alone computes with the model and changes its adapters. A change comes before every batch and interrupts
    the batch that is computed; its rows are answered by the new version. A batch whose callers have all gone ends too.

    A second version, the candidate, may answer next to the first one, with an adapter of its own on the same base
    model. A batch has rows for one of the two. Rows in the background wait for all others, which also interrupt their
    batch.
    """

    retry_seconds = 60.0
    """Pause before a version that did not load is tried again."""

    def __init__(self, served: ServedVersion, base: BaseModel, folder: Path, version: str = UNKNOWN_VERSION) -> None:
        self._first = _Version(served, version, base.tokenizer)
        """The version that answers now."""
        self.held_base = base.sha256, base.quantize
        """The base model that is loaded, as `ServedVersion.held_base`."""
        self._candidate: _Version | None = None
        self._lock = threading.Lock()
        """Held to change `_changes` and `_waiting`."""
        self._changes: list[Callable[[], None]] = []
        """Changes of versions that wait for the thread of the model."""
        self._waiting: list[_Request] = []
        """Requests with prompts that are not answered. The thread of the model alone changes these requests; all others
        belong to the thread that prepares their prompts."""
        self._batch: list[_Part] = []
        """What is computed now."""
        self._is_ending = False
        self._is_stopped = False
        self._preparing = ThreadPoolExecutor(NUM_PREPARING, thread_name_prefix="prompts")
        self._computing = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._thread: int | None = None
        """The thread that computes."""
        self._name: str
        """Name of the first version's adapter on the model."""
        self._put_on(base, load_adapter(base.model, folder))

    @property
    def served(self) -> ServedVersion:
        """The facts of the version that answers now."""
        return self._first.served

    @property
    def version(self) -> str:
        """Number of the version that answers now."""
        return self._first.number

    def answer(self, rows: Sequence[InputRow]) -> list[str]:
        """One answer per row, in the rows' order; errors are those of `submit`."""
        return self.ask(rows).answers

    def ask(self, rows: Sequence[InputRow]) -> Answered:
        """Answer rows, all with the same version; errors are those of `submit`."""
        return self.submit(rows).result()

    async def reply(
        self,
        rows: Sequence[InputRow],
        *,
        by_candidate: bool = False,
        in_background: bool = False,
        sampling: Sampling | None = None,
    ) -> Answered:
        """As `submit`, for an event loop: a cancelled task is a caller that has gone. `sampling` has no effect."""
        del sampling  # an answer is the most likely one
        return await asyncio.wrap_future(self.submit(rows, by_candidate=by_candidate, in_background=in_background))

    def submit(
        self, rows: Sequence[InputRow], *, by_candidate: bool = False, in_background: bool = False
    ) -> Future[Answered]:
        """Begin to answer rows, all with the same version: with `by_candidate` the candidate.

        A caller that has gone cancels the result; the remaining rows are not answered then. Rows `in_background` wait
        for all others. The result raises:
            ConfigError: a row does not fit the version; then no row is answered.
            GivenUpError: `drain` or `stop` was called, or there is no candidate.
        """
        request = _Request(list(rows), by_candidate, in_background)
        self._preparing.submit(self._prepare, request)
        return request.result

    def swap(self, folder: Path, version: str, base: BaseModel | None = None) -> None:
        """Let another version answer from now on. Its files are read first; only then does answering pause.

        `folder` and `version` are those of `load_answerer`. Without `base`, the version uses the loaded base model.

        Raises:
            AdapterStateError: the folder cannot be served, or does not fit the base; the previous version stays.
            ConfigError: the version needs another base model than the given or loaded one.
        """
        held_base = self.held_base if base is None else (base.sha256, base.quantize)
        served, saved = _read(folder, held_base)
        model = None if base is None else load_adapter(base.model, folder)

        def change() -> None:
            if base is None or model is None:
                activate(self._model, self._name)
                swap_adapter(self._model, saved)
                self._name = self._model.active_adapter
                tokenizer = self._first.tokenizer
            else:
                self._put_on(base, model)
                self._candidate, tokenizer = None, base.tokenizer
            self._first, self.held_base = _Version(served, version, tokenizer), held_base

        self._change(change)

    def add_candidate(self, folder: Path, version: str) -> None:
        """Let a second version answer too, in place of an earlier candidate. Its files are read first.

        Raises:
            AdapterStateError: the folder cannot be served, or does not fit the base; then there is no candidate.
            ConfigError: the version needs another base model.
        """
        served, saved = _read(folder, self.held_base)

        def change() -> None:
            self._candidate = None  # also if the adapter does not fit
            activate(self._model, self._name)
            adapters.add_candidate(self._model, saved)
            self._candidate = _Version(served, version, self._first.tokenizer)

        self._change(change)

    def drop_candidate(self) -> None:
        """Remove the candidate, if there is one. Rows that wait for it are given up."""

        def change() -> None:
            self._candidate = None
            activate(self._model, self._name)
            adapters.drop_candidate(self._model)

        self._change(change)

    def drain(self) -> None:
        """Give up the requests whose first prompts are still being prepared; answer those that wait for the model."""
        self._is_ending = True

    def stop(self) -> None:
        """Answer no more rows. Waiting callers get an error within one layer of the model."""
        self._is_stopped = True
        self._computing.submit(self._compute)

    def _put_on(self, base: BaseModel, model: PeftModel) -> None:
        base.tokenizer("")  # the first call sets the tokenizer up, which threads must not do at the same time
        self._model, self._name = model, model.active_adapter
        for blocks in base.model.modules():
            if isinstance(blocks, torch.nn.ModuleList):  # every transformers model holds its layers in one
                for block in blocks:
                    block.register_forward_pre_hook(self._interrupt)
        self._max_rows = MAX_ROWS_CPU if device_of(model).type == "cpu" else MAX_ROWS

    def _interrupt(self, *_: Any) -> None:
        """Runs before every layer of the model, so that a batch ends soon that is not wanted any more."""
        if self._thread != threading.get_ident() or not self._batch:  # the model has another user
            return
        have_gone = all(request.result.cancelled() for request, _ in self._batch)
        is_background = self._batch[0][0].in_background
        is_overtaken = is_background and any(not request.in_background for request in tuple(self._waiting))
        if self._changes or self._is_stopped or have_gone or is_overtaken:
            raise _InterruptedError

    def _change(self, change: Callable[[], None]) -> None:
        """Let the thread of the model change a version, ahead of all waiting rows; return when it has."""
        done: Future[None] = Future()

        def run() -> None:
            try:
                change()
                done.set_result(None)
            except Exception as error:
                done.set_exception(error)

        with self._lock:
            self._changes.append(run)
        self._computing.submit(self._compute)
        done.result()

    def _version_for(self, request: _Request) -> _Version | None:
        return self._candidate if request.by_candidate else self._first

    def _prepare(self, request: _Request) -> None:
        """Prepare prompts for the next two batches of a request, and let it wait for the model."""
        try:
            version = self._version_for(request)
            if version is None:
                raise given_up()
            if request.version is not version:  # another version answers now, and asks in its own way
                request.begin_again()
            if not request.inputs:  # all rows are checked before any is answered
                for number, row in enumerate(request.rows, 1):
                    self._require_wanted(request)
                    request.inputs.append(version.served.task_and_input(row, number))
            num_ready = len(request.answers) + len(request.prompts)
            for task, text in request.inputs[num_ready : len(request.answers) + 2 * self._max_rows]:
                prompt = encode_prompt(version.tokenizer, task.schema, text, task.max_prompt_tokens)
                request.prompts.append(prompt)
                request.num_prompt_tokens += len(prompt)
                self._require_wanted(request)
        except Exception as error:
            request.end(error)
            return
        request.version = version
        if not request.inputs:
            request.finish()
            return
        with self._lock:
            self._waiting.append(request)
        self._computing.submit(self._compute)

    def _require_wanted(self, request: _Request) -> None:
        """Raise GivenUpError if nobody waits for a request any more. It is asked between two rows."""
        if self._is_stopped or (self._is_ending and request.version is None) or request.result.cancelled():
            raise given_up()

    def _compute(self) -> None:
        """Change versions and answer batches until nothing waits. It runs in the thread of the model."""
        self._thread = threading.get_ident()
        while True:
            with self._lock:
                changes, self._changes = self._changes, []
            for change in changes:
                change()
            self._batch = self._next_batch()
            if not self._batch:
                return
            by_candidate, _ = self._batch[0][0].kind
            name = CANDIDATE_NAME if by_candidate else self._name
            if self._model.active_adapter != name:
                activate(self._model, name)
            with suppress(_InterruptedError):  # the batch is answered later, by the version that answers then
                self._answer_together(self._batch)
            self._batch = []

    def _next_batch(self) -> list[_Part]:
        """Choose rows of waiting requests. Older requests come first, and requests take turns between batches."""
        batch: list[_Part] = []
        num_left = self._max_rows
        for request in sorted(self._waiting, key=lambda request: request.in_background):
            version = self._version_for(request)
            if self._is_stopped or version is None or request.result.cancelled():
                self._leave(request)
                request.end(given_up())
            elif request.version is not version:
                self._leave(request)
                self._preparing.submit(self._prepare, request)
            elif num_left > 0 and (not batch or request.kind == batch[0][0].kind):
                batch.append((request, request.next_rows(num_left)))
                num_left -= len(batch[-1][1])
        return batch

    def _leave(self, request: _Request) -> None:
        with self._lock:
            self._waiting = [other for other in self._waiting if other is not request]

    def _answer_together(self, batch: Sequence[_Part]) -> None:
        try:
            answers = self._generate([row for _, part in batch for row in part])
        except _InterruptedError:
            raise
        except Exception as error:
            if len(batch) > 1:  # a part that cannot be answered must not fail the other parts
                for single in batch:
                    self._answer_together([single])
            else:
                ((request, _),) = batch
                self._leave(request)
                request.end(error)
            return
        in_order = iter(answers)
        for request, part in batch:
            request.take(list(islice(in_order, len(part))))
            self._leave(request)
            if len(request.answers) == len(request.inputs):
                request.finish()
            elif len(request.prompts) < min(self._max_rows, len(request.inputs) - len(request.answers)):
                self._preparing.submit(self._prepare, request)
            else:  # requests that were served now go to the end of the queue
                with self._lock:
                    self._waiting.append(request)

    def _generate(self, rows: Sequence[tuple[ServedTask, list[int]]]) -> list[GivenAnswer]:
        """Answer the rows, each task's together."""
        answers: dict[int, GivenAnswer] = {}
        for task in dict.fromkeys(task for task, _ in rows):
            places = [place for place, (own_task, _) in enumerate(rows) if own_task == task]
            prompts = [rows[place][1] for place in places]
            # the tokenizer is the candidate's too: both are on one base model
            of_task = generation.answer_prompts(self._model, self._first.tokenizer, task, prompts)
            answers.update(zip(places, of_task, strict=True))
        return [answers[place] for place in range(len(rows))]


def _read(folder: Path, held_base: tuple[str, Quantize]) -> tuple[ServedVersion, SavedAdapter]:
    """Read a version's folder for the base model that is loaded."""
    served, (sha256, quantize) = read_served(folder), held_base
    if served.held_base != held_base:
        raise ConfigError(
            f"The version needs the base model {served.base_name} ({served.base_sha256[:12]}, train.quantize "
            f"{served.quantize}), but another one is loaded ({sha256[:12]}, train.quantize {quantize}).",
            code="other-base",
        )
    return served, read_adapter(folder)


def given_up() -> GivenUpError:
    """Return the error for rows that nobody waits for any more."""
    return GivenUpError("The server is stopping, or the client has gone; ask again.")


class _InterruptedError(Exception):
    """A batch was interrupted by a waiting change, by `stop`, or because all its callers have gone."""


class _Version(NamedTuple):
    """A version that answers."""

    served: ServedVersion
    number: str
    tokenizer: PreTrainedTokenizerBase


@dataclass(eq=False)
class _Request:
    """The rows of one caller, with their answers."""

    rows: Sequence[InputRow]
    by_candidate: bool
    in_background: bool
    result: Future[Answered] = field(default_factory=Future)
    """It stays pending until the end, so that a caller that has gone can cancel it at any time."""
    version: _Version | None = None
    """The version that answers; None: no prompt is prepared yet."""
    inputs: list[tuple[ServedTask, str]] = field(default_factory=list)
    """The task of each row, and its input as datasets store it; empty before the first prompt."""
    prompts: list[list[int]] = field(default_factory=list)
    """Token ids of the prompts of the rows after the answered ones, for two batches at most."""
    num_prompt_tokens: int = 0
    """Tokens of the prompts that were prepared."""
    answers: list[GivenAnswer] = field(default_factory=list)
    """Answers to the first rows."""

    @property
    def kind(self) -> tuple[bool, bool]:
        """By the candidate, in the background: requests of one kind can be in one batch."""
        return self.by_candidate, self.in_background

    def next_rows(self, number: int) -> list[tuple[ServedTask, list[int]]]:
        """Return the tasks and prompts of the next rows that are prepared."""
        tasks = [task for task, _ in self.inputs[len(self.answers) :][:number]]
        return list(zip(tasks, self.prompts[:number], strict=False))

    def take(self, answers: Sequence[GivenAnswer]) -> None:
        """Take the answers to the next rows."""
        self.answers += answers
        del self.prompts[: len(answers)]

    def begin_again(self) -> None:
        """Drop the answers so far: another version answers now."""
        self.version, self.inputs, self.prompts, self.answers = None, [], [], []
        self.num_prompt_tokens = 0

    def end(self, error: Exception) -> None:
        if self.result.set_running_or_notify_cancel():
            self.result.set_exception(error)

    def finish(self) -> None:
        """Give the caller the answers."""
        assert self.version is not None
        answered = Answered(
            [answer.text for answer in self.answers],
            self.version.served,
            self.version.number,
            [answer.confidence for answer in self.answers],
            is_cut=[answer.is_cut for answer in self.answers],
            usage={
                "prompt_tokens": self.num_prompt_tokens,
                "completion_tokens": sum(answer.num_tokens for answer in self.answers),
            },
        )
        if self.result.set_running_or_notify_cancel():
            self.result.set_result(answered)


_Part = tuple[_Request, Sequence[tuple[ServedTask, list[int]]]]
"""Rows of a request that go into one batch: their tasks and prompts."""
