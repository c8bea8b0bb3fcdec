"""A champion with changed bytes does not answer, and is not evaluated, served or continued. An undamaged version is."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from deal_core.adapter.files import ADAPTER_FILES, digests_of
from deal_core.errors import IntegrityError
from deal_core.evaluation.answering import SERVED_FILE
from flows.champions import evaluate
from flows.cli.app import app
from infra.serving.version_files import SERVED_FILES, fetch_version
from infra.versions import Version, Versions
from tasks.context import current_store
from tasks.lineage.promotion import roll_back
from tasks.lineage.record import RECORD_FILE
from tasks.predict import predict, predict_file
from tests.adapting import BANK, run

pytestmark = pytest.mark.usefixtures("prefect_api", "home")
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def champion(copied_home: Path) -> Version:
    """The champion, version 3, whose parent is version 1."""
    info = Versions(current_store()).champion("l")
    assert info is not None and info.version == "3"
    return info


def flip(path: Path) -> None:
    """Change one bit in the middle of the last tensor."""
    content = bytearray(path.read_bytes())
    content[-10] ^= 64
    path.write_bytes(content)


def folder_of(home: Path, info: Version) -> Path:
    return home / "store" / info.adapter_uri


def test_a_damaged_champion_is_refused_wherever_it_would_be_loaded(
    champion: Version, home: Path, tiny_base: Path, tmp_path: Path
) -> None:
    folder = folder_of(home, champion)
    recorded = digests_of(folder)[WEIGHTS]
    assert predict("I lost my card", lineage="l", task="bank", version=None).version == "3"
    flip(folder / WEIGHTS)
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"text": "I lost my card"}\n')
    before = [(info.version, info.aliases) for info in Versions(current_store()).all("l")]

    loads: dict[str, Callable[[], object]] = {
        "predict": lambda: predict("I lost my card", lineage="l", task="bank", version=None),
        "predict a file": lambda: predict_file(
            questions, lineage="l", task="bank", version=None, out=tmp_path / "answers.jsonl", column=None
        ),
        "evaluate": lambda: asyncio.run(evaluate("l")),
        "adapt": lambda: run(tiny_base, {**BANK, "name": "again"}),
    }
    for name, load in loads.items():
        with pytest.raises(IntegrityError) as caught:
            load()
        message = str(caught.value)
        for part in ("Version 3 of 'l'", WEIGHTS, recorded, digests_of(folder)[WEIGHTS], "deal version rollback 1"):
            assert part in message, (name, message)
    assert [(info.version, info.aliases) for info in Versions(current_store()).all("l")] == before, (
        "nothing was learned"
    )

    said = CliRunner().invoke(app, ["predict", "I lost my card", "--lineage", "l", "--home", str(home)])
    assert said.exit_code == 1 and "Traceback" not in said.output and "is damaged" in " ".join(said.output.split())

    roll_back("l", None, who="me", why="damaged")
    assert predict("I lost my card", lineage="l", task="bank", version=None).version == "1"
    assert run(tiny_base, {**BANK, "name": "again"}).parent_version == "1"


def test_an_adapter_that_is_brought_back_serves_again(champion: Version, home: Path) -> None:
    path = folder_of(home, champion) / WEIGHTS
    whole = path.read_bytes()
    flip(path)
    with pytest.raises(IntegrityError):
        predict("I lost my card", lineage="l", task="bank", version=None)
    path.write_bytes(whole)
    assert predict("I lost my card", lineage="l", task="bank", version=None).version == "3"


@pytest.mark.parametrize("name", SERVED_FILES)
def test_what_is_fetched_to_be_served_is_compared_too(champion: Version, home: Path, tmp_path: Path, name: str) -> None:
    fetch_version(current_store(), champion, tmp_path / "whole")
    path = folder_of(home, champion) / name
    recorded, content = digests_of(path.parent, [name])[name], path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(IntegrityError) as caught:
        fetch_version(current_store(), champion, tmp_path / "served")
    found = digests_of(path.parent, [name])[name]
    message = str(caught.value)
    for part in ("Version 3 of 'l'", name, recorded, found, "deal version rollback"):
        assert part in message


def test_a_version_has_the_digest_of_each_file(champion: Version, home: Path) -> None:
    found = digests_of(folder_of(home, champion), (*ADAPTER_FILES, SERVED_FILE, RECORD_FILE))
    assert set(found) >= {"adapter_config.json", WEIGHTS, "method.json", "deal.json"}
    assert champion.files_sha256 == {name: (digest,) for name, digest in found.items()}
