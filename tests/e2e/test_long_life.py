"""A long life: six arrivals by a schedule, a poisoned one, rows to unlearn, a consolidation and another base model.

A watch and a server run from its start to its end.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import tenacity

from benchmarks.output import DEAL
from benchmarks.speed.serving import served
from infra.promotions import PromotionLog
from infra.store.opening import open_store
from infra.versions import Version, Versions
from tasks.lineage.record import read_record
from tasks.predict import predict_file
from tests.e2e.command import ROOT, deal
from tests.long_life import LINEAGE, WORDS_OF, texts_of, write_story

WAIT_SECONDS = 240.0
NUM_ASKED = 20
MOSTLY = 0.8
"""A share of right answers that no guess has."""
ACME = "tempers"
"""The task that only the arrival to unlearn has taught."""

pytestmark = [pytest.mark.e2e, pytest.mark.nightly(minutes=11)]


@pytest.fixture
def story(tmp_path: Path) -> Path:
    """The folder with the files, the settings and the base models. Its schedule is due every minute."""
    folder = tmp_path / "long-life"
    write_story(folder)
    return folder


@contextmanager
def watching(home: Path) -> Iterator[None]:
    """`deal adapt --watch`, which has to live until the story ends."""
    command = [*DEAL, "adapt", "--watch", "--lineage", LINEAGE, "--poll", "1", "--json"]
    log = home.parent / "watch.log"
    with log.open("w") as stream:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(command, cwd=home.parent, env=environment, stdout=stream, stderr=subprocess.STDOUT)
        try:
            yield
            assert process.poll() is None, log.read_text()
        finally:
            process.terminate()
            process.wait(60)


def learn(home: Path, story: Path, day: str, num_versions: int) -> list[str]:
    """Let the files of a day land, one after another, and wait for their versions. Return what became of all."""
    for name in WORDS_OF:
        if name.startswith(day):
            landed = home / "store" / "inbox" / Path(name).relative_to(day)
            landed.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(story / name, landed)
    for attempt in tenacity.Retrying(wait=tenacity.wait_fixed(0.5), stop=tenacity.stop_after_delay(WAIT_SECONDS)):
        with attempt:
            standings = [version.standing for version in Versions(open_store()).all(LINEAGE)]
            assert len(standings) == num_versions and "left behind" not in standings
    return standings


def ask(url: str, file: str) -> httpx.Response:
    """Ask the server about new texts with the words of a file."""
    texts = texts_of(WORDS_OF[file], NUM_ASKED, f"a client asks about {file}")
    records = [{"input": text, "task": file.split("/")[1]} for text in texts]
    return httpx.post(f"{url}/invocations", json={"dataframe_records": records}, timeout=WAIT_SECONDS)


def check_answers(home: Path, url: str, version: str, *files: str) -> None:
    """The server answers as a version does that is asked alone, and mostly right, about the words of each file."""
    for attempt in tenacity.Retrying(wait=tenacity.wait_fixed(0.5), stop=tenacity.stop_after_delay(WAIT_SECONDS)):
        with attempt:
            assert httpx.get(f"{url}/version", timeout=60).json()["version"] == version
    for file in files:
        texts = texts_of(WORDS_OF[file], NUM_ASKED, f"a client asks about {file}")
        answer = ask(url, file)
        assert answer.status_code == 200, answer.text
        predictions = answer.json()["predictions"]
        assert {each["version"] for each in predictions} == {version}
        outputs = [each["output"] for each in predictions]
        assert outputs == alone(home, version, file.split("/")[1], [*texts]), (version, file)
        right = [output == label for output, label in zip(outputs, texts.values(), strict=True)]
        assert sum(right) >= MOSTLY * NUM_ASKED, (version, file, outputs)


def alone(home: Path, version: str, task: str, texts: list[str]) -> list[str]:
    """What a version answers without a server, as `deal predict --data` writes it."""
    asked, out = home.parent / "asked.jsonl", home.parent / "answered.jsonl"
    asked.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    out.unlink(missing_ok=True)
    found = predict_file(open_store(), asked, lineage=LINEAGE, task=task, version=version, out=out, column=None)
    return [json.loads(line)[found.columns["answer"]] for line in out.read_text().splitlines()]


def champions() -> list[str | None]:
    """The champions so far, as the promotion log has them."""
    return [move.champion for move in PromotionLog(open_store()).moves(LINEAGE)]


def version_of(number: str) -> Version:
    """A version, also one whose adapter was removed."""
    version = Versions(open_store()).find(LINEAGE, number)
    assert version is not None
    return version


def base_of(number: str) -> str:
    """The source of a version's base model."""
    return read_record(open_store(), version_of(number)).base.source


def test_what_is_served_is_right_at_every_point_of_a_long_life(home: Path, story: Path) -> None:
    bank, sizes, _, acme, shop, years = WORDS_OF
    deal(home, "lineage", "apply", str(story / "support.yaml"))
    with watching(home):
        assert learn(home, story, "monday", 2) == ["learned"] * 2
        with served(LINEAGE, {**os.environ, "PYTHONPATH": str(ROOT)}) as (url, _):
            check_answers(home, url, "2", bank, sizes)

            poisoned = ["learned", "learned", "rejected by the gate", "learned"]
            assert learn(home, story, "tuesday", 4) == poisoned
            assert any(reason.startswith("colours: accuracy fell by") for reason in version_of("3").reasons)
            check_answers(home, url, "4", bank, acme)

            assert learn(home, story, "wednesday", 6) == [*poisoned, "learned", "learned"]
            assert [version_of(number).parent_version for number in "456"] == ["2", "4", "5"]
            check_answers(home, url, "6", bank, acme, shop, years)

            unlearn(home, url)
            check_answers(home, url, "8", bank, sizes, shop, years)
            refused = ask(url, acme)
            assert refused.status_code == 400 and ACME in refused.text, "only acme's rows had taught the task"

            consolidated = deal(home, "lineage", "consolidate", LINEAGE, "--yes")
            assert (consolidated["status"], consolidated["version"]) == ("promoted", "9")
            assert {arrival.task for arrival in version_of("9").arrivals} == {"colours", "sizes", "years"}
            check_answers(home, url, "9", bank, sizes, shop, years)

            change_base(home, story)
            check_answers(home, url, "13", bank, sizes, shop, years)

            deal(home, "version", "rollback", "9", "--lineage", LINEAGE, "--reason", "to compare")
            check_answers(home, url, "9", bank)
            deal(home, "version", "rollback", "13", "--lineage", LINEAGE, "--reason", "compared")
            check_answers(home, url, "13", bank)
    assert champions() == ["1", "2", "4", "5", "6", "8", "9", "13", "9", "13"]


def unlearn(home: Path, url: str) -> None:
    """Delete acme's rows, and let the weights forget them; the server answers all the time."""
    named = ("data", "delete", f"inbox/{ACME}/acme.jsonl", "--relearn", "--lineage", LINEAGE)
    planned = deal(home, *named, "--dry-run")
    assert [*planned["branch"]["arrivals"]] == ["5", "6"]
    assert len(Versions(open_store()).all(LINEAGE)) == 6, "a dry run makes nothing"
    result = deal(home, *named, "--yes")
    assert (result["status"], result["champion"]) == ("swapped", "8")
    assert [(made["version"], made["remakes"]) for made in result["made"]] == [("7", "5"), ("8", "6")]
    assert result["attestation"]["removed"] == ["4", "5", "6"]
    assert version_of("7").parent_version == "2", "the last version that never saw the rows"
    assert not [info.key for number in "456" for info in open_store().list(version_of(number).adapter_uri)]


def change_base(home: Path, story: Path) -> None:
    """Learn the arrivals on the other base model: one by one, without the poisoned and the deleted one."""
    new = str(story / "new-base")
    result = deal(home, "lineage", "rebase", LINEAGE, "--base", new, "--yes")
    assert (result["status"], result["champion"]) == ("swapped", "13"), result
    assert [made["remakes"] for made in result["made"]] == ["1", "2", "7", "8"], "a consolidation is not repeated"
    assert base_of("9") == str(story / "base") and base_of("13") == new
