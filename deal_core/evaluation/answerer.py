"""Answer rows with one version on one base model, with one queue for all callers; the version can be swapped."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from peft import PeftModel

from deal_core.adapter import state as adapters
from deal_core.adapter.state import CANDIDATE_NAME, SavedAdapter, activate, load_adapter, read_adapter, swap_adapter
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
    on_piece: Callable[[Choice, ServedVersion, str], None] | None = None
    """Gets each piece of an answer as it comes, and the version with its number."""


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
    """Answers rows with one version at a time. Threads share its one model: rows that wait are answered as one batch.

    A thread that asks prepares the prompts of its own rows, next to all other threads. Then it computes the next batch
    if no other thread computes; it goes on until its own rows are answered.
    A swap comes before every batch. A swap interrupts the batch that is computed; its rows are answered by the new
    version.

    A second version, the candidate, may answer next to it, with an adapter of its own on the same base model. A batch
    has rows for one of the two. Rows in the background wait for all others, which also interrupt their batch.
    """

    retry_seconds = 60.0
    """Pause before a version that did not load is tried again."""

    def __init__(self, served: ServedVersion, base: BaseModel, folder: Path, version: str = UNKNOWN_VERSION) -> None:
        self._first = _Version(served, version, base.tokenizer)
        """The version that answers now."""
        self.held_base = base.sha256, base.quantize
        """The base model that is loaded, as `ServedVersion.held_base`."""
        self._changed = threading.Condition()
        self._holder: int | None = None
        """The thread that computes with the model or swaps the version."""
        self._num_swaps = 0
        """Swaps that wait or run."""
        self._is_ending = False
        self._is_stopped = False
        self._waiting: list[_Request] = []
        """Requests whose first prompts are prepared."""
        self._candidate: _Version | None = None
        self._is_background = False
        """Whether the batch that is computed is one in the background."""
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
        """One answer per row, in the rows' order; errors are those of `ask`."""
        return self.ask(rows).answers

    def ask(
        self,
        rows: Sequence[InputRow],
        is_given_up: Callable[[], bool] = lambda: False,
        *,
        by_candidate: bool = False,
        in_background: bool = False,
        sampling: Sampling | None = None,
    ) -> Answered:
        """Answer rows, all with the same version: with `by_candidate` the candidate. `sampling` has no effect.

        Once `is_given_up` returns True, the caller has gone, and the remaining rows are not answered. Rows
        `in_background` wait for all others.

        Raises:
            ConfigError: a row does not fit the version; then no row is answered.
            GivenUpError: the caller has gone, `drain` or `stop` was called, or there is no candidate.
        """
        del sampling  # an answer is the most likely one
        request = _Request(list(rows), is_given_up, by_candidate, in_background)
        try:
            while not request.is_done:
                self._prepare(request)
                if self._hold_for(request):
                    try:
                        self._answer_next()
                    finally:
                        self._give_back()
        finally:
            with self._changed:
                self._waiting = [other for other in self._waiting if other is not request]
        if request.error is not None:
            raise request.error
        assert request.version is not None
        answers, version = request.answers, request.version
        return Answered(
            [answer.text for answer in answers],
            version.served,
            version.number,
            [answer.confidence for answer in answers],
            is_cut=[answer.is_cut for answer in answers],
            usage={
                "prompt_tokens": request.num_prompt_tokens,
                "completion_tokens": sum(answer.num_tokens for answer in answers),
            },
        )

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
        with self._alone():
            if base is None or model is None:
                activate(self._model, self._name)
                swap_adapter(self._model, saved)
                self._name = self._model.active_adapter
            else:
                self._put_on(base, model)
                self._candidate = None
            tokenizer = self._first.tokenizer if base is None else base.tokenizer
            self._first, self.held_base = _Version(served, version, tokenizer), held_base
            for request in self._waiting:
                request.begin_again()

    def add_candidate(self, folder: Path, version: str) -> None:
        """Let a second version answer too, in place of an earlier candidate. Its files are read first.

        Raises:
            AdapterStateError: the folder cannot be served, or does not fit the base; then there is no candidate.
            ConfigError: the version needs another base model.
        """
        served, saved = _read(folder, self.held_base)
        with self._without_candidate():
            adapters.add_candidate(self._model, saved)
            self._candidate = _Version(served, version, self._first.tokenizer)

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

    def drain(self) -> None:
        """Give up the requests whose first prompts are still being prepared; answer those that wait for the model."""
        self._is_ending = True

    def stop(self) -> None:
        """Answer no more rows. Waiting callers get an error within one step of the model."""
        with self._changed:
            self._is_stopped = True
            self._changed.notify_all()

    def _put_on(self, base: BaseModel, model: PeftModel) -> None:
        base.tokenizer("")  # the first call sets the tokenizer up, which threads must not do at the same time
        self._model, self._name = model, model.active_adapter
        for blocks in base.model.modules():
            if isinstance(blocks, torch.nn.ModuleList):  # every transformers model holds its layers in one
                for block in blocks:
                    block.register_forward_pre_hook(self._interrupt_for_swap)
        self._max_rows = MAX_ROWS_CPU if next(model.parameters()).device.type == "cpu" else MAX_ROWS

    def _interrupt_for_swap(self, *_: Any) -> None:
        """Runs before every layer of the model, so that a batch ends soon."""
        if self._holder != threading.get_ident():
            return
        is_overtaken = self._is_background and any(
            request.prompts and not request.in_background for request in self._waiting
        )
        if self._num_swaps or self._is_stopped or is_overtaken:
            raise _InterruptedError

    def _prepare(self, request: _Request) -> None:
        """Prepare the next prompts of a request, in its own thread; the model is free for other requests meanwhile.

        Raises:
            ConfigError: a row does not fit the version.
            GivenUpError: see `ask`. Between two rows it is looked whether nobody waits for them any more.
        """
        while not request.is_done and request.lacks_prompts(self._max_rows):
            with self._changed:
                version = self._candidate if request.by_candidate else self._first
                begun, asked, num_ready = request.version, request.asked, len(request.answers) + len(request.prompts)
            if version is None:
                raise given_up()
            if not asked:  # all rows are checked before any is answered
                asked = []
                for number, row in enumerate(request.rows, 1):
                    self._heed_the_end(request)
                    asked.append(version.served.asked(row, number))
            prompts = []
            for task, text in asked[num_ready : num_ready + self._max_rows]:
                prompts.append(encode_prompt(version.tokenizer, task.schema, text, task.max_prompt_tokens))
                self._heed_the_end(request)
            with self._changed:
                is_current = version is (self._candidate if request.by_candidate else self._first)
                if not is_current or request.version is not begun:
                    continue  # another version answers now, and asks in its own way
                request.version, request.asked = version, asked
                request.prompts += prompts
                request.num_prompt_tokens += sum(map(len, prompts))
                request.is_done = not asked
                if not any(other is request for other in self._waiting):
                    self._waiting.append(request)

    def _heed_the_end(self, request: _Request) -> None:
        """Give a request up if nobody waits for it any more."""
        if self._is_stopped or (self._is_ending and request.version is None) or request.is_given_up():
            raise given_up()

    def _hold_for(self, request: _Request) -> bool:
        """Wait until the request is done, lacks prompts, or the model is free, which this thread then holds (True)."""

        def goes_on_without_model() -> bool:
            return request.is_done or request.lacks_prompts(self._max_rows)

        with self._changed:
            self._changed.wait_for(lambda: goes_on_without_model() or (self._holder is None and not self._num_swaps))
            if goes_on_without_model():
                return False
            self._holder = threading.get_ident()
            return True

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
            if self._is_stopped or request.is_given_up() or (request.by_candidate and self._candidate is None):
                request.end(given_up())
            elif num_left > 0 and request.prompts and (not batch or request.kind == batch[0][0].kind):
                batch.append((request, request.next_rows(num_left)))
                num_left -= len(batch[-1][1])
        if not batch:
            return
        by_candidate, self._is_background = batch[0][0].kind
        name = CANDIDATE_NAME if by_candidate else self._name
        if self._model.active_adapter != name:
            activate(self._model, name)
        try:
            self._answer_together(batch)
        except _InterruptedError:
            return
        with self._changed:  # requests that were served now go to the end of the queue
            answered = {id(request) for request, _ in batch}
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
                batch[0][0].end(error)

    def _generate(self, batch: Sequence[_Part]) -> None:
        """Answer the rows, each task's together, and give each request its own."""
        rows = [row for _, part in batch for row in part]
        answers: dict[int, GivenAnswer] = {}
        for task in dict.fromkeys(task for task, _ in rows):
            places = [place for place, (own_task, _) in enumerate(rows) if own_task == task]
            prompts = [rows[place][1] for place in places]
            # the tokenizer is the candidate's too: both are on one base model
            of_task = generation.answer_prompts(self._model, self._first.tokenizer, task, prompts)
            answers.update(zip(places, of_task, strict=True))
        in_order = iter([answers[place] for place in range(len(rows))])
        with self._changed:
            for request, part in batch:
                request.take(list(islice(in_order, len(part))))


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
    """A batch was interrupted by a waiting swap or by `stop`."""


class _Version(NamedTuple):
    """A version that answers."""

    served: ServedVersion
    number: str
    tokenizer: PreTrainedTokenizerBase


@dataclass
class _Request:
    """The rows of one caller, with their answers or their error."""

    rows: Sequence[InputRow]
    is_given_up: Callable[[], bool]
    by_candidate: bool = False
    in_background: bool = False
    version: _Version | None = None
    """The version that answers; None: no prompt is prepared yet."""
    asked: list[tuple[ServedTask, str]] = field(default_factory=list)
    """The rows in the form that the version is asked; empty before the first prompt."""
    prompts: list[list[int]] = field(default_factory=list)
    """Token ids of the prompts of the rows after the answered ones, for two or three batches at most."""
    num_prompt_tokens: int = 0
    """Tokens of the prompts that were prepared."""
    answers: list[GivenAnswer] = field(default_factory=list)
    """Answers to the first rows."""
    error: Exception | None = None
    is_done: bool = False

    @property
    def kind(self) -> tuple[bool, bool]:
        """By the candidate, in the background: requests of one kind can be in one batch."""
        return self.by_candidate, self.in_background

    def lacks_prompts(self, max_rows: int) -> bool:
        """Return whether prompts have to be prepared, for the batch after the next one at the latest."""
        num_left = len(self.rows) - len(self.answers)
        return self.version is None or len(self.prompts) < min(2 * max_rows, num_left)

    def next_rows(self, number: int) -> list[tuple[ServedTask, list[int]]]:
        """Return the tasks and prompts of the next rows that are prepared."""
        tasks = [task for task, _ in self.asked[len(self.answers) :][:number]]
        return list(zip(tasks, self.prompts[:number], strict=False))

    def take(self, answers: Sequence[GivenAnswer]) -> None:
        """Take the answers to the next rows."""
        self.answers += answers
        del self.prompts[: len(answers)]
        self.is_done = len(self.answers) == len(self.asked)

    def end(self, error: Exception) -> None:
        self.error, self.is_done = error, True

    def begin_again(self) -> None:
        """Drop the answers so far: another version answers now."""
        if not self.is_done:
            self.version, self.asked, self.prompts, self.answers = None, [], [], []
            self.num_prompt_tokens = 0


_Part = tuple[_Request, Sequence[tuple[ServedTask, list[int]]]]
"""Rows of a request that go into one batch: their tasks and prompts."""
