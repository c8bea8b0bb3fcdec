"""The versions of a lineage on vLLM servers: it answers rows as `Answerer` does, which holds the model itself.

Each version is loaded on every engine under a name that never stands for another adapter, since engines cache by name.
A task per engine looks after it: an engine that is away gets no requests, and when it is back it gets its adapters
again. Before an engine answers, its base model has to be the lineage's, and it has to apply the adapter.

All of it runs in one event loop, which alone changes the state here. The methods that load a version are called in
other threads, since they read files and may load a base model.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import math
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import aclosing, contextmanager, suppress
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
from deal_core.evaluation.answerer import Answered, Choice, GivenUpError, Pieces, Sampling, given_up, load_base_of
from deal_core.evaluation.answering import InputRow, ServedTask, ServedVersion, read_served
from deal_core.evaluation.generation import answer_limit, confidence_of, first_tokens
from deal_core.evaluation.proof import Proof, read_proof
from infra.fingerprints import Fingerprint, keep_fingerprint
from infra.serving.tracing import note as note_on_trace
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
FRONT_SECONDS = 15.0
"""A front that runs touches what it uses within this time: it is longer than a pause and a look together."""
MAX_PROMPTS = 64
"""Prompts of one request to an engine."""
MAX_TOPS = 20
"""Most log-probabilities that a vLLM server gives for a token, unless it was started with another --max-logprobs."""
DIGEST_CHARS = 12
"""Characters of the digest at the end of the name of a copy."""
LONG_CHARS = 8_192
"""Texts of more characters are made prompts in a thread, so that the event loop goes on."""
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
    proof: Proof | None = None
    """What tells an engine that applies the adapter; None: the version was stored without it."""

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

    It has the methods of `Answerer` that `Champion` and `Rollout` call. `note` gets each message for the user. `async
    with` looks after the engines while the block runs.
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
        self._coming: OnEngine | None = None
        """The version that is being loaded."""
        self._num_in_flight: Counter[str] = Counter()
        """Adapter → requests of this process that it answers."""
        self._is_stopped = False
        self.is_away = False
        """Whether the last version did not load because no engine answered."""
        self._noted: set[str] = set()
        """What was said of proofs."""
        self._engines = [_Engine(EngineClient(url, settings), self._note_once) for url in urls]
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Engines:
        self._loop = asyncio.get_running_loop()
        self._tasks = [asyncio.create_task(self._look_after(engine)) for engine in self._engines]
        return self

    async def __aexit__(self, *_: object) -> None:
        self.stop()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for engine in self._engines:
            await engine.client.close()

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
            ConfigError: The base model is not found here, or an engine has another one, or does not apply the adapter.
            EngineError: An engine refuses the adapter; the version before stays.
            NoEngineError: No engine answers.
        """
        self._in_loop(self._load(folder, self._read(folder, number)))

    def add_candidate(self, folder: Path, number: str) -> None:
        """Let a second version answer too, in place of an earlier candidate; errors are those of `swap`."""
        self.drop_candidate()
        self._in_loop(self._load(folder, self._read(folder, number), is_candidate=True))

    def drop_candidate(self) -> None:
        """Remove the candidate, if there is one."""
        self._candidate = None

    def drain(self) -> None:
        """Begin to end. Requests that have begun are answered."""

    def stop(self) -> None:
        """Answer no more rows. Adapters stay loaded: other fronts may use them, and the next start does."""
        self._is_stopped = True

    async def reply(
        self,
        rows: Sequence[InputRow],
        *,
        by_candidate: bool = False,
        in_background: bool = False,
        sampling: Sampling | None = None,
    ) -> Answered:
        """Answer rows, all with the same version: with `by_candidate` the candidate.

        If the engine goes away before the first piece of an answer, another one is asked. If the task is cancelled, the
        engine gives the request up.

        Raises:
            ConfigError: A row does not fit the version, or the engine refuses a setting of `sampling`.
            EngineError: The engine failed.
            GivenUpError: No engine answers, there is no candidate, or the server is stopping.
        """
        del in_background  # the engine decides in which order it answers
        with self._in_flight(by_candidate) as version:
            asked = [version.served.task_and_input(row, number) for number, row in enumerate(rows, 1)]
            answer = Completion(version, asked, sampling or Sampling())
            for places in answer.batches():
                while not await self._try(answer, places):
                    answer.begin_again(places)
            return answer.finished()

    async def _try(self, answer: Completion, places: Sequence[int]) -> bool:
        """Let an engine answer some rows. False: it does not answer, and another one has to be asked."""
        free = [engine for engine in self._engines if engine.has(answer.version) and engine not in answer.left_out]
        if not free:
            raise NoEngineError(f"No engine answers now; ask again in a moment. {self._reasons(answer)}".strip())
        engine = min(free, key=lambda engine: engine.num_in_flight)
        engine.num_in_flight += 1
        note_on_trace(engine=engine.shown)
        try:
            await answer.take(engine.client, places)
        except EngineAwayError as error:
            if error.status == 0:  # not busy, but gone
                engine.problem = str(error)
            if answer.pieces is not None and answer.pieces.have_come:
                raise GivenUpError(f"{error} Ask again.") from None
            answer.left_out[engine] = str(error)
            return False
        except EngineError as error:
            if error.status == 404 and engine not in answer.renewed:  # it was started again, without its adapters
                answer.renewed.add(engine)
                await self._load_again(engine, answer.version)
                return False
            if error.status in (400, 422):
                raise ConfigError(str(error)) from None
            raise
        finally:
            engine.num_in_flight -= 1
        return True

    async def _load_again(self, engine: _Engine, version: OnEngine) -> None:
        """Load a version on an engine that was started again. If this fails, the engine gets no requests."""
        try:
            async with engine.lock:
                await engine.look()
                await engine.load(version)
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
        version = self._candidate if by_candidate else self._first
        if version is None or self._is_stopped:
            raise GivenUpError("The server is stopping, or the version is not tried any more; ask again.")
        self._num_in_flight[version.name] += 1
        try:
            yield version
        finally:
            self._num_in_flight[version.name] -= 1

    def _in_loop(self, loading: Coroutine[Any, Any, None]) -> None:
        """Run a coroutine in the event loop, and wait for it in this thread."""
        assert self._loop is not None, "the engines are looked after"
        if self._is_stopped:
            loading.close()
            raise given_up()
        try:
            asyncio.run_coroutine_threadsafe(loading, self._loop).result()
        except concurrent.futures.CancelledError:
            raise given_up() from None

    def _read(self, folder: Path, number: str) -> OnEngine:
        """Return the version in a folder, as engines will know it."""
        served, first = read_served(folder), self._first
        if first is not None and first.served.held_base == served.held_base:
            tokenizer, fingerprint = first.tokenizer, first.fingerprint
        else:
            tokenizer, fingerprint = self._base_of(served)
        name = f"{served.lineage}-v{number}-{adapter_digest(folder)}"
        return OnEngine(
            served=served,
            number=number,
            name=name,
            copy=self._folder / name,
            path=f"{self._settings.server_adapter_dir or self._folder}/{name}",
            tokenizer=tokenizer,
            fingerprint=fingerprint,
            proof=read_proof(folder),
        )

    async def _load(self, folder: Path, version: OnEngine, *, is_candidate: bool = False) -> None:
        """Load a version on every engine that answers, and let it answer then."""
        self._coming = version
        refusals: list[EngineError | ConfigError] = []
        try:
            await asyncio.to_thread(touch, version.copy)  # it may be there since long ago
            await asyncio.to_thread(copy_adapter, folder, version.copy)
            for engine in self._engines:
                try:
                    async with engine.lock:
                        await engine.load(version)
                except EngineAwayError as error:  # its task loads the version when the engine is back
                    engine.problem = str(error)
                except (EngineError, ConfigError) as error:  # another engine may take it
                    refusals.append(error)
            is_loaded = any(engine.has(version) for engine in self._engines)
            self.is_away = not is_loaded and not refusals
            if not is_loaded:
                raise refusals[0] if refusals else NoEngineError(self._reasons())
            if is_candidate:
                self._candidate = version
            else:
                self._first = version
        finally:
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

    async def _look_after(self, engine: _Engine) -> None:
        """Keep an engine's state: whether it answers, its base model, and what it has loaded and applies."""
        told: str | None = None
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            try:
                async with engine.lock:
                    await engine.look()
                    for version in filter(None, (self._first, self._candidate)):
                        await engine.load(version)
                    await self._unload_unused(engine)
            except (EngineError, ConfigError) as error:
                engine.problem = str(error)
            except Exception as error:  # the task must not end
                LOG.exception("Looking after an engine failed")
                engine.problem = f"{type(error).__name__}: {error}"
            if engine.problem != told:
                self._note(engine.problem or f"The engine at {engine.shown} answers.")
                told = engine.problem

    def _note_once(self, text: str) -> None:
        if text not in self._noted:
            self._note(text)
        self._noted.add(text)

    def _in_use(self) -> set[str]:
        """Return the names of the adapters that answer, soon will, or still do."""
        versions = filter(None, (self._first, self._candidate, self._coming))
        return {version.name for version in versions} | {name for name, number in self._num_in_flight.items() if number}

    async def _unload_unused(self, engine: _Engine) -> None:
        """Unload the lineage's adapters that no front has used for the time of grace, and remove their copies.

        Fronts that share a folder of copies tell each other there what they use: each touches its own at every look.
        """
        unused = await asyncio.to_thread(self._unused, self._in_use(), engine.loaded)
        for name in sorted(unused - self._in_use()):
            if name in engine.loaded:
                await engine.unload(name)
            if not any(name in other.loaded for other in self._engines):
                await asyncio.to_thread(shutil.rmtree, self._folder / name, ignore_errors=True)

    def _unused(self, in_use: set[str], loaded: frozenset[str]) -> set[str]:
        """Touch the copies that are in use; return the names of the lineage's adapters that nobody has touched."""
        for name in in_use:
            touch(self._folder / name)
        copies = {path.name for path in self._folder.glob("*-v*")}
        own = {name for name in (copies | loaded) - in_use if self._own_names.fullmatch(name)}
        oldest = time.time() - max(self._settings.grace_seconds, FRONT_SECONDS)
        return {name for name in own if touched_at(self._folder / name) <= oldest}


@dataclass(eq=False)
class _Engine:
    """One engine. Its lock is held by whoever changes what it has loaded."""

    client: EngineClient
    note: Callable[[str], None]
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    problem: str | None = "The engine has not been asked yet."
    """Why it gets no requests; None: it answers."""
    loaded: frozenset[str] = frozenset()
    """Names of its adapters."""
    num_in_flight: int = 0
    base: str = ""
    """The name of its base model."""
    is_base_of: frozenset[tuple[str, str]] = frozenset()
    """The base models (`ServedVersion.held_base`) that its base model was found to be since it was away."""
    applied: frozenset[str] = frozenset()
    """Names of the adapters that it was found to apply since it was away."""

    @property
    def shown(self) -> str:
        """Its address, without passwords."""
        return self.client.shown

    @property
    def is_there(self) -> bool:
        """Whether it answers."""
        return self.problem is None

    def has(self, version: OnEngine) -> bool:
        """Whether it can answer for a version: it is there, has its base model, and applies its adapter."""
        return (
            self.is_there and version.name in self.loaded & self.applied and version.served.held_base in self.is_base_of
        )

    async def look(self) -> None:
        """Ask whether it answers, and what it has loaded."""
        was_away = not self.is_there
        try:
            models = await self.client.models(seconds=LOOK_TIMEOUT)
        except EngineError:
            self.loaded = frozenset()
            raise
        base = self.client.base_of(models)
        self.loaded = frozenset(name for name, (_, is_adapter) in models.items() if is_adapter)
        if was_away or self.base != base or not self.applied <= self.loaded:  # it was started again
            self.base, self.is_base_of, self.applied = base, frozenset(), frozenset()
        self.problem = None

    async def load(self, version: OnEngine) -> None:
        """Load a version if the engine has it not yet. It must have the version's base model, and apply the adapter."""
        if not self.base or not self.is_there:
            await self.look()
        if version.served.held_base not in self.is_base_of:
            await require_base(self.client, self.base, version.fingerprint, version.served.base_name)
            self.is_base_of |= {version.served.held_base}
        if version.name not in self.loaded:
            if await asyncio.to_thread(adapter_digest, version.copy) != version.name.rpartition("-")[2]:
                raise EngineError(
                    f"{version.copy}, the copy of version {version.number}, is damaged; start deal serve again, which "
                    "makes a new one."
                )
            await self.client.load(version.name, version.path)
            self.loaded |= {version.name}
        if version.name not in self.applied:
            if doubt := await require_applied(self.client, self.base, version):
                self.note(doubt)
            self.applied |= {version.name}

    async def unload(self, name: str) -> None:
        """Unload an adapter."""
        await self.client.unload(name)
        self.loaded -= {name}
        self.applied -= {name}


async def require_base(client: EngineClient, model: str, fingerprint: Fingerprint, wanted: str) -> None:
    """Raise ConfigError if an engine's base model `model` is not the one `wanted`, by what it makes of a fixed text."""
    try:
        tokens = fingerprint.tokens
        log_probs = await client.log_probs(model, [(tokens[:place], tokens[place]) for place in range(1, len(tokens))])
        distance = apart(fingerprint.log_probs, log_probs)
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


async def require_applied(client: EngineClient, base: str, version: OnEngine) -> str | None:
    """Ask an engine for the proof that it applies a version's adapter. Return what is in doubt; None: it applies it.

    Raises:
        ConfigError: It ignores the adapter ("adapter-ignored"), or applies something else ("other-adapter").
    """
    if version.proof is None:
        return (
            f"Version {version.number} was stored without a proof of its adapter, so nobody knows whether "
            f"{client.shown} applies it. A new version will have one."
        )
    verdict, residual = version.proof.judge(
        *[await client.log_probs(model, version.proof.asked) for model in (version.name, base, base)]
    )
    if verdict == "too small":
        return (
            f"The adapter of version {version.number} changes its base model too little to prove that {client.shown} "
            "applies it."
        )
    distance = f"what it changes is {residual:.2f} away from what was measured at the evaluation"
    if verdict == "ignored":
        raise ConfigError(
            f"The engine at {client.shown} ignores the adapter of version {version.number}: {distance}. Its release "
            "may not apply adapters to this model; start another one.",
            code="adapter-ignored",
        )
    if verdict == "otherwise":
        raise ConfigError(
            f"The engine at {client.shown} applies something else than the adapter of version {version.number}: "
            f"{distance}. Start the engine again.",
            code="other-adapter",
        )
    return None


class Completion:
    """The answers to the rows of one request, while they come."""

    def __init__(self, version: OnEngine, asked: Sequence[tuple[ServedTask, str]], sampling: Sampling) -> None:
        self.version = version
        self._asked, self._sampling = asked, sampling
        self._num, self.pieces = sampling.num_answers, sampling.pieces
        self._parts: list[list[Piece]] = [[] for _ in range(len(asked) * self._num)]
        self._tokens: Counter[str] = Counter()
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

    async def take(self, client: EngineClient, places: Sequence[int]) -> None:
        """Let an engine answer some rows, all of one task."""
        body = await self._body(places)
        if self.pieces is None:
            for piece in await client.complete(body):
                self._keep(piece, places)
        else:
            async with aclosing(client.stream(body)) as pieces:
                async for piece in pieces:
                    if (index := self._keep(piece, places)) is not None:
                        await self._send(index, self.pieces)
        lacking = [place for place in places if not self._parts[place * self._num]]
        if lacking:
            raise EngineError(f"The engine at {client.shown} gave {len(lacking)} of {len(places)} rows no answer.")

    def _keep(self, piece: Piece | Mapping[str, int], places: Sequence[int]) -> int | None:
        """Keep a piece, and return the number of its answer; None: it was the numbers of tokens."""
        if not isinstance(piece, Piece):
            self._tokens.update({name: piece[name] for name in ("prompt_tokens", "completion_tokens")})
            return None
        place, number = divmod(piece.place, self._num)
        index = places[place] * self._num + number
        self._parts[index].append(piece)
        return index

    async def _send(self, index: int, pieces: Pieces) -> None:
        """Send the client the last piece of an answer."""
        pieces.have_come = True
        choice = self._choice(index, self._parts[index][-1:])
        if not any(part.text.strip() for part in self._parts[index][:-1]):  # an answer begins with a word
            choice = choice._replace(text=choice.text.lstrip())
        await pieces.send(choice, self.version.served, self.version.number)

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

    async def _body(self, places: Sequence[int]) -> dict[str, Any]:
        """Return the request to the engine for rows of one task. By default an answer is the most likely one."""
        task, texts = self._asked[places[0]][0], [self._asked[place][1] for place in places]
        tokenizer, form, wanted = self.version.tokenizer, self.version.answers[task.schema.name], self._sampling

        def encode() -> list[list[int]]:
            return [encode_prompt(tokenizer, task.schema, text, task.max_prompt_tokens) for text in texts]

        prompts = encode() if sum(map(len, texts)) <= LONG_CHARS else await asyncio.to_thread(encode)
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


def touch(copy: Path) -> None:
    """Say that a copy is in use now."""
    with suppress(FileNotFoundError):
        os.utime(copy)


def touched_at(copy: Path) -> float:
    """Return when a front has last used a copy (seconds of the epoch); 0: the copy is gone."""
    try:
        return copy.stat().st_mtime
    except FileNotFoundError:
        return 0.0
