"""The versions of a lineage on vLLM servers: it answers rows as `Answerer` does, which holds the model itself.

Each version is loaded on every engine under a name that never stands for another adapter, since engines cache by name.
A thread per engine looks after it: an engine that is away gets no requests, and when it is back it gets its adapters
again. Before an engine answers, its base model has to be the lineage's.
"""

from __future__ import annotations

import logging
import math
import re
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from deal_core.adapter.files import PEFT_FILES, digests_of, sha256_together
from deal_core.base_model.fingerprint import MOST_APART, TEXT, apart
from deal_core.base_model.load import read_tokenizer
from deal_core.base_model.sources import tokenizer_folder
from deal_core.base_model.turn_ends import stop_ids, tokens_before_end
from deal_core.data.prompts import encode_prompt
from deal_core.errors import ConfigError
from deal_core.evaluation.answerer import Answered, Choice, GivenUpError, Sampling, given_up, load_base_of
from deal_core.evaluation.answering import InputRow, ServedTask, ServedVersion, read_served
from deal_core.evaluation.generation import answer_limit, confidence_of, first_tokens
from infra.fingerprints import Fingerprint, keep_fingerprint
from infra.serving.version_files import write_peft_folder
from infra.serving.vllm import EngineAwayError, EngineClient, EngineError, Piece
from infra.settings import EngineSettings, HomeSettings, ServingSettings
from infra.store.base import ObjectStore

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedTokenizerBase

LOOK_SECONDS = 2.0
"""Pause between two looks at an engine."""
LOOK_TIMEOUT = 10.0
"""Longest wait for an engine's list of models; it answers it in its event loop, however many requests wait."""
MAX_PROMPTS = 64
"""Prompts of one request to an engine."""
MAX_TOPS = 20
"""Most log-probabilities that a vLLM server gives for a token, unless it was started with another --max-logprobs."""
DIGEST_CHARS = 12
"""Characters of the digest at the end of the name of a copy."""
PASSED_ON = ("temperature", "top_p", "seed", "stop")
"""Settings of a request that the engine gets as they are."""
LOG = logging.getLogger("deal.serving")


class NoEngineError(GivenUpError):
    """No engine answers now."""

    code = "no-engine"


@dataclass(frozen=True, kw_only=True)
class OnEngine:
    """A version as engines know it."""

    served: ServedVersion
    number: str
    name: str
    """The adapter's name on the engines."""
    copy: Path
    """The adapter's folder."""
    path: str
    """The same folder, as the engines see it."""
    tokenizer: PreTrainedTokenizerBase
    fingerprint: Fingerprint

    @cached_property
    def answers(self) -> dict[str, _AnswerForm]:
        """How answers begin and end, by task."""
        return {
            task.schema.name: _AnswerForm(
                answer_limit(self.tokenizer, task.schema, task.max_new_tokens),
                first_tokens(self.tokenizer, task.schema),
            )
            for task in self.served.tasks
        }


class _AnswerForm(NamedTuple):
    """How an answer of a task begins and ends."""

    max_tokens: int
    first: Mapping[str, int]
    """What `first_tokens` returns."""


class Engines:
    """Answers rows with the versions of one lineage, on one or several engines.

    It has the methods of `Answerer` that `Champion` and `Rollout` call. `note` gets each message for the user.
    """

    retry_seconds = 5.0
    """Pause before a version that did not load is tried again."""

    def __init__(
        self,
        store: ObjectStore,
        lineage: str,
        urls: Sequence[str],
        settings: EngineSettings,
        note: Callable[[str], None],
    ) -> None:
        self._store, self._settings, self._note = store, settings, note
        self._own_names = re.compile(rf"{re.escape(lineage)}-v\d+-[0-9a-f]{{12}}")
        self._folder = adapter_folder(settings)
        self._first: OnEngine | None = None
        self._candidate: OnEngine | None = None
        self._changing = threading.Lock()
        self._coming: str | None = None
        """The adapter that is being loaded to answer."""
        self._retired: dict[str, float] = {}
        """Adapters of no use any more → since when (monotonic seconds)."""
        self._num_in_flight: Counter[str] = Counter()
        """Adapter → requests of this process that it answers."""
        self._is_stopped = threading.Event()
        self.is_away = False
        """Whether the last version did not load because no engine answered."""
        self._engines = [_Engine(EngineClient(url, settings)) for url in urls]
        self._threads = [
            threading.Thread(target=self._look_after, args=(engine,), name=f"engine {engine.shown}", daemon=True)
            for engine in self._engines
        ]
        for thread in self._threads:
            thread.start()

    @property
    def served(self) -> ServedVersion:
        """The facts of the version that answers now."""
        assert self._first is not None, "requests come after the champion was loaded"
        return self._first.served

    @property
    def version(self) -> str:
        """Number of the version that answers now."""
        assert self._first is not None, "requests come after the champion was loaded"
        return self._first.number

    def state(self) -> list[dict[str, str | None]]:
        """Return each engine's address, and why it gets no requests (None: it does)."""
        return [{"url": engine.shown, "problem": engine.problem} for engine in self._engines]

    def swap(self, folder: Path, number: str) -> None:
        """Let another version answer from now on; requests that have begun are answered by the version before.

        Raises:
            AdapterStateError: The folder cannot be served.
            ConfigError: The base model is not found here, or an engine has another one.
            EngineError: An engine refuses the adapter; the version before stays.
            NoEngineError: No engine answers.
        """
        with self._loaded(folder, number) as version, self._changing:
            before, self._first = self._first, version
        self._retire(before)

    def add_candidate(self, folder: Path, number: str) -> None:
        """Let a second version answer too, in place of an earlier candidate; errors are those of `swap`."""
        self.drop_candidate()
        with self._loaded(folder, number) as version, self._changing:
            self._candidate = version

    def drop_candidate(self) -> None:
        """Remove the candidate, if there is one."""
        with self._changing:
            before, self._candidate = self._candidate, None
        self._retire(before)

    def drain(self) -> None:
        """Begin to end. Requests that have begun are answered."""

    def stop(self) -> None:
        """Answer no more rows. Adapters stay loaded: other fronts may use them, and the next start does."""
        self._is_stopped.set()

    def ask(
        self,
        rows: Sequence[InputRow],
        is_given_up: Callable[[], bool] = lambda: False,
        *,
        by_candidate: bool = False,
        in_background: bool = False,
        sampling: Sampling | None = None,
    ) -> Answered:
        """Answer rows, all with the same version: with `by_candidate` the candidate.

        If the engine goes away before the first piece of an answer, another one is asked.

        Raises:
            ConfigError: A row does not fit the version, or the engine refuses a setting of `sampling`.
            EngineError: The engine failed.
            GivenUpError: The caller has gone, no engine answers, or there is no candidate.
        """
        del in_background  # the engine decides in which order it answers
        with self._in_flight(by_candidate) as version:
            asked = [version.served.asked(row, number) for number, row in enumerate(rows, 1)]
            answer = Completion(version, asked, sampling or Sampling(), is_given_up, self._is_stopped.is_set)
            for places in answer.batches():
                while not self._try(answer, places):
                    answer.begin_again(places)
            return answer.finished()

    def _try(self, answer: Completion, places: Sequence[int]) -> bool:
        """Let an engine answer some rows. False: it does not answer, and another one has to be asked."""
        with self._changing:
            free = [engine for engine in self._engines if engine.has(answer.version) and engine not in answer.left_out]
            if not free:
                raise NoEngineError(f"No engine answers now; ask again in a moment. {self._reasons(answer)}".strip())
            engine = min(free, key=lambda engine: engine.num_in_flight)
            engine.num_in_flight += 1
        try:
            answer.take(engine.client, places)
        except EngineAwayError as error:
            if error.status == 0:  # not busy, but gone
                engine.problem = str(error)
            if answer.has_begun:
                raise GivenUpError(f"{error} Ask again.") from None
            answer.left_out[engine] = str(error)
            return False
        except EngineError as error:
            if error.status == 404 and engine not in answer.renewed:  # it was started again, without its adapters
                answer.renewed.add(engine)
                self._load_again(engine, answer.version)
                return False
            if error.status in (400, 422):
                raise ConfigError(str(error)) from None
            raise
        finally:
            with self._changing:
                engine.num_in_flight -= 1
        return True

    def _load_again(self, engine: _Engine, version: OnEngine) -> None:
        """Load a version on an engine that was started again. If this fails, the engine gets no requests."""
        try:
            with engine.lock:
                engine.look()
                engine.load(version)
        except (EngineError, ConfigError) as error:
            engine.problem = str(error)

    def _reasons(self, answer: Completion | None = None) -> str:
        """Return why no engine answers, each reason once."""
        left_out = {} if answer is None else answer.left_out
        reasons = [engine.problem or left_out.get(engine, "") for engine in self._engines]
        return " ".join(dict.fromkeys(filter(None, reasons)))

    @contextmanager
    def _in_flight(self, by_candidate: bool) -> Iterator[OnEngine]:
        """Return the version that answers a request, whose adapter stays loaded meanwhile."""
        with self._changing:
            version = self._candidate if by_candidate else self._first
            if version is None or self._is_stopped.is_set():
                raise GivenUpError("The server is stopping, or the version is not tried any more; ask again.")
            self._num_in_flight[version.name] += 1
        try:
            yield version
        finally:
            with self._changing:
                self._num_in_flight[version.name] -= 1

    @contextmanager
    def _loaded(self, folder: Path, number: str) -> Iterator[OnEngine]:
        """Load a version on every engine that answers. It is not unloaded while the block puts it in its place."""
        served = read_served(folder)
        with self._changing:
            known = self._first
        if known is not None and known.served.held_base == served.held_base:
            tokenizer, fingerprint = known.tokenizer, known.fingerprint
        else:
            tokenizer, fingerprint = self._base_of(served)
        name = f"{served.lineage}-v{number}-{adapter_digest(folder)}"
        version = OnEngine(
            served=served,
            number=number,
            name=name,
            copy=self._folder / name,
            path=f"{self._settings.server_adapter_dir or self._folder}/{name}",
            tokenizer=tokenizer,
            fingerprint=fingerprint,
        )
        with self._changing:
            self._coming = name
            self._retired.pop(name, None)
        refusals: list[EngineError | ConfigError] = []
        try:
            copy_adapter(folder, version.copy)
            for engine in self._engines:
                try:
                    with engine.lock:
                        engine.load(version)
                except EngineAwayError as error:  # its thread loads the version when the engine is back
                    engine.problem = str(error)
                except (EngineError, ConfigError) as error:  # another engine may take it
                    refusals.append(error)
            is_loaded = any(engine.has(version) for engine in self._engines)
            self.is_away = not is_loaded and not refusals
            if not is_loaded:
                raise refusals[0] if refusals else NoEngineError(self._reasons())
            yield version
        finally:
            with self._changing:
                self._coming = None

    def _base_of(self, served: ServedVersion) -> tuple[PreTrainedTokenizerBase, Fingerprint]:
        """Return the tokenizer of a version's base model, and what tells that model from others.

        Only the first server of a base model loads it, if no evaluation has stored its fingerprint.
        """
        source, cache = ServingSettings().base_model or served.base_source, HomeSettings().cache_dir
        fingerprint = keep_fingerprint(self._store, *served.held_base, lambda: load_base_of(served, cache, source))
        if fingerprint is None:
            raise ConfigError(f"{served.base_name} is an encoder-decoder, which vLLM serves no adapters on.")
        tokenizer = read_tokenizer(tokenizer_folder(source, cache), source)
        if tuple(tokenizer(TEXT)["input_ids"]) != fingerprint.tokens:
            raise ConfigError(
                f"The tokenizer of {source} is not that of the version's base model {served.base_name}; set "
                "DEAL_BASE_MODEL to where the right one is."
            )
        return tokenizer, fingerprint

    def _look_after(self, engine: _Engine) -> None:
        """Keep an engine's state until `stop`: whether it answers, its base model, and what it has loaded."""
        told: str | None = None
        while not self._is_stopped.wait(LOOK_SECONDS):
            try:
                with engine.lock:
                    engine.look()
                    for version in self._wanted():
                        engine.load(version)
                    self._unload_retired(engine)
            except (EngineError, ConfigError) as error:
                engine.problem = str(error)
            except Exception as error:  # the thread must not end
                LOG.exception("Looking after an engine failed")
                engine.problem = f"{type(error).__name__}: {error}"
            if engine.problem != told:
                self._note(engine.problem or f"The engine at {engine.shown} answers.")
                told = engine.problem

    def _wanted(self) -> list[OnEngine]:
        with self._changing:
            return [version for version in (self._first, self._candidate) if version is not None]

    def _retire(self, version: OnEngine | None) -> None:
        with self._changing:
            if version is not None and version.name not in self._wanted_names():
                self._retired[version.name] = time.monotonic()

    def _wanted_names(self) -> set[str | None]:
        """Return the names of the adapters that answer or soon will. The caller holds the lock."""
        return {self._coming, *(version.name for version in (self._first, self._candidate) if version is not None)}

    def _unload_retired(self, engine: _Engine) -> None:
        """Unload the lineage's adapters that nobody has used for the time of grace, and remove their copies."""
        grace = self._settings.grace_seconds
        for name in sorted(filter(self._own_names.fullmatch, engine.loaded)):
            with self._changing:
                is_wanted = name in self._wanted_names()
                # Names that an earlier front has left get their time from now on, as that front may still answer.
                since = self._retired.setdefault(name, time.monotonic()) if not is_wanted else time.monotonic()
                is_due = time.monotonic() - since >= grace and not self._num_in_flight[name]
            if not is_wanted and is_due and self._first is not None:
                engine.client.unload(name)
                engine.loaded -= {name}
        with self._changing:
            names = {name for name, since in self._retired.items() if time.monotonic() - since >= grace}
            names -= {name for name in names if self._num_in_flight[name]}.union(*(e.loaded for e in self._engines))
            for name in names - self._wanted_names():
                shutil.rmtree(self._folder / name, ignore_errors=True)
                del self._retired[name]


@dataclass(eq=False)
class _Engine:
    """One engine. Its lock is held by whoever changes what it has loaded."""

    client: EngineClient
    lock: threading.Lock = field(default_factory=threading.Lock)
    problem: str | None = "The engine has not been asked yet."
    """Why it gets no requests; None: it answers."""
    loaded: frozenset[str] = frozenset()
    """Names of its adapters."""
    num_in_flight: int = 0
    base: str = ""
    """The name of its base model."""
    proved: frozenset[tuple[str, str]] = frozenset()
    """The base models (`ServedVersion.held_base`) that its base model has been compared with. Empty after it was
    away."""

    @property
    def shown(self) -> str:
        """Its address, without passwords."""
        return self.client.shown

    @property
    def is_there(self) -> bool:
        """Whether it answers."""
        return self.problem is None

    def has(self, version: OnEngine) -> bool:
        """Whether it can answer for a version: it is there, has its base model, and has loaded its adapter."""
        return self.is_there and version.name in self.loaded and version.served.held_base in self.proved

    def look(self) -> None:
        """Ask whether it answers, and what it has loaded."""
        was_away = not self.is_there
        try:
            models = self.client.models(seconds=LOOK_TIMEOUT)
        except EngineError:
            self.loaded = frozenset()
            raise
        base = self.client.base_of(models)
        if was_away or self.base != base:
            self.base, self.proved = base, frozenset()
        self.loaded = frozenset(name for name, (_, is_adapter) in models.items() if is_adapter)
        self.problem = None

    def load(self, version: OnEngine) -> None:
        """Load a version, if the engine has it not yet and has its base model."""
        if not self.base or not self.is_there:
            self.look()
        self._require_base(version)
        if version.name not in self.loaded:
            if adapter_digest(version.copy) != version.name.rpartition("-")[2]:
                raise EngineError(
                    f"{version.copy}, the copy of version {version.number}, is damaged; start deal serve again, which "
                    "makes a new one."
                )
            self.client.load(version.name, version.path)
            self.loaded |= {version.name}

    def _require_base(self, version: OnEngine) -> None:
        """Compare the engine's base model with the version's, once."""
        if version.served.held_base not in self.proved:
            require_base(self.client, self.base, version.fingerprint, version.served.base_name)
            self.proved |= {version.served.held_base}


def require_base(client: EngineClient, model: str, fingerprint: Fingerprint, wanted: str) -> None:
    """Raise ConfigError if an engine's base model `model` is not the one `wanted`, by what it makes of a fixed text."""
    try:
        distance = apart(fingerprint.log_probs, client.prompt_log_probs(model, fingerprint.tokens))
        how = f"their log-probabilities of a fixed text differ by {distance:.2f} on average (at most {MOST_APART:g})"
    except EngineError as error:
        if error.status != 400:  # its vocabulary lacks a token
            raise
        distance, how = math.inf, str(error).rstrip(".")
    if not distance <= MOST_APART:  # NaN is no proof
        quantize = fingerprint.quantize
        held = "" if quantize == "none" else f", quantized as train.quantize: {quantize} says"
        raise ConfigError(
            f"The engine at {client.shown} has the base model {model}, and the version needs {wanted}{held}: {how}. "
            f"Start the engine with the lineage's base model{held}.",
            code="other-base",
        )


class Completion:
    """The answers to the rows of one request, while they come."""

    def __init__(
        self,
        version: OnEngine,
        asked: Sequence[tuple[ServedTask, str]],
        sampling: Sampling,
        *ends: Callable[[], bool],
    ) -> None:
        self.version = version
        self._asked, self._sampling, self._ends = asked, sampling, ends
        self._num = sampling.num_answers
        self._parts: list[list[Piece]] = [[] for _ in range(len(asked) * self._num)]
        self._tokens: Counter[str] = Counter()
        self.has_begun = False
        """Whether the client has got a piece, so that no other engine can answer instead."""
        self.left_out: dict[_Engine, str] = {}
        """Engines that are not asked again, and why."""
        self.renewed: set[_Engine] = set()
        """Engines that did not know the adapter, and got it again."""

    def batches(self) -> Iterator[list[int]]:
        """Yield the numbers of rows that can be one request to an engine: of one task, and not too many."""
        for task in dict.fromkeys(task for task, _ in self._asked):
            places = [place for place, (own_task, _) in enumerate(self._asked) if own_task == task]
            for start in range(0, len(places), MAX_PROMPTS):
                yield places[start : start + MAX_PROMPTS]

    def begin_again(self, places: Sequence[int]) -> None:
        """Drop what an engine has answered that went away."""
        for place in places:
            for number in range(self._num):
                self._parts[place * self._num + number] = []

    def take(self, client: EngineClient, places: Sequence[int]) -> None:
        """Let an engine answer some rows, all of one task."""
        task = self._asked[places[0]][0]
        with self._given_up(), closing(client.complete(self._body(task, places), self._is_ended)) as pieces:
            for piece in pieces:
                if not isinstance(piece, Piece):
                    self._tokens.update({name: piece[name] for name in ("prompt_tokens", "completion_tokens")})
                    continue
                place, number = divmod(piece.place, self._num)
                index = places[place] * self._num + number
                self._parts[index].append(piece)
                if self._sampling.on_piece is not None:
                    self.has_begun = True
                    choice = self._choice(index, [piece])
                    if not any(part.text.strip() for part in self._parts[index][:-1]):  # an answer begins with a word
                        choice = choice._replace(text=choice.text.lstrip())
                    self._sampling.on_piece(choice, self.version.served, self.version.number)
        lacking = [place for place in places if not self._parts[place * self._num]]
        if lacking:
            raise EngineError(f"The engine at {client.shown} gave {len(lacking)} of {len(places)} rows no answer.")

    def _is_ended(self) -> bool:
        return any(is_ended() for is_ended in self._ends)

    @contextmanager
    def _given_up(self) -> Iterator[None]:
        """Tell an engine that went away from an answer that nobody waits for, whose connection was closed."""
        try:
            yield
        except EngineAwayError:
            if not self._is_ended():
                raise
            raise given_up() from None

    def finished(self) -> Answered:
        """Return the answers. The first one of each row is the one that the prediction log gets."""
        choices = [self._choice(index, parts) for index, parts in enumerate(self._parts)]
        if "stop" not in self._sampling.passed_on:  # the engine holds back the half of a character at the end
            choices = [
                choice._replace(text=self._text(parts)) for choice, parts in zip(choices, self._parts, strict=True)
            ]
        firsts = choices[:: self._num]
        texts = [choice.text.strip() for choice in firsts]
        confidences = []
        for place, text in enumerate(texts):
            parts = self._parts[place * self._num]
            log_probs = [value for part in parts for value in part.log_probs]
            first_top = next((top for part in parts for top in part.tops), {})
            form = self.version.answers[self._asked[place][0].schema.name]
            confidences.append(confidence_of(form.first, text, log_probs, first_top))
        return Answered(
            texts,
            self.version.served,
            self.version.number,
            confidences,
            is_cut=[choice.finish_reason == "length" for choice in firsts],
            choices=choices,
            usage=dict(self._tokens),
        )

    def _text(self, parts: Sequence[Piece]) -> str:
        tokenizer, tokens = self.version.tokenizer, [*_tokens(parts)]
        own = tokens[: tokens_before_end(tokens, stop_ids(tokenizer))]
        return str(tokenizer.decode(own, skip_special_tokens=True))

    def _body(self, task: ServedTask, places: Sequence[int]) -> dict[str, Any]:
        """Return the request to the engine. By default an answer is the most likely one."""
        tokenizer, form, wanted = self.version.tokenizer, self.version.answers[task.schema.name], self._sampling
        prompts = [
            encode_prompt(tokenizer, task.schema, self._asked[place][1], task.max_prompt_tokens) for place in places
        ]
        body: dict[str, Any] = {
            "model": self.version.name,
            "prompt": prompts,
            "max_tokens": form.max_tokens if wanted.max_tokens is None else wanted.max_tokens,
            "temperature": 0,
            **{name: value for name, value in wanted.passed_on.items() if value is not None},
            "ignore_eos": True,  # answers end as those of `generate`, whatever the engine's config says
            "stop_token_ids": stop_ids(tokenizer),
            "logprobs": wanted.num_tops or 0,
        }
        if self._num > 1:
            body["n"] = self._num
        if form.first:  # how sure the model is of a label follows from the labels' first tokens
            body["logprobs"] = MAX_TOPS
            if wanted.num_tops is None:  # releases that do not know the key give the likeliest tokens
                body["logprob_token_ids"] = sorted(set(form.first.values()))
        return body

    def _choice(self, index: int, parts: Sequence[Piece]) -> Choice:
        """Return an answer, or a piece of one, with the log-probabilities that the client wants."""
        log_probs = None
        if (num_tops := self._sampling.num_tops) is not None:
            tokenizer = self.version.tokenizer

            def decode(token: int) -> str:
                return str(tokenizer.decode([token]))

            log_probs = [
                (
                    decode(token),
                    value,
                    [(decode(other), top[other]) for other in sorted(top, key=top.__getitem__)[::-1][:num_tops]],
                )
                for part in parts
                for token, value, top in zip(part.tokens, part.log_probs, part.tops, strict=True)
            ]
        return Choice(
            place=index,
            text="".join(part.text for part in parts),
            finish_reason=parts[-1].finish_reason if parts else None,
            log_probs=log_probs,
        )


def _tokens(parts: Sequence[Piece]) -> Iterator[int]:
    for part in parts:
        yield from part.tokens


def adapter_folder(settings: EngineSettings) -> Path:
    """Return the folder of this machine for adapters that engines read."""
    return settings.adapter_dir or HomeSettings().home / "engine-adapters"


def adapter_digest(folder: Path) -> str:
    """Return what tells the PEFT files of a folder from others."""
    return sha256_together(digests_of(folder, PEFT_FILES))[:DIGEST_CHARS]


def copies_of(lineage: str, number: str) -> list[Path]:
    """Return the copies of a version on this machine."""
    return [*adapter_folder(EngineSettings()).glob(f"{lineage}-v{number}-{'?' * DIGEST_CHARS}")]


def copy_adapter(folder: Path, target: Path) -> None:
    """Copy the two PEFT files of a version to a new folder, which appears at once and complete.

    A copy that is there stays, if it is undamaged.
    """
    if target.exists():
        if digests_of(target, PEFT_FILES) == digests_of(folder, PEFT_FILES):
            return
        shutil.rmtree(target)
    write_peft_folder(folder, target)
