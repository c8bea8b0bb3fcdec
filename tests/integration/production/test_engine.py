"""`deal serve --engine`: the front before a stand-in for vLLM that computes (tests/fake_vllm.py), with a real store."""

from __future__ import annotations

import asyncio
import json
import math
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any, NamedTuple, cast

import httpx
import pytest
import torch
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from benchmarks.speed.serving import served as deal_serve
from deal_core.adapter.files import PEFT_FILES, PROOF_FILE, WEIGHTS_FILE, digests_of
from deal_core.base_model.load import load_base
from deal_core.data.schema import TaskSchema
from deal_core.errors import ConfigError
from deal_core.evaluation.answerer import Answered, load_answerer
from deal_core.evaluation.answering import SERVED_FILE, InputRow, ServedTask, ServedVersion
from deal_core.evaluation.proof import Proof, make_proof
from deal_core.judging_config import RolloutKind, RolloutTerms
from infra.predictions import read_predictions
from infra.serving import champion as champions
from infra.serving import engines as engines_module
from infra.serving import prediction_log
from infra.serving.champion import Champion, ServingError
from infra.serving.engines import Engines, NoEngineError
from infra.serving.prediction_log import PredictionLog
from infra.serving.version_files import SERVED_FILES
from infra.settings import EngineSettings
from infra.store.format import write_format
from infra.store.opening import open_store
from tests.fake_vllm import NOTHING, WAIT_SECONDS, FakeVllm, running
from tests.served import following
from tests.stored_versions import move, store_version
from tests.waiting import wait_for

TASKS = (
    TaskSchema(name="bank", labels=("card lost", "card stolen", "balance"), instruction="What is it about?"),
    TaskSchema(name="notes", format="completion"),
    TaskSchema(name="talk", format="chat"),
)
CHAT = [{"role": "user", "content": "My card was stolen."}]
ROWS = [
    InputRow("I lost my card.", "bank"),
    InputRow("The parcel", "notes"),
    InputRow("How much is there?", "bank"),
    InputRow(json.dumps(CHAT), "talk"),
    InputRow("A note on", "notes"),
]
GRACE_SECONDS = 0.3
Alone = Callable[[str], Answered]


@pytest.fixture(autouse=True)
def quick(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Short pauses between looks. The embedded model is exact."""
    monkeypatch.setenv("DEAL_SERVING_PRECISION", "fp32")
    for owner, name in (
        (engines_module, "LOOK_SECONDS"),
        (engines_module, "FRONT_SECONDS"),
        (Engines, "retry_seconds"),
        (champions, "POLL_SECONDS"),
        (prediction_log, "BATCH_SECONDS"),
    ):
        monkeypatch.setattr(owner, name, 0.05)


@pytest.fixture(scope="module")
def folders(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folders of four versions that answer differently. The rank of version 4 is 32."""
    root = tmp_path_factory.mktemp("versions")
    base = load_base(str(tiny_base), root / "cache", precision="fp32")
    served = ServedVersion(
        lineage="l",
        base_source=str(tiny_base),
        base_name="tiny",
        base_sha256=base.sha256,
        tasks=tuple(ServedTask(schema=task, max_prompt_tokens=96, max_new_tokens=8) for task in TASKS),
        newest_task="talk",
    )
    for number in range(1, 5):
        torch.manual_seed(number)
        rank = 32 if number == 4 else 4
        config = LoraConfig(
            r=rank, lora_alpha=8 * rank, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM",
            init_lora_weights=False,
        )  # fmt: skip
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_base), config)
        model.save_pretrained(root / str(number))
        (root / str(number) / SERVED_FILE).write_text(json.dumps(served.to_json()))
        proof = make_proof(cast(PeftModel, model), base.tokenizer, served.tasks)
        assert proof is not None
        (root / str(number) / PROOF_FILE).write_text(json.dumps(proof.to_json()))
    return {str(number): root / str(number) for number in range(1, 5)}


@pytest.fixture(scope="module")
def alone(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Alone:
    """What the embedded model gives to ROWS with a version."""
    cache, known = tmp_path_factory.mktemp("cache"), dict[str, Answered]()

    def ask(number: str) -> Answered:
        if number not in known:
            known[number] = load_answerer(folders[number], cache, precision="fp32", version=number).ask(ROWS)
        return known[number]

    assert ask("1").answers[1] != ask("2").answers[1] and ask("1").confidences != ask("2").confidences
    return ask


@pytest.fixture
def register(folders: dict[str, Path]) -> Callable[..., None]:
    """Register versions 1 to 4, and make 1 champion. A version may be in rollout."""

    def make(kind: RolloutKind | None = None) -> None:
        write_format(open_store())
        for number, folder in folders.items():
            files = {name: (folder / name).read_bytes() for name in (*SERVED_FILES, PROOF_FILE)}
            terms = RolloutTerms(kind, 1.0, 200, 10.0, 0.95) if kind and number == "2" else None
            parent = "1" if number == "2" else None
            store_version(open_store(), files, uri=f"adapters/l/run-{number}", parent_version=parent, rollout=terms)
        move(open_store(), "1")

    return make


@pytest.fixture
def engine(tiny_base: Path, register: Callable[..., None]) -> Iterator[FakeVllm]:
    """An engine that runs, and registered versions."""
    register()
    fake = FakeVllm(tiny_base)
    with running(fake):
        yield fake


class Front(NamedTuple):
    """`deal serve` in this process."""

    url: str
    champion: Champion
    engines: Engines
    said: list[str]
    loop: asyncio.AbstractEventLoop

    def answer(self, rows: Sequence[InputRow]) -> Answered:
        """Ask without HTTP."""
        return asyncio.run_coroutine_threadsafe(self.champion.ask(rows), self.loop).result(WAIT_SECONDS)

    def ask(self, **changes: Any) -> httpx.Response:
        """Ask for a note, or something else."""
        return httpx.post(f"{self.url}/v1/completions", json=note(**changes), timeout=WAIT_SECONDS)

    def state(self) -> dict[str, Any]:
        return dict(httpx.get(f"{self.url}/version").json())

    def name(self) -> str:
        """The adapter of the version that answers."""
        assert self.engines._first is not None
        return self.engines._first.name

    def is_served_by(self, fake: FakeVllm) -> bool:
        """Whether an engine has the version that answers, and has proven that it applies it."""
        first = self.engines._first
        return first is not None and any(own.has(first) for own in self.engines._engines if own.shown == fake.url)


def note(**changes: Any) -> dict[str, Any]:
    return {"model": "l/notes", "prompt": ROWS[1].input, **changes}


@contextmanager
def front(*engines: FakeVllm, said: list[str] | None = None, **settings: Any) -> Iterator[Front]:
    """`deal serve` before engines, with a prediction log. `said` gets its messages."""
    store, said = open_store(), [] if said is None else said
    log = PredictionLog(store, "l", keeps_texts=True, retention_days=30)
    known = EngineSettings(**{"grace_seconds": GRACE_SECONDS, **settings})
    on_engines = Engines(store, "l", [each.url for each in engines], known, said.append)
    champion = Champion(store, "l", said.append, log, on_engines)
    log.start()
    try:
        with following(champion, Path(store.uri.removeprefix("file://")).parent / "serve.log") as (port, loop):
            yield Front(f"http://127.0.0.1:{port}", champion, on_engines, said, loop)
    finally:
        log.close()


def events_of(answer: httpx.Response) -> Iterator[dict[str, Any]]:
    for line in answer.iter_lines():
        if line.startswith("data: {"):
            yield json.loads(line.removeprefix("data: "))


@contextmanager
def streaming(front: Front, **changes: Any) -> Iterator[tuple[httpx.Response, Iterator[dict[str, Any]]]]:
    path = "chat/completions" if "messages" in changes else "completions"
    body = {"model": "l/talk", **changes} if "messages" in changes else note(**changes)
    url = f"{front.url}/v1/{path}"
    with httpx.stream("POST", url, json={**body, "stream": True}, timeout=WAIT_SECONDS) as answer:
        yield answer, events_of(answer)


def logged(**kinds: Any) -> list[dict[str, Any]]:
    return read_predictions(open_store(), "l", **kinds).to_dict("records")  # type: ignore[return-value]


@pytest.mark.parametrize("number", ["1", "2"])
def test_answers_and_confidences_are_those_of_the_embedded_model(engine: FakeVllm, alone: Alone, number: str) -> None:
    if number != "1":
        move(open_store(), number)
    wanted = alone(number)
    with front(engine) as found:
        answered = found.answer(ROWS)
        rows = [{"input": row.input, "task": row.task} for row in ROWS]
        table = httpx.post(f"{found.url}/invocations", json={"dataframe_records": rows}, timeout=WAIT_SECONDS)
    assert (answered.answers, answered.version, answered.is_cut) == (wanted.answers, number, wanted.is_cut)
    for own, other in zip(answered.confidences, wanted.confidences, strict=True):
        assert own.confidence == pytest.approx(other.confidence, abs=1e-4)
        assert own.label_mass == (None if other.label_mass is None else pytest.approx(other.label_mass, abs=1e-4))
    assert [row["output"] for row in table.raise_for_status().json()["predictions"]] == wanted.answers
    assert table.headers["X-Deal-Version"] == number
    asked = [body for body in engine.bodies if isinstance(body["prompt"][0], list)]
    assert {len(body["prompt"]) for body in asked} == {1, 2}, "rows of one task are one request"


def test_settings_of_a_request_reach_the_engine(engine: FakeVllm, alone: Alone) -> None:
    _, whole, _, chat, _ = alone("1").answers
    with front(engine) as found:
        plain = found.ask()
        assert plain.headers["X-Deal-Version"] == "1" and plain.json()["model"] == "l@1"
        assert plain.json()["choices"][0]["text"] == whole and plain.json()["usage"]["completion_tokens"] > 0
        talk = {"model": "l/talk", "messages": CHAT, "logprobs": True, "top_logprobs": 2}
        talked = httpx.post(f"{found.url}/v1/chat/completions", json=talk, timeout=WAIT_SECONDS).json()["choices"][0]
        assert talked["message"] == {"role": "assistant", "content": chat}
        tokens = talked["logprobs"]["content"]
        assert all(len(token["top_logprobs"]) == 2 and token["logprob"] <= 0 for token in tokens)
        assert tokens[0]["token"] == tokens[0]["top_logprobs"][0]["token"]
        assert tokens[0]["logprob"] == tokens[0]["top_logprobs"][0]["logprob"]

        several = found.ask(n=3, temperature=0.5, prompt=[ROWS[1].input, ROWS[4].input]).json()["choices"]
        assert [choice["index"] for choice in several] == [*range(6)]
        assert [choice["text"] for choice in several] == [whole] * 3 + [alone("1").answers[4]] * 3
        assert len({choice["id"] for choice in several}) == 2, "answers to a row have its id"
        short = found.ask(max_tokens=2).json()
        assert short["usage"]["completion_tokens"] == 2 and short["choices"][0]["finish_reason"] == "length"
        assert short["choices"][0]["text"] == whole[: len(short["choices"][0]["text"])] != whole
        stopped = found.ask(stop=whole[3], top_p=0.5, seed=7).json()["choices"][0]
        assert (stopped["text"], stopped["finish_reason"]) == (whole[: whole.index(whole[3])].strip(), "stop")
        assert (engine.bodies[-1]["top_p"], engine.bodies[-1]["seed"]) == (0.5, 7)
        scored = found.ask(logprobs=3).json()["choices"][0]["logprobs"]
        assert "".join(scored["tokens"]).strip() == whole
        assert {len(top) for top in scored["top_logprobs"]} <= {2, 3}, "two halves of characters have one text"
        by_label = found.ask(model="l/bank", logprobs=1).json()["choices"][0]["logprobs"]
        assert {len(top) for top in by_label["top_logprobs"]} == {1}
        wait_for(lambda: len(logged()) == 8)
        engine.end_after = 3
        ended = found.answer(ROWS[1:2])
        assert (ended.is_cut, ended.usage["completion_tokens"]) == ([False], 4) and whole.startswith(ended.answers[0])
        scored = found.ask(logprobs=0).json()["choices"][0]["logprobs"]
        values = scored["token_logprobs"]
        assert len(values) == 4 and scored["tokens"][3] == "<|im_end|>"
        assert ended.confidences[0].confidence == pytest.approx(sum(map(math.exp, values)) / 4, abs=1e-4)
    assert plain.json()["id"] == f"cmpl-{logged()[0]['id']}"


WRONG: tuple[tuple[dict[str, Any], int, str], ...] = (
    ({"model": "l@9/notes"}, 404, "version 1 does"),
    ({"temperature": 3}, 400, r"temperature must be in \[0, 2\]"),
    ({"n": 2, "temperature": 0}, 400, "greedy sampling"),
    ({"stream": True, "temperature": 3}, 400, r"temperature must be in \[0, 2\]"),
    ({"logprobs": 21}, 400, "from 0 to 20"),
    ({"max_tokens": 0}, 400, "max_tokens"),
    ({"n": "2"}, 400, "n is"),
)


def test_what_is_wrong_is_refused_and_the_engine_is_not_blamed(engine: FakeVllm) -> None:
    with front(engine) as found:
        for changes, status, message in WRONG:
            answer = found.ask(**changes)
            assert answer.status_code == status, changes
            assert re.search(message, answer.json()["error"]["message"])
        assert all(each["problem"] is None for each in found.state()["engines"])


@pytest.mark.parametrize(
    "changes", [{}, {"messages": CHAT}, {"prompt": [ROWS[1].input, ROWS[4].input]}], ids=["text", "chat", "two"]
)
def test_pieces_of_a_stream_come_before_its_end(engine: FakeVllm, alone: Alone, changes: dict[str, Any]) -> None:
    answers = alone("1").answers
    wanted = [answers[3]] if "messages" in changes else answers[1::3] if "prompt" in changes else answers[1:2]
    texts, ids = [""] * len(wanted), set[str]()
    with front(engine) as found:
        engine.pace[found.name()] = threading.Event()
        with streaming(found, **changes) as (answer, events):
            assert answer.headers["X-Deal-Version"] == "1"
            assert answer.headers["content-type"].startswith("text/event-stream")
            for number, event in enumerate(events):
                if not number:
                    assert not engine.pace[found.name()].is_set()
                    engine.pace[found.name()].set()
                assert event["model"] == "l@1"
                ids.add(event["id"].partition("-")[2])
                for choice in event["choices"]:
                    ids |= {choice["id"]} if "id" in choice else set()
                    texts[choice["index"]] += choice["delta"]["content"] if "messages" in changes else choice["text"]
            assert number > 4 and event["usage"]["total_tokens"] > 0
        wait_for(lambda: len(logged()) == len(wanted))
    assert [text.rstrip() for text in texts] == wanted
    assert ids == {row["id"] for row in logged()} and len(ids) == len(wanted)


def test_a_promotion_changes_no_request_that_has_begun_and_then_unloads(
    engine: FakeVllm, alone: Alone, home: Path
) -> None:
    with front(engine) as found:
        first = found.name()
        engine.pace[first] = threading.Event()
        with streaming(found) as (answer, events):
            text, begun = next(events)["choices"][0]["text"], time.monotonic()
            move(open_store(), "2")
            wait_for(lambda: found.champion.version == "2")
            assert found.ask().json()["choices"][0]["text"] == alone("2").answers[1]
            wait_for(lambda: time.monotonic() > begun + 2 * GRACE_SECONDS)
            assert ("unload", first) not in engine.calls and first in engine.adapters, "a request is in flight"
            engine.pace[first].set()
            rest = list(events)
            assert {event["model"] for event in rest} == {"l@1"} and answer.headers["X-Deal-Version"] == "1"
            text += "".join(choice["text"] for event in rest for choice in event["choices"])
            assert text.strip() == alone("1").answers[1]
        copies = home / "engine-adapters"
        wait_for(lambda: {path.name for path in copies.iterdir()} == {found.name()})
        assert list(engine.adapters) == [found.name()]

        begun = time.monotonic()
        move(open_store(), "1", "rolled back")
        wait_for(lambda: found.champion.version == "1")
        assert found.ask().json()["choices"][0]["text"] == alone("1").answers[1]
        wait_for(lambda: list(engine.adapters) == [first])
        assert time.monotonic() - begun >= GRACE_SECONDS
        wait_for(lambda: {path.name for path in copies.iterdir()} == {first})


def tried(found: Front) -> str | None:
    return found.champion.rollout.trial and found.champion.rollout.trial.version if found.champion.rollout else None


@pytest.mark.parametrize(
    ("is_stream", "num_pieces", "answering"), [(True, None, "2"), (True, 0, "1"), (True, 1, "2"), (False, 1, "1")]
)
def test_a_canary_that_fails_is_replaced_by_the_champion_unless_its_pieces_have_come(
    tiny_base: Path,
    register: Callable[..., None],
    alone: Alone,
    is_stream: bool,
    num_pieces: int | None,
    answering: str,
) -> None:
    register("canary")
    engine = FakeVllm(tiny_base)
    move(open_store(), "2", "rollout", rollout="canary")
    with running(engine), front(engine) as found:
        wait_for(lambda: tried(found) == "2")
        candidate = next(name for name in engine.adapters if name.startswith("l-v2-"))
        if num_pieces is not None:
            engine.broken[candidate] = num_pieces
        if not is_stream:
            answer = found.ask()
            assert answer.headers["X-Deal-Version"] == answering
            assert answer.json()["choices"][0]["text"] == alone(answering).answers[1]
        else:
            with streaming(found) as (answer, stream):
                events = list(stream)
            assert answer.headers["X-Deal-Version"] == answering
            assert ("error" in events[-1]) == (num_pieces == 1)
            assert {event["model"] for event in events if "model" in event} == {f"l@{answering}"}
        rows = [("2", num_pieces is not None)] if num_pieces is not None else []
        rows += [] if is_stream and num_pieces == 1 else [(answering, False)]
        wait_for(lambda: len(logged(of_rollout=True)) == len(rows))
        move(open_store(), "2", "rejected")
        wait_for(lambda: tried(found) is None)
        assert found.ask().headers["X-Deal-Version"] == "1"
        wait_for(lambda: candidate not in engine.adapters)


def test_a_shadow_answers_copies(tiny_base: Path, register: Callable[..., None], alone: Alone) -> None:
    register("shadow")
    engine = FakeVllm(tiny_base)
    move(open_store(), "2", "rollout", rollout="shadow")
    with running(engine), front(engine) as found:
        wait_for(lambda: tried(found) == "2")
        assert found.ask().json()["choices"][0]["text"] == alone("1").answers[1]
        wait_for(lambda: len(logged(of_rollout=True)) == 2)
        first, second = sorted(logged(of_rollout=True), key=lambda row: row["version"])
        assert (first["version"], second["version"], second["shadow_of"]) == ("1", "2", first["id"])
        assert (first["output"], second["output"]) == (alone("1").answers[1], alone("2").answers[1])


def test_of_several_engines_those_that_are_there_answer(tiny_base: Path, engine: FakeVllm, alone: Alone) -> None:
    other = FakeVllm(tiny_base)
    both = (engine, other)

    def up(found: Front) -> list[bool]:
        lines = httpx.get(f"{found.url}/metrics").text.splitlines()
        assert sum(line.startswith("# TYPE deal_engine_up ") for line in lines) == 1
        return [f'deal_engine_up{{engine="{each.url}"}} 1.0' in lines for each in both]

    with running(other), front(*both) as found:
        wait_for(lambda: all(map(found.is_served_by, both)) and up(found) == [True, True])
        for gone in both:
            gone.stop()
            for _ in range(4):
                assert found.ask().raise_for_status().json()["choices"][0]["text"] == alone("1").answers[1]
            wait_for(lambda gone=gone: up(found) == [each is not gone for each in both])
            gone.start()
            wait_for(lambda gone=gone: found.is_served_by(gone) and up(found) == [True, True])
        for each in both:
            each.stop()
        refused = found.ask()
        assert (refused.status_code, refused.headers["Retry-After"]) == (503, "2")
        assert "does not answer" in refused.json()["error"]["message"]
        assert up(found) == [False, False] and found.state()["version"] == "1"
        engine.start()
        wait_for(lambda: found.ask().is_success)


def test_requests_are_shared_among_engines_and_one_that_breaks_loses_none(
    tiny_base: Path, engine: FakeVllm, alone: Alone
) -> None:
    other = FakeVllm(tiny_base)
    with running(other), front(engine, other) as found:
        for each in (engine, other):
            each.pace[found.name()] = threading.Event()
        answers: list[httpx.Response] = []
        threads = [threading.Thread(target=lambda: answers.append(found.ask())) for _ in range(4)]
        for thread in threads:
            thread.start()
        asked = ("ask", found.name())
        wait_for(lambda: [each.calls.count(asked) for each in (engine, other)] == [2, 2])
        engine.stop()  # its answers have begun, but no client has got a piece
        other.pace[found.name()].set()
        for thread in threads:
            thread.join(WAIT_SECONDS)
        assert [answer.json()["choices"][0]["text"] for answer in answers] == [alone("1").answers[1]] * 4


def test_no_other_engine_goes_on_with_a_stream_that_has_begun(tiny_base: Path, engine: FakeVllm) -> None:
    other = FakeVllm(tiny_base)
    with running(other), front(engine, other) as found:
        for each in (engine, other):
            each.pace[found.name()] = threading.Event()
        with streaming(found) as (_, events):
            next(events)
            (asked,) = (each for each in (engine, other) if each.bodies and each.bodies[-1].get("stream"))
            asked.stop()
            rest = list(events)
        assert len(rest) == 1 and "does not answer" in rest[0]["error"]["message"], rest


def test_what_is_about_to_answer_is_not_unloaded(tiny_base: Path, engine: FakeVllm) -> None:
    """One engine has loaded it, and another takes its time."""
    slow = FakeVllm(tiny_base)
    with running(slow), front(engine, slow, grace_seconds=0.0) as found:
        slow.slow_seconds = 0.5
        move(open_store(), "2")
        wait_for(lambda: found.champion.version == "2")
        assert ("unload", found.name()) not in engine.calls
        assert found.ask().headers["X-Deal-Version"] == "2"


def test_the_start_waits_for_an_engine(tiny_base: Path, register: Callable[..., None]) -> None:
    register()
    engine, said = FakeVllm(tiny_base), list[str]()

    def start_when_missed() -> None:
        wait_for(lambda: any("does not load" in line and f"{engine.url} does not answer" in line for line in said))
        engine.start()

    later = threading.Thread(target=start_when_missed)
    later.start()
    try:
        with front(engine, said=said) as found:
            assert found.ask().is_success
    finally:
        later.join()
        engine.stop()


def test_an_engine_that_lost_its_adapters_gets_them_again(
    engine: FakeVllm, alone: Alone, monkeypatch: pytest.MonkeyPatch
) -> None:
    with front(engine) as found:
        monkeypatch.setattr(engines_module, "LOOK_SECONDS", 60.0)  # no look helps
        time.sleep(0.1)
        engine.adapters.clear()
        assert found.ask().raise_for_status().json()["choices"][0]["text"] == alone("1").answers[1]


@pytest.fixture(scope="module")
def other_bases(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A model of the same form with other weights, and one with a smaller vocabulary."""
    found = []
    for seed, changes in ((1, {}), (2, {"vocab_size": 300})):
        folder = tmp_path_factory.mktemp("other")
        torch.manual_seed(seed)
        config = LlamaConfig.from_pretrained(tiny_base, **changes)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        AutoTokenizer.from_pretrained(tiny_base).save_pretrained(folder)
        found.append(folder)
    return found


@pytest.mark.parametrize(("which", "how"), [(0, r"differ by \d"), (1, "out of vocabulary")])
def test_an_engine_with_another_base_model_answers_nothing(
    engine: FakeVllm, other_bases: list[Path], which: int, how: str
) -> None:
    wrong = FakeVllm(other_bases[which])
    message = rf"{wrong.url} has the base model base, and the version needs tiny: .*{how}.*Start the engine with"
    with running(wrong):
        with pytest.raises(ServingError, match=message), front(wrong):
            pass
        assert wrong.adapters == {}
    with front(engine) as found:
        engine.stop()
        wrong.port, wrong.url = engine.port, engine.url
        wrong.adapters[found.name()] = "/the/same/name"  # as if another front had loaded it there
        wrong._models[found.name()] = wrong._models["base"]
        wrong.slow_seconds = 0.2
        with running(wrong):
            while "needs tiny" not in str(found.state()["engines"][0]["problem"]):
                assert found.ask().status_code == 503
            assert ("ask", found.name()) not in wrong.calls


def test_a_version_that_the_engine_refuses_changes_nothing(engine: FakeVllm, alone: Alone) -> None:
    with front(engine) as found:
        move(open_store(), "4")
        wait_for(lambda: found.state()["problem"])
        state = found.state()
        assert (state["version"], state["champion"], state["engines"][0]["problem"]) == ("1", "4", None)
        assert "LoRA rank 32 is greater than max_lora_rank 16" in state["problem"]
        assert found.ask().json()["choices"][0]["text"] == alone("1").answers[1]
        move(open_store(), "2")
        wait_for(lambda: found.state()["version"] == "2" and found.state()["problem"] is None)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_damaged_files_are_never_loaded(engine: FakeVllm, home: Path, folders: dict[str, Path], alone: Alone) -> None:
    with front(engine) as found:
        flip(home / "store" / "adapters" / "l" / "run-2" / WEIGHTS_FILE)
        move(open_store(), "2")
        wait_for(lambda: f"{WEIGHTS_FILE} has sha256" in str(found.state()["problem"]))
        assert [name for action, name in engine.calls if action == "load"] == [found.name()]
        assert found.ask().json()["choices"][0]["text"] == alone("1").answers[1]
        copy = home / "engine-adapters" / found.name()
        move(open_store(), "1", "rolled back")
        wait_for(lambda: found.state()["problem"] is None)
        flip(copy / WEIGHTS_FILE)
        engine.adapters.clear()
        wait_for(lambda: "is damaged" in str(found.state()["engines"][0]["problem"]))
        assert found.ask().status_code == 503 and engine.adapters == {}
    with front(engine) as found:
        assert digests_of(copy) == digests_of(folders["1"])
        assert found.ask().json()["choices"][0]["text"] == alone("1").answers[1]


def certificate(folder: Path) -> dict[str, str]:
    """A certificate of 127.0.0.1 that signs itself, and its key, by uvicorn's names."""
    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), now, now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    secret = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / "cert.pem").write_bytes(made.public_bytes(pem))
    (folder / "key.pem").write_bytes(secret)
    return {"ssl_certfile": str(folder / "cert.pem"), "ssl_keyfile": str(folder / "key.pem")}


def test_the_token_and_the_authorities_are_settings(
    tiny_base: Path, tmp_path: Path, register: Callable[..., None], folders: dict[str, Path]
) -> None:
    register()
    engine = FakeVllm(tiny_base, api_key="key-1")
    engine.url = engine.url.replace("http:", "https:")
    engine.start(**certificate(tmp_path))
    try:
        trusted = {"ca_file": tmp_path / "cert.pem"}
        with front(engine, api_key="key-1", **trusted) as found:
            assert found.ask().is_success
            engine.pace[found.name()] = threading.Event()
            with streaming(found) as (_, events):
                next(events)
            wait_for(lambda: engine.num_left == 1)
        with pytest.raises(ServingError, match="DEAL_ENGINE_API_KEY") as caught, front(engine, **trusted):
            pass
        assert "key-1" not in str(caught.value)
        with pytest.raises(ConfigError, match=r"DEAL_ENGINE_CA_FILE.*give a PEM file"):
            Engines(open_store(), "l", [engine.url], EngineSettings(ca_file=tmp_path / "key.pem"), print)

        async def swap_with_distrust() -> None:
            settings = EngineSettings(api_key="key-1")
            async with Engines(open_store(), "l", [engine.url], settings, print) as distrusting:
                await asyncio.to_thread(distrusting.swap, folders["1"], "1")

        with pytest.raises(NoEngineError, match="CERTIFICATE_VERIFY_FAILED"):
            asyncio.run(swap_with_distrust())
    finally:
        engine.stop()


@pytest.mark.parametrize("num_full", [1, 2])
def test_a_full_engine_is_said_unless_another_has_room(tiny_base: Path, engine: FakeVllm, num_full: int) -> None:
    other = FakeVllm(tiny_base)
    with running(other), front(engine, other) as found:
        for status in (503, 429):
            engine.is_full, other.is_full = True, num_full == 2
            engine.failing = [status]
            answer = found.ask()
            if num_full == 1:
                assert answer.is_success
            else:
                assert (answer.status_code, answer.headers["Retry-After"]) == (503, "2")
                assert "too busy" in answer.json()["error"]["message"]
        assert all(each["problem"] is None for each in found.state()["engines"]), "a full engine is there"


def test_a_client_that_leaves_ends_its_request_at_the_engine(engine: FakeVllm, home: Path) -> None:
    """Also while the engine computes. Nothing of it is an error."""
    with front(engine) as found:
        engine.pace[found.name()] = threading.Event()
        with streaming(found) as (_, events):
            next(events)
        wait_for(lambda: engine.num_left == 1)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{found.url}/v1/completions", json=note(), timeout=0.3)
        wait_for(lambda: engine.num_left == 2)
        assert found.state()["engines"][0]["problem"] is None
        engine.pace[found.name()].set()
        assert found.ask().is_success
    written = home / "serve.log"
    assert not written.exists() or "ERROR" not in written.read_text()


def test_a_name_never_means_another_adapter(
    engine: FakeVllm, folders: dict[str, Path], alone: Alone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two stores have a version 1 of one lineage, and share the engine."""
    monkeypatch.setattr(engines_module, "FRONT_SECONDS", 30.0)
    with front(engine) as found:
        monkeypatch.setenv("DEAL_STORE_URI", (tmp_path / "elsewhere" / "store").as_uri())
        files = {name: (folders["2"] / name).read_bytes() for name in SERVED_FILES}
        store_version(open_store(), files)
        move(open_store(), "1")
        with front(engine, grace_seconds=60.0) as other:
            assert found.name() != other.name()
            assert other.ask().json()["choices"][0]["text"] == alone("2").answers[1]
        assert found.ask().json()["choices"][0]["text"] == alone("1").answers[1]


@pytest.mark.nightly
def test_deal_serve_takes_engines_from_the_command_and_the_environment(
    engine: FakeVllm, alone: Alone, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEAL_ENGINE_URL", f"{engine.url} http://127.0.0.1:9")
    with deal_serve("l") as (url, process):
        answer = httpx.post(f"{url}/v1/completions", json=note(), timeout=WAIT_SECONDS)
        assert answer.json()["choices"][0]["text"] == alone("1").answers[1]
        assert [each["url"] for each in httpx.get(f"{url}/version").json()["engines"]] == [
            engine.url,
            "http://127.0.0.1:9",
        ]
        process.terminate()
        assert process.wait(WAIT_SECONDS) == 0
    assert engine.adapters, "the next start finds it loaded"


def test_the_engine_reads_copies_in_the_shared_folder_under_its_own_path(engine: FakeVllm, tmp_path: Path) -> None:
    shared, seen = tmp_path / "shared", tmp_path / "seen"
    shared.mkdir()
    seen.symlink_to(shared)  # the engine has mounted it elsewhere
    with front(engine, adapter_dir=shared, server_adapter_dir=str(seen)):
        ((name, path),) = engine.adapters.items()
        assert path == f"{seen}/{name}"
        assert sorted(file.name for file in (shared / name).iterdir()) == sorted(PEFT_FILES)


def test_an_engine_that_does_not_apply_an_adapter_answers_nothing(
    engine: FakeVllm, alone: Alone, folders: dict[str, Path]
) -> None:
    """It ignores adapters, or has another one under the name. What serves before goes on."""
    with front(engine) as found:
        for applied, code in ((NOTHING, "ignores the adapter"), (folders["3"], "applies something else")):
            engine.applies = applied
            move(open_store(), "2")
            wait_for(lambda code=code: code in str(found.state()["problem"]))
            assert found.ask().json()["choices"][0]["text"] == alone("1").answers[1]
            assert not any(call == "ask" and name.startswith("l-v2") for call, name in engine.calls)
            move(open_store(), "1", "rolled back")
            wait_for(lambda: found.state()["problem"] is None)
            wait_for(lambda: list(engine.adapters) == [found.name()])  # the refused one is unloaded
        engine.applies = None
        move(open_store(), "2")
        wait_for(lambda: found.state()["version"] == "2")
        assert found.ask().json()["choices"][0]["text"] == alone("2").answers[1]


def test_the_proof_is_asked_again_after_an_engine_was_away(engine: FakeVllm, alone: Alone) -> None:
    with front(engine) as found:
        engine.stop()
        wait_for(lambda: found.state()["engines"][0]["problem"])
        engine.applies = NOTHING
        engine.start()
        wait_for(lambda: "ignores the adapter" in str(found.state()["engines"][0]["problem"]))
        assert found.ask().status_code == 503
        engine.stop()
        engine.applies = None
        engine.start()
        wait_for(lambda: found.ask().is_success)
        assert found.ask().json()["choices"][0]["text"] == alone("1").answers[1]


def test_a_version_without_a_proof_is_served_and_so_is_one_that_changes_too_little(
    engine: FakeVllm, folders: dict[str, Path], alone: Alone
) -> None:
    files = {name: (folders["3"] / name).read_bytes() for name in SERVED_FILES}
    without = store_version(open_store(), files).version
    proof = Proof.from_json(json.loads((folders["3"] / PROOF_FILE).read_text()))
    small = replace(proof, adapter=tuple(value + 1e-3 for value in proof.base))
    files[PROOF_FILE] = json.dumps(small.to_json()).encode()
    little = store_version(open_store(), files).version
    with front(engine) as found:
        for number, sentence in ((without, "stored without a proof"), (little, "too little to prove")):
            move(open_store(), number)
            wait_for(lambda number=number: found.state()["version"] == number)
            assert found.ask().json()["choices"][0]["text"] == alone("3").answers[1]
            assert sum(sentence in text for text in found.said) == 1


def test_two_fronts_share_an_engine_and_unload_nothing_that_the_other_one_uses(
    engine: FakeVllm, alone: Alone, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines_module, "FRONT_SECONDS", 30.0)
    with front(engine) as one, front(engine) as other:
        first = other.name()
        engine.pace[first] = threading.Event()
        with streaming(other) as (_, events):
            text = next(events)["choices"][0]["text"]
            move(open_store(), "2")
            wait_for(lambda: [found.champion.version for found in (one, other)] == ["2", "2"])
            moved = time.monotonic()
            wait_for(lambda: time.monotonic() > moved + 4 * GRACE_SECONDS)
            assert ("unload", first) not in engine.calls and first in engine.adapters, "the other front uses it"
            for found in (one, other):
                assert found.ask().json()["choices"][0]["text"] == alone("2").answers[1]
            engine.pace[first].set()
            text += "".join(choice["text"] for event in events for choice in event["choices"])
        assert text.strip() == alone("1").answers[1]
        monkeypatch.setattr(engines_module, "FRONT_SECONDS", 0.05)
        wait_for(lambda: list(engine.adapters) == [one.name()])
        assert one.name() == other.name()
