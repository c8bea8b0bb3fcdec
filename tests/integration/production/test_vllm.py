"""A vLLM server follows the champion: a fake server (tests/fake_vllm.py) with a real store."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy
import pytest
from infra.serving.vllm import VllmAwayError, VllmClient, VllmError
from safetensors.numpy import save

from deal_core.adapter.files import digests_of
from deal_core.errors import ConfigError, DealError, IntegrityError, RegistryError, StoreError
from flows.champions import serve_vllm
from infra.serving import vllm
from infra.settings import VllmSettings
from infra.store.local import open_store
from infra.versions import Versions
from tasks.context import current_store
from tasks.serving.vllm import ServingRoute, _published, read_route, require_servable, sync_vllm
from tests.fake_vllm import FakeVllm, running
from tests.stored_versions import move, store_version

CONFIG = {
    "r": 8,
    "lora_alpha": 8,
    "target_modules": ["q_proj", "v_proj"],
    "task_type": "CAUSAL_LM",
    "bias": "none",
    "peft_type": "LORA",
}
Sync = Callable[..., ServingRoute]

pytestmark = pytest.mark.usefixtures("home")


def weights_of(version: str) -> bytes:
    return save({"weight": numpy.full(2, int(version), dtype=numpy.float32)})


@pytest.fixture
def server(free_port: int) -> Iterator[FakeVllm]:
    with running(FakeVllm(), free_port) as fake:
        yield fake


@pytest.fixture
def sync(server: FakeVllm, monkeypatch: pytest.MonkeyPatch) -> Sync:
    monkeypatch.setattr(vllm, "FIRST_PAUSE_SECONDS", 0.001)

    def sync(**settings: Any) -> ServingRoute:
        given = {"url": server.url, "grace_seconds": 0.0, **settings}
        return sync_vllm("l", VllmSettings(**given))

    return sync


def promote(version: str, *, lineage: str = "l", **config: Any) -> None:
    """Make a version of the lineage, unless it exists, and make it champion."""
    store = current_store()
    if Versions(store).find(lineage, version) is None:
        files = {
            "adapter_config.json": json.dumps({**CONFIG, **config}).encode(),
            "adapter_model.safetensors": weights_of(version),
        }
        uri = f"adapters/{lineage}/run-{version}"
        made = store_version(store, files, lineage, uri=uri, adapter_sha256=version * 64)
        assert made.version == version
    move(store, version, lineage=lineage)


def test_the_server_follows_the_champion_there_and_back(server: FakeVllm, sync: Sync) -> None:
    promote("1")
    first = sync()
    assert (first.model, first.version, first.state, first.problem) == ("l-v1", "1", "in step", None)
    assert server.calls == [("load", "l-v1"), ("ask", "l-v1")]
    assert Path(server.adapters["l-v1"], "adapter_model.safetensors").read_bytes() == weights_of("1")

    promote("2")
    server.calls.clear()
    second = sync()
    assert second.model == "l-v2" and list(server.adapters) == ["l-v2"]
    assert server.calls == [("load", "l-v2"), ("ask", "l-v2"), ("unload", "l-v1")], "unloaded before the other answered"
    assert read_route(current_store(), "l") == second

    promote("1")
    assert sync().model == "l-v1" and list(server.adapters) == ["l-v1"]


def test_what_is_in_step_stays_and_a_server_that_forgot_is_told_again(server: FakeVllm, sync: Sync) -> None:
    promote("1")
    server.adapters["other-v1"] = server.adapters["l-v1-v4"] = "/somebody/else"
    first = sync()
    server.calls.clear()
    assert sync() == first
    assert server.calls == [("ask", "l-v1")]
    del server.adapters["l-v1"]
    assert sync() == first
    assert list(server.adapters) == ["other-v1", "l-v1-v4", "l-v1"], "another lineage's adapter was touched"


def test_what_served_before_stays_for_the_time_of_grace(
    server: FakeVllm, sync: Sync, monkeypatch: pytest.MonkeyPatch
) -> None:
    promote("1")
    sync()
    promote("2")
    waited: list[float] = []

    def wait(seconds: float) -> None:
        assert set(server.adapters) == {"l-v1", "l-v2"}
        route = read_route(current_store(), "l")
        assert route is not None and route.model == "l-v2", "the route moves before the wait"
        waited.append(seconds)

    monkeypatch.setattr("tasks.serving.vllm.time.sleep", wait)
    sync(grace_seconds=20.0)
    assert len(waited) == 1 and 15 < waited[0] <= 20
    assert list(server.adapters) == ["l-v2"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"r": 32}, r"rank is 32 and the server allows 16.*--max-lora-rank 32"),
        ({"rank_pattern": {"q_proj": 64}}, "rank is 64"),
        ({"target_modules": ["q_proj", "router"]}, r"layers router,.*DEAL_VLLM_TARGET_MODULES"),
        ({"target_modules": "all-linear"}, "layers all-linear"),
        ({"task_type": "SEQ_2_SEQ_LM"}, "encoder-decoder"),
        ({"use_dora": True}, "DoRA"),
    ],
)
def test_an_adapter_that_the_server_would_not_take_moves_nothing(
    server: FakeVllm, sync: Sync, config: dict[str, Any], message: str
) -> None:
    promote("1")
    before = sync()
    promote("2", **config)
    server.calls.clear()
    with pytest.raises(ConfigError, match=message):
        sync()
    assert server.calls == [] and list(server.adapters) == ["l-v1"]
    after = read_route(current_store(), "l")
    assert after is not None
    assert (after.model, after.version, after.champion, after.state) == (before.model, "1", "2", "behind")
    assert after.problem and "cannot be served by vLLM" in after.problem


def test_limits_are_those_of_the_settings() -> None:
    require_servable({**CONFIG, "r": 64}, VllmSettings(max_lora_rank=64))
    router = VllmSettings(target_modules=frozenset({"router"}))
    require_servable({**CONFIG, "target_modules": ["router"]}, router)
    with pytest.raises(ConfigError, match="q_proj, v_proj"):
        require_servable(CONFIG, router)


def test_a_server_that_comes_back_in_time_is_bridged(server: FakeVllm, sync: Sync) -> None:
    promote("1")
    server.failing = [503, 502, 503]
    assert sync(max_attempts=4).state == "in step"


def test_a_server_that_is_away_is_said_and_the_route_stays(server: FakeVllm, sync: Sync) -> None:
    promote("1")
    sync()
    promote("2")
    server.failing = [503] * 3
    with pytest.raises(VllmAwayError, match=r"not ready \(503\)"):
        sync(max_attempts=3)
    assert server.failing == [], "fewer requests than allowed"
    route = read_route(current_store(), "l")
    assert route is not None and (route.model, route.state, route.champion) == ("l-v1", "behind", "2")
    with pytest.raises(VllmAwayError, match=r"http://127\.0\.0\.1:9 is away"):
        sync(url="http://127.0.0.1:9", max_attempts=2)
    assert sync().state == "in step"
    route = read_route(current_store(), "l")
    assert route is not None and (route.model, route.problem) == ("l-v2", None)


def test_an_adapter_that_does_not_answer_never_gets_the_route(server: FakeVllm, sync: Sync) -> None:
    promote("1")
    sync()
    promote("2")
    server.mute = True
    with pytest.raises(VllmError, match="no completion by 'l-v2'"):
        sync()
    assert list(server.adapters) == ["l-v1"]
    route = read_route(current_store(), "l")
    assert route is not None and route.model == "l-v1"


def test_a_name_never_means_another_adapter(server: FakeVllm, sync: Sync) -> None:
    promote("1")
    server.adapters["l-v1"] = "/somewhere/else"
    with pytest.raises(VllmError, match="another adapter under the name l-v1"):
        sync()
    server.adapters.clear()
    route = sync()
    forged = route.model_copy(update={"names": {"l-v1": "f" * 64}})
    current_store().put_bytes("serving/l.json", forged.model_dump_json().encode())
    with pytest.raises(ConfigError, match="l-v1 was served with another adapter"):
        sync()


def test_a_load_whose_answer_got_lost_counts(server: FakeVllm) -> None:
    promote("1")
    client = vllm.VllmClient(VllmSettings(url=server.url))
    path = str(Path(current_store().uri.removeprefix("file://")) / "adapters/l/run-1")
    client.load("l-v1", path)
    client.load("l-v1", path)  # a second attempt gets 400, already loaded
    with pytest.raises(VllmError, match="already been loaded"):
        client.load("l-v1", "/another/path")


@pytest.mark.parametrize("is_shared", [False, True])
@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_damaged_adapter_is_never_handed_over(
    tmp_path: Path, server: FakeVllm, sync: Sync, name: str, is_shared: bool
) -> None:
    settings: dict[str, Any] = {"adapter_dir": tmp_path / "shared"} if is_shared else {}
    promote("1")
    sync(**settings)
    promote("2")
    file = tmp_path / "home" / "store" / "adapters" / "l" / "run-2" / name
    recorded, whole = digests_of(file.parent)[name], file.read_bytes()
    file.write_bytes(whole + b" " if name == "adapter_config.json" else whole[:-1] + bytes([whole[-1] ^ 1]))
    server.calls.clear()
    with pytest.raises(IntegrityError, match=rf"Version 2 of 'l' is damaged.*{name} has sha256 .*{recorded}"):
        sync(**settings)
    assert server.calls == [] and list(server.adapters) == ["l-v1"]
    assert not list(tmp_path.glob("shared/*l-v2*"))
    route = read_route(current_store(), "l")
    assert route is not None and (route.model, route.state) == ("l-v1", "behind")
    assert route.problem and "is damaged" in route.problem
    file.write_bytes(b"\xff" if name == "adapter_config.json" else b"")
    with pytest.raises(StoreError, match=rf"{name}, a file of version 2, champion of 'l', is damaged"):
        sync(**settings)
    file.write_bytes(whole)
    assert sync(**settings).model == "l-v2"


def test_a_damaged_copy_is_not_loaded_again(tmp_path: Path, server: FakeVllm, sync: Sync) -> None:
    promote("1")
    sync(adapter_dir=tmp_path / "shared")
    (copy,) = (tmp_path / "shared").iterdir()
    (copy / "adapter_model.safetensors").write_bytes(b"flipped")
    assert sync(adapter_dir=tmp_path / "shared").state == "in step", "the server keeps its loaded adapter"
    server.adapters.clear()
    with pytest.raises(IntegrityError, match=r"copy of version 1 of 'l' is damaged.*Remove that folder"):
        sync(adapter_dir=tmp_path / "shared")
    assert server.adapters == {}
    for file in copy.iterdir():
        file.unlink()
    copy.rmdir()
    assert sync(adapter_dir=tmp_path / "shared").state == "in step" and list(server.adapters) == ["l-v1"]


def test_a_folder_that_the_server_shares_gets_a_copy_under_the_servers_path(
    tmp_path: Path, server: FakeVllm, sync: Sync
) -> None:
    promote("1")
    shared, seen = tmp_path / "shared", tmp_path / "as the server sees it"
    seen.symlink_to(shared)
    sync(adapter_dir=shared, server_adapter_dir=str(seen))
    assert server.adapters == {"l-v1": str(seen / f"l-v1-{'1' * 12}")}
    (folder,) = shared.iterdir()
    assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


def test_copies_go_once_their_adapter_is_unloaded_and_come_back_with_it(
    tmp_path: Path, server: FakeVllm, sync: Sync
) -> None:
    shared = tmp_path / "shared"
    others = [shared / name for name in (f"other-v1-{'1' * 12}", f"l-v1-v1-{'1' * 12}", "notes")]
    for folder in (*others, shared / f".l-v7-{'7' * 12}"):  # an interrupted call left the last one
        folder.mkdir(parents=True)
        (folder / "file").write_text("x")
    for version in ("1", "2", "1"):
        promote(version)
        sync(adapter_dir=shared)
        mine = shared / f"l-v{version}-{version * 12}"
        assert set(shared.iterdir()) == {*others, mine}
        assert server.adapters == {f"l-v{version}": str(mine)}


def test_a_scheduled_run_gets_no_lineage_and_syncs_every_one_that_has_a_champion(
    server: FakeVllm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEAL_VLLM_URL", server.url)
    scheduled = serve_vllm.validate_parameters({})
    for lineage, rank in (("a", 8), ("b", 64), ("c", 8)):
        promote("1", lineage=lineage, r=rank)
    store_version(current_store(), {}, "none-yet")
    message = r"Of 4 lineages 1 could not be brought in step with the server\. b: .* its rank is 64"
    with pytest.raises(DealError, match=message):
        asyncio.run(serve_vllm.fn(**scheduled))
    assert list(server.adapters) == ["a-v1", "c-v1"]

    current_store().delete("promotions/b")
    routes = asyncio.run(serve_vllm.fn(**scheduled))
    assert isinstance(routes, list) and [route.model for route in routes] == ["a-v1", "c-v1"]
    route = asyncio.run(serve_vllm.fn("c"))
    assert isinstance(route, ServingRoute) and route.model == "c-v1"


@pytest.mark.parametrize("content", ["<html>a page</html>", "[]", '{"data": [{}]}'])
def test_a_server_that_is_no_vllm_is_said(content: str, monkeypatch: pytest.MonkeyPatch) -> None:
    client = VllmClient(VllmSettings(url="http://127.0.0.1:9"))
    monkeypatch.setattr(client, "_send", lambda *_: httpx.Response(200, text=content))
    with pytest.raises(VllmError, match="lists no models as vLLM does"):
        client.models()
    with pytest.raises(VllmError, match="gave no completion by 'm'"):
        client.complete("m", "text", 1)


def test_what_a_server_needs_is_said(free_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RegistryError, match="'l' has no champion"):
        sync_vllm("l", VllmSettings(url="http://127.0.0.1:9"))
    promote("1")
    with pytest.raises(ConfigError, match="DEAL_VLLM_URL"):
        sync_vllm("l", VllmSettings())
    with running(FakeVllm(api_key="key-1", allows_updates=False), free_port) as fake:
        with pytest.raises(VllmError, match="DEAL_VLLM_API_KEY"):
            sync_vllm("l", VllmSettings(url=fake.url))
        monkeypatch.setenv("DEAL_VLLM_API_KEY", "key-1")
        with pytest.raises(VllmError, match="VLLM_ALLOW_RUNTIME_LORA_UPDATING") as caught:
            sync_vllm("l", VllmSettings(url=fake.url))
    assert "key-1" not in str(caught.value)
    (champion,) = Versions(current_store()).all("l")
    with pytest.raises(ConfigError, match="DEAL_VLLM_ADAPTER_DIR"):
        _published(open_store("s3://bucket"), champion, VllmSettings())
