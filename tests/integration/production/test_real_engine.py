"""`deal serve --engine` in front of a real vLLM server: answers, moves under load, rollouts, kills and refusals."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai.types.chat import ChatCompletionUserMessageParam
from safetensors.torch import load_file, save_file

from benchmarks.speed.real_engine import MAX_RANK, RealEngine, running_engine
from benchmarks.speed.serving import Clients, answers_of, make_champion, served, texts_to_ask
from benchmarks.tiny_base import build_tiny_base
from deal_core.adapter.files import WEIGHTS_FILE
from deal_core.evaluation.answerer import load_answerer
from deal_core.evaluation.answering import InputRow
from infra.predictions import read_feedback, read_predictions
from infra.serving.version_files import fetch_version
from infra.settings import HomeSettings
from infra.store.keys import file_name
from infra.store.opening import open_store
from infra.versions import UNREGISTERED, Versions
from tasks.lineage.history import find_version
from tests.adapting import BANK, CLINIC, evaluation_of, run
from tests.real_engine import needs_engine
from tests.waiting import wait_for

WAIT_SECONDS = 600.0
TOKEN = "a-token"
TEXTS = texts_to_ask()[:12]
TRAIN = {"max_steps": 4, "learning_rate": 0.02, "max_prompt_tokens": 192, "max_answer_tokens": 12}
STORY = {
    "name": "story",
    "data": [{"prompt": f"Tell of the number {n}", "completion": "It was small, and then it grew."} for n in range(40)],
}
"""One sentence answers all, so that no step of the greedy answer is a close decision."""
STORY_TRAIN = {"max_steps": 200, "max_answer_tokens": 24}

pytestmark = [needs_engine, pytest.mark.nightly(minutes=1.5)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base whose heads are as wide as vLLM demands."""
    folder = tmp_path_factory.mktemp("wide") / "base"
    build_tiny_base(folder, width=128)
    return folder


@pytest.fixture(scope="module")
def engine(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealEngine]:
    with running_engine(base, tmp_path_factory.mktemp("engine")) as engine, pytest.MonkeyPatch.context() as patch:
        patch.setenv("DEAL_ENGINE_URL", engine.url)
        patch.setenv("DEAL_ENGINE_GRACE_SECONDS", "1")
        patch.setenv("DEAL_LOG_PREDICTIONS", "numbers")
        yield engine


@pytest.fixture(scope="module")
def home(serving_home: Path, base: Path, engine: RealEngine) -> Path:
    """Lineage `l` with two versions, of which the second has learned a task of free texts too."""
    del engine
    rows = serving_home / "story.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in STORY["data"]))
    assert run(base, BANK, train=TRAIN).version == "1"
    assert run(base, {**STORY, "data": str(rows)}, train={**TRAIN, **STORY_TRAIN}).version == "2"
    return serving_home


def state(url: str) -> dict[str, Any]:
    return dict(httpx.get(f"{url}/version", timeout=60).json())


def ask(url: str, text: str = TEXTS[0]) -> httpx.Response:
    body = {"dataframe_records": [{"input": text, "task": "bank"}]}
    return httpx.post(f"{url}/invocations", json=body, timeout=WAIT_SECONDS)


def test_openais_client_gets_the_answers_of_the_version(home: Path, engine: RealEngine) -> None:
    store = open_store()
    version = find_version(store, "l", "2")
    fetch_version(store, version, home / "here")
    here = load_answerer(home / "here", HomeSettings().cache_dir, precision="fp32", version="2")
    rows = [InputRow(text, "bank") for text in TEXTS] + [InputRow(f"Tell of the number {n}", "story") for n in range(9)]
    wanted = here.ask(rows)
    assert {*wanted.answers[len(TEXTS) :]} == {STORY["data"][0]["completion"]}, "the sentence was learned"
    with served("l", {**os.environ, "DEAL_SERVE_API_KEY": TOKEN}) as (url, _):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key=TOKEN, max_retries=0)

        def chat(text: str, task: str, **more: Any) -> Any:
            message = ChatCompletionUserMessageParam(role="user", content=text)
            return client.chat.completions.create(model=f"l@2/{task}", messages=[message], **more)

        for row, answer in zip(rows, wanted.answers, strict=True):
            assert chat(row.input, str(row.task)).choices[0].message.content == answer
        several = client.completions.create(model="l/bank", prompt=TEXTS)
        assert [choice.text for choice in several.choices] == wanted.answers[: len(TEXTS)]

        whole = chat(rows[-1].input, "story")
        pieces = [*chat(rows[-1].input, "story", stream=True)]
        texts = [choice.delta.content or "" for piece in pieces for choice in piece.choices]
        assert "".join(texts).strip() == whole.choices[0].message.content and len(texts) > 2
        short = chat(rows[-1].input, "story", max_tokens=2)
        assert short.usage.completion_tokens == 2 and short.choices[0].finish_reason == "length"
        hot = chat(rows[-1].input, "story", temperature=2.0, n=4, seed=1)
        assert len({choice.message.content for choice in hot.choices}) > 1
        tokens = chat(TEXTS[0], "bank", logprobs=True, top_logprobs=2).choices[0].logprobs.content
        assert all(token.logprob <= 0 and len(token.top_logprobs) == 2 for token in tokens)
        assert tokens[0].top_logprobs[0].token == tokens[0].token, "the most likely token is the answer's"

        with pytest.raises(openai.NotFoundError, match="Version 7 does not answer here"):
            client.completions.create(model="l@7", prompt="x")
        with pytest.raises(openai.BadRequestError, match="temperature"):
            chat("x", "bank", temperature=77.0)
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{url}/v1", api_key="wrong").models.list()

        feedback = [{"id": several.choices[0].id, "label": "loan question"}]
        head = {"Authorization": f"Bearer {TOKEN}"}
        assert httpx.post(f"{url}/feedback", json=feedback, headers=head, timeout=60).status_code == 202
        ids = {choice.id for choice in several.choices} | {pieces[0].id.removeprefix("chatcmpl-")}
        wait_for(lambda: ids <= set(read_predictions(store, "l")["id"]) and len(read_feedback(store, "l")) == 1)
    logged = read_predictions(store, "l").set_index("id")
    sure = [round(value, 3) for value in logged.loc[[choice.id for choice in several.choices]]["confidence"]]
    assert sure == [round(value.confidence, 3) for value in wanted.confidences[: len(TEXTS)]]


@pytest.mark.usefixtures("home")
def test_no_request_fails_while_the_champion_moves_and_every_answer_is_its_versions(engine: RealEngine) -> None:
    """Sixteen clients, two promotions and a rollback."""
    expected = answers_of(["1", "2"], TEXTS, "bank", "l")
    assert expected["1"] != expected["2"]
    make_champion("1", "l")
    with served("l") as (url, _):
        clients = Clients(url, TEXTS, "bank", expected)
        with clients.asking(16):
            for version in ("2", "1", "2"):
                moved = time.monotonic()
                make_champion(version, "l")
                clients.first_of(version, moved, sent_since=moved)
        assert [answer.problem for answer in clients.answers if answer.problem] == []
        assert {answer.version for answer in clients.answers} == {"1", "2"}
        wait_for(lambda: [name.split("-v")[1][:1] for name in engine.adapters()] == ["2"])
        folders = HomeSettings().home / "engine-adapters"
        wait_for(lambda: [path.name for path in folders.iterdir()] == [*engine.adapters()])


@pytest.mark.usefixtures("home")
def test_an_engine_that_was_killed_gets_its_adapters_again(engine: RealEngine) -> None:
    with served("l") as (url, _):
        answer = ask(url).raise_for_status().json()["predictions"][0]["output"]
        engine.kill()
        refused = ask(url)
        assert refused.status_code == 503 and refused.headers["Retry-After"]
        wait_for(lambda: "does not answer" in state(url)["engines"][0]["problem"])
        assert "deal_engine_up{" in httpx.get(f"{url}/metrics").text
        engine.start()
        wait_for(lambda: ask(url).status_code == 200)
        assert ask(url).json()["predictions"][0]["output"] == answer


@pytest.mark.usefixtures("home")
def test_what_the_engine_cannot_serve_moves_nothing(base: Path, engine: RealEngine, tmp_path: Path) -> None:
    """A rank above the engine's, bytes that were changed in the store, and another base model."""
    store = open_store()
    champion = Versions(store).champion("l")
    assert champion is not None
    with served("l") as (url, _):
        for_rank = {"lineage": "l", "base_model": str(base), "adapter": {"rank": 2 * MAX_RANK}}
        wide = run(base, BANK, train=TRAIN, **{**for_rank, "lineage": "wide"})
        assert wide.status == "promoted"

        uri = f"{champion.adapter_uri}-damaged"
        for info in store.list(champion.adapter_uri):
            store.put_bytes(f"{uri}/{file_name(info.key)}", store.get_bytes(info.key))
        damaged = bytearray(store.get_bytes(f"{uri}/{WEIGHTS_FILE}"))
        damaged[-1] ^= 1
        store.put_bytes(f"{uri}/{WEIGHTS_FILE}", bytes(damaged))
        changes = {"version": UNREGISTERED, "run_key": "damaged", "adapter_uri": uri}
        number = Versions(store).register(champion.model_copy(update=changes)).version
        make_champion(number, "l")
        wait_for(lambda: f"Version {number} does not load" in (state(url)["problem"] or ""))
        assert ask(url).json()["predictions"][0]["version"] == champion.version
        make_champion(champion.version, "l")
        wait_for(lambda: state(url)["problem"] is None)

    with pytest.raises(RuntimeError, match="exit code 1"), served("wide"):
        pass
    other = tmp_path / "other"
    build_tiny_base(other, width=128, seed=1)
    assert run(other, BANK, train=TRAIN, lineage="other").status == "promoted"
    with pytest.raises(RuntimeError, match="exit code 1"), served("other"):
        pass
    log = (HomeSettings().home / "logs" / "serve-other.log").read_text()
    assert "log-probabilities of a fixed text differ" in log
    assert "rank" in (HomeSettings().home / "logs" / "serve-wide.log").read_text()
    assert all(name.startswith("l-v") for name in engine.adapters())


@pytest.mark.usefixtures("engine")
def test_an_engine_that_answers_test_rows_decides_as_the_process_does(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = evaluation_of(run(base, CLINIC, train=TRAIN, lineage="here"))
    monkeypatch.setenv("DEAL_EVALUATE_ENGINE", os.environ["DEAL_ENGINE_URL"])
    there = evaluation_of(run(base, CLINIC, train=TRAIN, lineage="there"))
    assert (there["accuracies"], there["outcomes"]) == (here["accuracies"], here["outcomes"])
    assert any("vllm 0." in note for note in there["notes"])
    assert not any((HomeSettings().home / "engine-adapters").glob("evaluate-*"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_only_the_versions_own_adapter_passes_under_its_name(
    dtype: str,
    base: Path,
    serving_home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Under the version's name the engine gets another lineage's adapter, and one whose layers no base model has."""
    del serving_home
    foreign = run(base, CLINIC, train={**TRAIN, "max_steps": 40}, lineage="foreign")
    own = run(base, BANK, train={**TRAIN, "max_steps": 40}, lineage="own")
    fetch_version(open_store(), find_version(open_store(), "foreign", foreign.version), tmp_path / "foreign")
    fetch_version(open_store(), find_version(open_store(), "own", own.version), tmp_path / "renamed")
    weights = tmp_path / "renamed" / WEIGHTS_FILE
    tensors = {name.replace("layers", "strata"): tensor for name, tensor in load_file(weights).items()}
    save_file(tensors, weights)
    (engine_folder := tmp_path / "engine").mkdir()
    with running_engine(base, engine_folder, dtype) as engine:
        monkeypatch.setenv("DEAL_ENGINE_URL", engine.url)
        with served("own") as (url, _):
            assert ask(url).json()["predictions"][0]["version"] == own.version
            (name,) = engine.adapters()
        for folder in (tmp_path / "foreign", tmp_path / "renamed"):
            adapter = {"lora_name": name, "lora_path": str(folder)}
            httpx.post(f"{engine.url}/v1/unload_lora_adapter", json=adapter, timeout=60)
            httpx.post(f"{engine.url}/v1/load_lora_adapter", json=adapter, timeout=60).raise_for_status()
            with pytest.raises(RuntimeError, match="exit code 1"), served("own"):
                pass
            refusal = json.loads(capfd.readouterr().err.splitlines()[-1])["error"]
            assert "what it changes is" in refusal, f"the adapter in {folder.name} is not the version's"
