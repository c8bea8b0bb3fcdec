"""Versions handed over to other programs: merged models, the Hub, and folders for vLLM's resolver."""

from __future__ import annotations

import asyncio
import json
import shutil
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraModel, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from deal_core.adapter.files import CONFIG_FILE, WEIGHTS_FILE
from deal_core.errors import ConfigError, IntegrityError, RegistryError
from deal_core.evaluation.answering import read_served
from flows.forget import forget
from infra.settings import EngineSettings
from infra.store.keys import export_folder
from infra.store.opening import open_store
from infra.versions import Version
from tasks.lineage.history import find_version
from tasks.predict import Answer, predict
from tasks.serving.export import _compared, export_version
from tasks.serving.publish import publish
from tests.in_process import deal_json
from tests.loopback import Loopback
from tests.registering import register

TEXT = "Patient reports chest pain since this morning."

pytestmark = pytest.mark.usefixtures("lineage")


@pytest.fixture
def lineage(copied_home: Path) -> None:
    """Version 1 and 3 of `l` were champions; version 2 did not pass its gate."""


def version(number: str) -> Version:
    return find_version(open_store(), "l", number)


def exports() -> list[str]:
    return [info.key for info in open_store().list(export_folder("l"))]


def asked() -> Answer:
    return predict(open_store(), TEXT, lineage="l", task="clinic", version="3")


@pytest.mark.nightly
def test_a_merged_model_answers_as_the_version_without_peft_or_this_project(
    home: Path, tiny_base: Path, tmp_path: Path
) -> None:
    before = asked()
    target = tmp_path / "merged"
    found = export_version(open_store(), "l", "3", "merged", str(target))
    assert found.max_difference <= found.tolerance and found.num_prompts == 8, "four rows of each of two tasks"
    assert [path.name for path in tmp_path.iterdir() if "merged" in path.name] == ["merged"]

    tokenizer = AutoTokenizer.from_pretrained(target)
    prompt = tokenizer(before.prompt, return_tensors="pt")
    adapter = home / "store" / version("3").adapter_uri
    base = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    with torch.no_grad():
        plain = base(**prompt).logits
        merged = AutoModelForCausalLM.from_pretrained(target, dtype="auto")(**prompt).logits
        with_adapter = PeftModel.from_pretrained(base, adapter)(**prompt).logits
    assert merged.dtype == torch.float32 and torch.allclose(merged, with_adapter, atol=1e-3)
    assert not torch.allclose(plain, with_adapter, atol=1e-3), "the adapter changes something"
    assert {task["schema"]["name"] for task in json.loads((target / "deal.json").read_text())["tasks"]} == {
        "bank",
        "clinic",
    }
    assert not list(target.rglob("*.bin")) and "version 3: bank, clinic" in (target / "README.md").read_text()
    assert asked().first_token_logits == before.first_token_logits, "the base model in memory is not the merged one"
    with pytest.raises(ConfigError, match="is there already; name a new folder"):
        export_version(open_store(), "l", "3", "merged", str(target))


def test_an_export_that_answers_otherwise_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LoraModel, "merge_and_unload", lambda self, **_: self.unload())
    with pytest.raises(IntegrityError, match="answers otherwise than the served version"):
        export_version(open_store(), "l", "3", "merged", str(tmp_path / "merged"))
    assert list(tmp_path.glob("*merged*")) == []
    assert asked().answer is not None


def test_logits_that_are_no_numbers_are_refused_wherever_they_stand() -> None:
    right, broken = torch.zeros(3), torch.tensor([0.0, float("nan"), 0.0])
    with pytest.raises(IntegrityError, match="a logit differs by nan"):
        _compared(version("3"), "merged", "x", "float32", [right, right], [right, broken])


@pytest.mark.parametrize("act", ["merged", "publish"])
def test_what_may_not_serve_is_not_handed_over(tmp_path: Path, act: str) -> None:
    def hand_over(number: str) -> Any:
        if act == "publish":
            return publish(open_store(), "l", tmp_path / "out", EngineSettings(), version=number)
        return export_version(open_store(), "l", number, "merged", str(tmp_path / "out"))

    with pytest.raises(RegistryError, match="did not pass its gate"):
        hand_over("2")
    waiting = register("waiting", needs_approval=True)
    with pytest.raises(RegistryError, match=f"deal version promote {waiting.version} --lineage l"):
        hand_over(waiting.version)
    asyncio.run(forget(version("1").dataset_sha256))
    with pytest.raises(RegistryError, match="rows of 'bank' that it learned were forgotten"):
        hand_over("1")
    with pytest.raises(RegistryError, match=r"that version 1, which it continues, learned were forgotten"):
        hand_over("3")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_made_is_refused_before_the_merge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr("tasks.serving.export._merge", lambda *_: pytest.fail("it was merged"))
    for target, why in {
        tmp_path / "file" / "merged": "Not a directory",
        tmp_path / "file" / "a" / "merged": "Not a directory",
        tmp_path / "a\0b": "it has a NUL in its name",
        tmp_path / ("a" * 5000): "File name too long",
    }.items():
        with pytest.raises(ConfigError, match=rf"cannot be made \({why}\); name a new folder"):
            export_version(open_store(), "l", "3", "merged", str(target))
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["file"]


def test_a_peft_folder_has_its_card_and_no_rows(
    home: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "peft"
    found = export_version(open_store(), "l", "3", "peft", str(folder))
    assert found.to == "peft" and found.max_difference <= found.tolerance and len(exports()) == 1
    with pytest.raises(ConfigError, match="is there already; name a new folder"):
        export_version(open_store(), "l", "3", "peft", str(folder))
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "deal.json",
    ]
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base), folder)
    for path in folder.iterdir():
        assert str(tiny_base).encode() not in path.read_bytes(), "a path of this machine is nobody else's business"
    assert read_served(folder).base_source == tiny_base.name
    with pytest.raises(ConfigError, match="give OWNER/NAME"):
        export_version(open_store(), "l", "3", "hub", "../somewhere")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="ours/support could not be written on the Hub"):
        export_version(open_store(), "l", "3", "hub", "ours/support")


def test_nothing_is_uploaded_to_a_public_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    class Hub(BaseHTTPRequestHandler):
        """A Hub whose repository is there already and public."""

        def answer(self, status: int, content: object) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            asked.append(f"{self.command} {self.path}")
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_POST(self) -> None:
            self.answer(
                409, {"error": "You already created this model repo", "url": "https://huggingface.co/ours/support"}
            )

        def do_GET(self) -> None:
            self.answer(200, {"id": "ours/support", "private": False})

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with Loopback(Hub) as server:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.address)
        with pytest.raises(ConfigError, match=r"ours/support is a public repository.*Nothing was uploaded"):
            export_version(open_store(), "l", "3", "hub", "ours/support")
    assert asked == ["POST /api/repos/create", "GET /api/models/ours/support"]


def resolved(folder: Path, base_model: str, name: str) -> bool:
    """Whether vLLM's filesystem resolver loads an adapter for a request that names it."""
    config = folder / name / "adapter_config.json"
    if not config.is_file():
        return False
    values = json.loads(config.read_text())
    return bool(values["peft_type"] == "LORA" and values["base_model_name_or_path"] == base_model)


def test_a_published_folder_is_what_vllms_resolver_looks_for_and_never_changes(tiny_base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapters"
    found = publish(open_store(), "l", folder, EngineSettings())
    assert (found.model, found.is_new, found.base_model) == ("l-v3", True, str(tiny_base))
    assert [path.name for path in folder.iterdir()] == ["l-v3"], "nothing else, not even for a moment that is over"
    assert resolved(folder, str(tiny_base), "l-v3") and not resolved(folder, "served-name", "l-v3")
    stored = open_store().get_bytes(f"{version('3').adapter_uri}/{WEIGHTS_FILE}")
    assert (folder / "l-v3" / WEIGHTS_FILE).read_bytes() == stored
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base), folder / "l-v3")

    assert not publish(open_store(), "l", folder, EngineSettings()).is_new
    with pytest.raises(ConfigError, match=rf"other content \(adapter_config.json\).*for the base model {tiny_base}"):
        publish(open_store(), "l", folder, EngineSettings(), model="ours/base")
    theirs, noted = tmp_path / "theirs", exports()
    shutil.copytree(folder, theirs)
    (theirs / "l-v3" / CONFIG_FILE).write_text("{}")
    with pytest.raises(ConfigError, match="other content"):
        publish(open_store(), "l", theirs, EngineSettings())
    assert exports() == noted and len(noted) == 1, "the folder is another's"
    (folder / "l-v3" / WEIGHTS_FILE).write_bytes(b"damaged")
    with pytest.raises(ConfigError, match=r"other content \(adapter_model.safetensors\)"):
        publish(open_store(), "l", folder, EngineSettings())
    with pytest.raises(ConfigError, match="its rank is"):
        publish(open_store(), "l", folder, EngineSettings(max_lora_rank=1), version="1")

    words = ("version", "export", "1", "-l", "l", "--format", "vllm", "--out", str(folder))
    assert deal_json(*words, "--base-model", "ours/base")["model"] == "l-v1" and resolved(folder, "ours/base", "l-v1")
